#include "fetch.h"

#include <algorithm>
#include <ranges>
#include <utility>

#include "check.h"

namespace ts {
namespace {

/// How many of `away`, at most `most`, are whole pages of the text.
size_t whole_pages(std::span<const Prefix::Away> away, int32_t most) {
  size_t end = std::min(away.size(), static_cast<size_t>(most));
  while (end > 0 && end < away.size() && away[end - 1].page == away[end].page) --end;
  return end;
}

}  // namespace

Fetch::Fetch(PrefixCache &cache, const Sequence &sequence, int32_t owner, Prefix &&prefix, int32_t most)
    : arrival_(sequence.arrival), owner_(owner), prefix_(std::move(prefix)) {
  Tier &tier = *cache.tier();
  const auto hash_of = [&](Prefix::Away at) {
    return sequence.hashes[static_cast<size_t>(at.page)].of_group(at.group);
  };
  const size_t num_ordered = whole_pages(prefix_.away, most);
  TS_ASSERT(num_ordered > 0, "a step has room for what all groups lack of a page of the text");
  const std::span<const Prefix::Away> ordered = std::span(prefix_.away).first(num_ordered);
  const std::span<const Prefix::Away> later = std::span(prefix_.away).subspan(num_ordered);

  // A page that is evicted for one of these takes a slot: none of these, and those of the next steps last, the deepest first.
  std::vector<int32_t> slots;
  slots.reserve(num_ordered);
  for (const Prefix::Away at : ordered) slots.push_back(tier.pin(hash_of(at)));
  for (const Prefix::Away at : std::views::reverse(later)) tier.touch(hash_of(at));
  pages_.reserve(num_ordered);
  tokens_.reserve(num_ordered * static_cast<size_t>(sequence.page_size));  // spans point into it
  for (size_t i = 0; i < num_ordered; ++i) {
    const Prefix::Away at = ordered[i];
    WritablePage page = cache.allocate();
    tier.load(slots[i], page.number());
    pages_.push_back({std::move(page), at, hash_of(at), {}, {}});
    if (at.group != 0) continue;
    const std::span<const int32_t> tokens = sequence.page(static_cast<size_t>(at.page));
    pages_.back().parent = sequence.parent(static_cast<size_t>(at.page));
    pages_.back().tokens = {tokens_.insert(tokens_.end(), tokens.begin(), tokens.end()), tokens.size()};
  }
}

Fetch::Landed Fetch::land(PrefixCache &cache, std::span<const PageCopy> copies) && {
  Landed landed;
  std::vector<SharedPage> found;
  found.reserve(pages_.size());
  int32_t counted = -1;
  auto copy = copies.begin();
  for (Page &p : pages_) {
    while (copy != copies.end() && copy->to != PageCopy::To::page) ++copy;
    TS_ASSERT(copy != copies.end() && copy->page == p.page.number(), "each page was ordered, in order");
    if ((copy++)->state != PageCopy::State::done) {
      if (landed.broken < 0 && counted == p.place.page) --landed.num_pages;
      if (landed.broken < 0) landed.broken = p.place.page;
      continue;  // given back with this
    }
    landed.num_pages += landed.broken < 0 && counted != p.place.page ? 1 : 0;
    counted = p.place.page;
    found.push_back(cache.seal(std::move(p.page), p.hash, p.parent, p.tokens));
  }
  while (!found.empty()) found.pop_back();  // the deepest first, so that it is evicted first
  for (std::vector<SharedPage> &group : prefix_.of_group) {
    while (!group.empty()) group.pop_back();
  }
  pages_.clear();
  return landed;
}

}  // namespace ts
