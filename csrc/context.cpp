#include "context.h"

#include <algorithm>
#include <utility>

#include "check.h"

namespace ts {
namespace {

/// A group's part of a sequence's row of the page table.
std::span<int32_t> part_of(std::span<int32_t> row, size_t group, size_t num_groups) {
  if (num_groups == 1) return row;  // without a division
  const size_t each = row.size() / num_groups;
  return row.subspan(group * each, each);
}

/// Misses are explained by what the first group knows.
SharedPage seal_page(PrefixCache &cache, WritablePage &&page, const Sequence &sequence, size_t index, int32_t group,
                     std::vector<WritablePage> *duplicates) {
  if (!cache.enabled()) return cache.seal(std::move(page), {});
  TS_ASSERT(index < sequence.hashes.size(), "a page was filled before its hash was known");
  if (group > 0) return cache.seal(std::move(page), sequence.hashes[index].of_group(group), {}, {}, duplicates);
  return cache.seal(std::move(page), sequence.hashes[index], sequence.parent(index), sequence.page(index), duplicates);
}

}  // namespace

// ---- pages of a group -----------------------------------------------------------------------------------------------

void GroupPages::swap(GroupPages &other) noexcept {
  sealed_.swap(other.sealed_);
  open_.swap(other.open_);
  std::swap(base_, other.base_);
  std::swap(given_back_, other.given_back_);
}

void GroupPages::release() {
  open_.clear();
  while (!sealed_.empty()) sealed_.pop_back();
}

/// `pages`: the last of the text's first `num_pages`, as Prefix has them.
void GroupPages::adopt(const CacheGroup &group, std::vector<SharedPage> &&pages, int32_t num_pages, int32_t page_size,
                       std::span<int32_t> row) {
  open_.clear();
  const int32_t begin = num_pages - static_cast<int32_t>(pages.size());
  TS_ASSERT(begin >= num_sealed(), "only pages that are not here are found");
  if (begin > num_sealed() || group.recurrent()) {  // nothing before them is read any more
    release();
    for (int32_t page = given_back_; !group.recurrent() && page < begin; ++page) {
      row[static_cast<size_t>(page)] = CacheGroup::kNoPage;
    }
    base_ = given_back_ = begin;
  }
  for (SharedPage &page : pages) {
    if (!group.recurrent()) row[static_cast<size_t>(num_sealed())] = page.number();
    sealed_.push_back(std::move(page));
  }
  pages.clear();
  if (!group.recurrent()) give_back(group.first_page(num_pages * page_size, page_size), row);
}

/// `wanted`: pages of the text.
void GroupPages::reserve(const CacheGroup &group, PrefixCache &cache, int32_t wanted, std::span<int32_t> row) {
  if (group.recurrent()) {
    if (!open_.empty()) return;
    open_.push_back(cache.allocate());
    row[0] = open_.back().number();
    row[1] = sealed_.empty() ? row[0] : sealed_.back().number();
    return;
  }
  while (num_pages() < wanted) {
    WritablePage page = cache.allocate();
    row[static_cast<size_t>(num_pages())] = page.number();
    open_.push_back(std::move(page));
  }
}

GroupPages GroupPages::share() const {
  GroupPages shared(num_kept());
  shared.base_ = shared.given_back_ = given_back_;
  for (auto i = static_cast<size_t>(given_back_ - base_); i < sealed_.size(); ++i) {
    shared.sealed_.push_back(sealed_[i].share());
  }
  return shared;
}

void GroupPages::seal(int32_t group, PrefixCache &cache, const Sequence &sequence, int32_t num_computed,
                      std::span<int32_t> row, std::vector<WritablePage> *duplicates) {
  const CacheGroup &kind = cache.groups()[static_cast<size_t>(group)];
  if (kind.recurrent()) return checkpoint(group, cache, sequence, num_computed, row, duplicates);
  const int32_t num_full = num_computed / cache.pool().page_size();
  TS_ASSERT(num_full <= num_pages(), "more tokens were computed than there is room for");
  size_t num_newly = 0;
  for (; num_sealed() < num_full; ++num_newly) {
    const auto index = static_cast<size_t>(num_sealed());
    sealed_.push_back(seal_page(cache, std::move(open_[num_newly]), sequence, index, group, duplicates));
    row[index] = sealed_.back().number();  // another page, if the same content was here already
  }
  if (num_newly == 0) return;
  open_.erase(open_.begin(), open_.begin() + static_cast<ptrdiff_t>(num_newly));
  give_back(kind.first_page(num_full * cache.pool().page_size(), cache.pool().page_size()), row);
}

/// The state stands behind `num_computed` tokens.
void GroupPages::checkpoint(int32_t group, PrefixCache &cache, const Sequence &sequence, int32_t num_computed,
                            std::span<int32_t> row, std::vector<WritablePage> *duplicates) {
  row[1] = row[0];
  const int32_t page_size = cache.pool().page_size();
  if (!cache.enabled() || num_computed % page_size != 0) return;
  const int32_t index = num_computed / page_size - 1;
  SharedPage kept = seal_page(cache, std::move(open_.back()), sequence, static_cast<size_t>(index), group, duplicates);
  release();
  sealed_.push_back(std::move(kept));
  base_ = given_back_ = index;
}

/// The text's pages before `first`.
void GroupPages::give_back(int32_t first, std::span<int32_t> row) {
  TS_ASSERT(first <= num_sealed(), "only a sealed page is given back while its sequence runs");
  for (; given_back_ < first; ++given_back_) {
    const SharedPage unread = std::move(sealed_[static_cast<size_t>(given_back_ - base_)]);
    row[static_cast<size_t>(given_back_)] = CacheGroup::kNoPage;
  }
}

const WritablePage &GroupPages::open_page(const CacheGroup &group, int32_t position, int32_t page_size) const {
  const int32_t index = group.recurrent() ? 0 : position / page_size - num_sealed();
  TS_ASSERT(index >= 0, "a sealed page must not be written");
  TS_ASSERT(static_cast<size_t>(index) < open_.size(), "a token has no page");
  return open_[static_cast<size_t>(index)];
}

void GroupPages::check(const CacheGroup &group, int32_t num_computed, int32_t page_size) const {
  TS_ASSERT(given_back_ >= base_ && given_back_ <= num_sealed(), "pages are given back in order");
  if (group.recurrent()) {
    TS_ASSERT(sealed_.size() <= 1 && open_.size() <= 1, "a sequence has one state, and its last checkpoint");
    TS_ASSERT(num_computed == 0 || num_held() > 0, "a state is somewhere");
    TS_ASSERT(num_sealed() * page_size <= num_computed, "a checkpoint is of the past");
    TS_ASSERT(!open_.empty() || num_sealed() * page_size == num_computed, "a state without a page is its checkpoint");
    return;
  }
  TS_ASSERT(num_pages() * page_size >= num_computed, "what was computed lies in pages");
  TS_ASSERT(num_sealed() == num_computed / page_size, "full pages are sealed");
  TS_ASSERT(given_back_ == group.first_page(num_sealed() * page_size, page_size), "what nobody reads is given back");
}

// ---- context --------------------------------------------------------------------------------------------------------

Context::Context(std::span<const CacheGroup> groups, int32_t num_pages_max) : first_(num_pages_max) {
  more_.reserve(groups.size() - 1);
  for (size_t g = 1; g < groups.size(); ++g) more_.emplace_back(groups[g].recurrent() ? 1 : num_pages_max);
}

Context &Context::operator=(Context &&other) noexcept {
  Context taken = std::move(other);  // first: other may be this one
  first_.swap(taken.first_);
  more_.swap(taken.more_);
  return *this;
}

int32_t Context::num_entries(std::span<const CacheGroup> groups) const {
  int32_t most = 0;
  for (size_t g = 0; g < num_groups(); ++g) most = std::max(most, num_entries(groups, g));
  return most;
}

int32_t Context::num_kept() const {
  int32_t sum = 0;
  for (size_t g = 0; g < num_groups(); ++g) sum += of(g).num_kept();
  return sum;
}

void Context::adopt(PrefixCache &cache, Prefix &&prefix, std::span<int32_t> row) {
  TS_ASSERT(prefix.away.empty(), "only pages that are here are adopted");
  for (size_t g = 0; g < prefix.of_group.size(); ++g) {
    of(g).adopt(cache.groups()[g], std::move(prefix.of_group[g]), prefix.num_pages, cache.pool().page_size(),
                part_of(row, g, num_groups()));
  }
  prefix = {};
}

int32_t Context::num_missing(std::span<const CacheGroup> groups, int32_t num_tokens, int32_t page_size) const {
  const int32_t wanted = num_pages_for(num_tokens, page_size);
  int32_t sum = 0;
  for (size_t g = 0; g < num_groups(); ++g) sum += of(g).num_missing(groups[g], wanted);
  return sum;
}

int32_t Context::room(std::span<const CacheGroup> groups, int32_t num_available, int32_t page_size) const {
  int32_t num_paged = 0, pages = 0;  // groups that take a page for each of the text's, and how many they have
  for (size_t g = 0; g < num_groups(); ++g) {
    if (groups[g].recurrent()) {
      num_available -= of(g).num_missing(groups[g], 0);
    } else {
      ++num_paged;
      pages = of(g).num_pages();  // the same in each
    }
  }
  if (num_available < 0) return 0;
  return num_paged == 0 ? INT32_MAX : (pages + num_available / num_paged) * page_size;
}

void Context::reserve(PrefixCache &cache, int32_t num_tokens, std::span<int32_t> row) {
  const int32_t wanted = num_pages_for(num_tokens, cache.pool().page_size());
  TS_ASSERT(static_cast<size_t>(wanted) * num_groups() <= row.size(),
            "a context is longer than its row of the page table");
  for (size_t g = 0; g < num_groups(); ++g) {
    of(g).reserve(cache.groups()[g], cache, wanted, part_of(row, g, num_groups()));
  }
}

void Context::seal(PrefixCache &cache, const Sequence &sequence, int32_t num_computed, std::span<int32_t> row,
                   std::vector<WritablePage> *duplicates) {
  const bool fills_none = num_computed / cache.pool().page_size() == num_sealed();
  if (more_.empty() && fills_none && !cache.groups()[0].recurrent()) return;  // nearly all steps of most models
  for (size_t g = 0; g < num_groups(); ++g) {
    of(g).seal(static_cast<int32_t>(g), cache, sequence, num_computed, part_of(row, g, num_groups()), duplicates);
  }
}

Context Context::share() const {
  Context shared(first_.share());
  for (const GroupPages &pages : more_) shared.more_.push_back(pages.share());
  return shared;
}

void Context::drop_open() {
  for (size_t g = 0; g < num_groups(); ++g) of(g).drop_open();
}

void Context::forget(PrefixCache &cache, const Sequence &sequence) const {
  const auto reached = static_cast<size_t>(sequence.num_reached / sequence.page_size);
  for (size_t page = 0; page < std::min(reached, sequence.hashes.size()); ++page) {
    for (size_t g = 0; g < num_groups(); ++g) cache.forget(sequence.hashes[page].of_group(static_cast<int32_t>(g)));
  }
}

const WritablePage &Context::open_page(std::span<const CacheGroup> groups, size_t group, int32_t position,
                                       int32_t page_size) const {
  return of(group).open_page(groups[group], position, page_size);
}

void Context::check(std::span<const CacheGroup> groups, int32_t num_computed, int32_t page_size) const {
  for (size_t g = 0; g < num_groups(); ++g) of(g).check(groups[g], num_computed, page_size);
}

// ---- what is found again --------------------------------------------------------------------------------------------

namespace {

/// The first page that a group needs to go on behind page `end`.
int32_t first_needed(const CacheGroup &group, int32_t end, int32_t page_size) {
  return group.recurrent() ? end - 1 : group.first_page(end * page_size, page_size);
}

/// Where pages are looked for: in the cache, and in `tier` unless it is null.
struct Places {
  PrefixCache &cache;
  const Tier *tier;

  bool hold(const PageHash &hash) const { return cache.holds(hash) || (tier != nullptr && tier->holds(hash)); }
};

/// How far, at most to page `end`, one group can go on behind page `begin`. The group's pages behind `begin` that it reads are
/// looked for from the end: a missing one rules out every end for which it is read.
int32_t extent(const Places &places, int32_t group, const Sequence &sequence, int32_t begin, int32_t end) {
  const CacheGroup &kind = places.cache.groups()[static_cast<size_t>(group)];
  const auto here = [&](int32_t page) {
    return places.hold(sequence.hashes[static_cast<size_t>(page)].of_group(group));
  };
  if (kind.kind == CacheGroup::Kind::full) {
    int32_t page = begin;
    while (page < end && here(page)) ++page;
    return page;
  }
  while (end > begin) {
    const int32_t from = std::max(begin, first_needed(kind, end, sequence.page_size));
    int32_t page = end;
    while (page > from && here(page - 1)) --page;
    if (page == from) return end;
    end = page - 1;
  }
  return end;
}

/// How far all groups can.
int32_t common_extent(const Places &places, const Sequence &sequence, int32_t begin, int32_t end) {
  const auto num_groups = static_cast<int32_t>(places.cache.groups().size());
  for (int32_t g = 0, num_agreed = 0; num_agreed < num_groups; g = (g + 1) % num_groups) {
    const int32_t there = extent(places, g, sequence, begin, end);
    num_agreed = there == end ? num_agreed + 1 : 1;
    end = there;
  }
  return end;
}

/// Adds a page that is in one of the places.
void add_page(const Places &places, const Sequence &sequence, int32_t page, int32_t group, Prefix &found) {
  const PageHash hash = sequence.hashes[static_cast<size_t>(page)].of_group(group);
  auto here = places.cache.find(hash);
  TS_ASSERT(here || (places.tier != nullptr && places.tier->holds(hash)), "a page of the common extent is somewhere");
  if (here) {
    found.of_group[static_cast<size_t>(group)].push_back(std::move(*here));
  } else {
    found.away.push_back({page, group});
  }
}

/// At most `most` pages behind page `first`.
Prefix match(const Places &places, const Sequence &sequence, int32_t first, int32_t most) {
  PrefixCache &cache = places.cache;
  const std::span<const PageHash> hashes(sequence.hashes);
  const int32_t last = std::min((sequence.num_tokens() - 1) / sequence.page_size, static_cast<int32_t>(hashes.size()));
  const std::span<const CacheGroup> groups = cache.groups();
  const int32_t begin = std::min(first, last);
  Prefix found;
  if (!cache.enabled() || begin == last) return found;
  if (groups.size() == 1 && groups[0].kind == CacheGroup::Kind::full) {
    found.of_group.resize(1);
    found.of_group[0] =
        cache.find_prefix(hashes.subspan(static_cast<size_t>(begin), static_cast<size_t>(last - begin)));
    found.num_pages = begin + static_cast<int32_t>(found.of_group[0].size());
    if (places.tier == nullptr) return found;
    for (int32_t &page = found.num_pages; page < last && places.hold(hashes[static_cast<size_t>(page)]); ++page) {
      add_page(places, sequence, page, 0, found);
    }
    return found;
  }
  const int32_t end = common_extent(places, sequence, begin, begin + std::min(last - begin, most));
  if (end == begin) return found;
  found.num_pages = end;
  found.of_group.resize(groups.size());
  for (size_t g = 0; g < groups.size(); ++g) {
    const int32_t needed = first_needed(groups[g], end, sequence.page_size);
    for (int32_t page = std::max(begin, needed); page < end; ++page) {
      add_page(places, sequence, page, static_cast<int32_t>(g), found);
    }
  }
  std::ranges::stable_sort(found.away, {}, &Prefix::Away::page);
  return found;
}

}  // namespace

Prefix match_prefix(PrefixCache &cache, const Sequence &sequence, int32_t first, int32_t most) {
  return match({cache, nullptr}, sequence, first, most);
}

Prefix match_both_tiers(PrefixCache &cache, const Sequence &sequence) {
  return match({cache, cache.tier()}, sequence, 0, INT32_MAX);
}

Miss explain_miss(const PrefixCache &cache, const Sequence &sequence, int32_t num_found) {
  const auto page = static_cast<size_t>(num_found);
  const int32_t begin = num_found * sequence.page_size;
  if (!cache.enabled()) return {TS_MISS_OFF, 0};
  if (begin + sequence.page_size > sequence.num_prompt - 1) return {};  // the last token's page is computed always
  Miss miss = cache.explain(sequence.hashes[page], sequence.parent(page), sequence.page(page));
  miss.at = begin + (sequence.salted ? miss.at : 0);
  return miss;
}

}  // namespace ts
