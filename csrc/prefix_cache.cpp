#include "prefix_cache.h"

#include <algorithm>
#include <utility>

#include "check.h"

namespace ts {
namespace {

constexpr size_t kRoots = 1024;  // tenants whose last first page is remembered; a power of two

}  // namespace

PrefixCache::PrefixCache(PagePool &pool, bool enabled, std::vector<CacheGroup> groups, Tier *tier)
    : pool_(pool),
      enabled_(enabled),
      groups_(std::move(groups)),
      tier_(tier),
      pages_(enabled ? pool.num_pages() : 1),
      evicted_(enabled ? pool.num_pages() : 1) {
  TS_ASSERT(!groups_.empty(), "a model's caches are of some kind");
  if (!enabled) return;
  origins_.resize(static_cast<size_t>(pool.num_pages()));
  tokens_.resize(origins_.size() * static_cast<size_t>(pool.page_size()));
  firsts_.resize(kRoots, kNone);
}

std::optional<SharedPage> PrefixCache::find(const PageHash &hash) {
  if (!enabled_) return std::nullopt;
  const int32_t page = pages_.find(hash);
  if (page == kNone) return std::nullopt;
  return pool_.take_shared(page);
}

std::vector<SharedPage> PrefixCache::find_prefix(std::span<const PageHash> hashes) {
  std::vector<SharedPage> pages;
  if (!enabled_ || hashes.empty() || pages_.find(hashes[0]) == kNone) return pages;
  pages.reserve(hashes.size());
  constexpr size_t kFar = 16, kNear = 8;  // pages ahead, of which the bucket and then what it leads to is fetched
  for (size_t i = 0; i < hashes.size(); ++i) {
    if (i + kFar < hashes.size()) pages_.prefetch(hashes[i + kFar]);
    if (i + kNear < hashes.size()) {
      const int32_t ahead = pages_.prefetch_place(hashes[i + kNear]);
      if (ahead != kNone) __builtin_prefetch(&pool_.frames_[static_cast<size_t>(ahead)], 1);
    }
    const int32_t page = pages_.find(hashes[i]);
    if (page == kNone) break;
    pages.push_back(pool_.take_shared(page));
  }
  return pages;
}

WritablePage PrefixCache::allocate() {
  if (pool_.num_blank() > 0) return pool_.take_blank();
  const int32_t page = pool_.next_to_evict();
  TS_ASSERT(page != PagePool::kNone, "a page was asked for and none is available");
  remember(pages_.hash(page));
  if (tier_ != nullptr) tier_->keep(pages_.hash(page), pool_.first_page() + page);
  pages_.erase(page);
  WritablePage taken = pool_.take_idle(page);
  prefetch_eviction();
  return taken;
}

/// Fetches what the next eviction will look up: its victim's places in both indexes, and that of the oldest hash remembered. They lie
/// anywhere, and there is a step's time until they are wanted.
void PrefixCache::prefetch_eviction() const {
  const int32_t page = pool_.next_to_evict();
  if (page == PagePool::kNone) return;
  const PageHash &hash = pages_.hash(page);
  pages_.prefetch(hash);
  evicted_.prefetch(hash);
  evicted_.prefetch(evicted_.hash(next_evicted_));
}

/// The hash of a page that is evicted, in place of the one that was evicted num_pages() evictions ago.
void PrefixCache::remember(const PageHash &hash) {
  if (evicted_.find(hash) != kNone) return;
  if (evicted_.holds(next_evicted_)) evicted_.erase(next_evicted_);
  evicted_.insert(next_evicted_, hash);
  next_evicted_ = (next_evicted_ + 1) % pool_.num_pages();
}

SharedPage PrefixCache::seal(WritablePage &&page, const PageHash &hash, const PageHash &parent,
                             std::span<const int32_t> tokens, std::vector<WritablePage> *duplicates) {
  if (!enabled_) return pool_.seal(std::move(page), false);
  const int32_t twin = pages_.find(hash);
  if (twin != kNone) {
    TS_ASSERT(twin != page.id(), "a writable page is never indexed");
    WritablePage duplicate = std::move(page);  // freed here, unless
    if (duplicates != nullptr) duplicates->push_back(std::move(duplicate));
    return pool_.take_shared(twin);
  }
  pages_.insert(page.id(), hash);
  const auto id = static_cast<size_t>(page.id());
  TS_ASSERT(tokens.size() <= static_cast<size_t>(pool_.page_size()), "a page holds page_size tokens");
  std::ranges::copy(tokens, tokens_.begin() + static_cast<ptrdiff_t>(id * static_cast<size_t>(pool_.page_size())));
  origins_[id] = {parent, kNone};
  if (!tokens.empty()) {
    const int32_t before = pages_.find(parent);
    (before == kNone ? firsts_[first(parent)] : origins_[static_cast<size_t>(before)].last_child) = page.id();
  }
  const int32_t ghost = evicted_.find(hash);
  if (ghost != kNone) evicted_.erase(ghost);
  return pool_.seal(std::move(page), true, ghost != kNone);  // what comes back may well come again
}

Miss PrefixCache::explain(const PageHash &hash, const PageHash &parent, std::span<const int32_t> tokens) const {
  if (!enabled_) return {TS_MISS_OFF, 0};
  if (evicted_.find(hash) != kNone || holds(hash)) return {TS_MISS_EVICTED, 0};
  const int32_t before = pages_.find(parent);
  const int32_t sibling = before == kNone ? firsts_[first(parent)] : origins_[static_cast<size_t>(before)].last_child;
  if (sibling == kNone || !pages_.holds(sibling)) return {TS_MISS_NEW, 0};
  const auto id = static_cast<size_t>(sibling);
  if (origins_[id].parent != parent) return {TS_MISS_NEW, 0};
  const int32_t *others = &tokens_[id * static_cast<size_t>(pool_.page_size())];
  const auto differs = std::mismatch(tokens.begin(), tokens.end(), others).first;
  return {TS_MISS_NEW, static_cast<int32_t>(differs - tokens.begin())};
}

void PrefixCache::forget(const PageHash &hash) {
  if (tier_ != nullptr) tier_->forget(hash);
  const int32_t page = enabled_ ? pages_.find(hash) : kNone;
  if (page == kNone) return;
  pages_.erase(page);
  pool_.set_unfindable(page);
}

void PrefixCache::check() const {
  pool_.check();
  if (!enabled_) return;
  for (int32_t page = 0; page < pool_.num_pages(); ++page) {
    TS_ASSERT(pages_.holds(page) == pool_.frames_[static_cast<size_t>(page)].findable,
              "index and pool agree on what can be found");
  }
  pages_.check();
  evicted_.check();
}

}  // namespace ts
