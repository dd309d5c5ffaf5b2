#include "prefix_cache.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "check.h"

namespace ts {

PrefixCache::PrefixCache(PagePool &pool, bool enabled) : pool_(pool), enabled_(enabled) {
  if (!enabled) return;
  entries_.resize(static_cast<size_t>(pool.num_pages()));
  buckets_.resize(std::bit_ceil(static_cast<size_t>(pool.num_pages())), kNone);
}

int32_t PrefixCache::lookup(const PageHash &hash) const {
  int32_t page = buckets_[bucket(hash)];
  while (page != kNone && entries_[static_cast<size_t>(page)].hash != hash)
    page = entries_[static_cast<size_t>(page)].next;
  return page;
}

void PrefixCache::insert(int32_t page, const PageHash &hash) {
  Entry &entry = entries_[static_cast<size_t>(page)];
  TS_ASSERT(!entry.indexed, "a page has one hash");
  entry = {hash, std::exchange(buckets_[bucket(hash)], page), true};
}

void PrefixCache::erase(int32_t page) {
  Entry &entry = entries_[static_cast<size_t>(page)];
  TS_ASSERT(entry.indexed, "only an indexed page can leave the index");
  int32_t *link = &buckets_[bucket(entry.hash)];
  while (*link != page) {
    TS_ASSERT(*link != kNone, "an indexed page is missing from its chain");
    link = &entries_[static_cast<size_t>(*link)].next;
  }
  *link = entry.next;
  entry = {};
}

std::optional<SharedPage> PrefixCache::find(const PageHash &hash) {
  if (!enabled_) return std::nullopt;
  const int32_t page = lookup(hash);
  if (page == kNone) return std::nullopt;
  return pool_.take_shared(page);
}

std::vector<SharedPage> PrefixCache::find_prefix(std::span<const PageHash> hashes) {
  std::vector<SharedPage> pages;
  if (!enabled_ || hashes.empty() || lookup(hashes[0]) == kNone) return pages;
  pages.reserve(hashes.size());
  constexpr size_t kFar = 16, kNear = 8;  // pages ahead, of which the bucket and then what it leads to is fetched
  for (size_t i = 0; i < hashes.size(); ++i) {
    if (i + kFar < hashes.size()) __builtin_prefetch(&buckets_[bucket(hashes[i + kFar])]);
    if (i + kNear < hashes.size()) {
      const int32_t ahead = buckets_[bucket(hashes[i + kNear])];
      if (ahead != kNone) {
        __builtin_prefetch(&entries_[static_cast<size_t>(ahead)]);
        __builtin_prefetch(&pool_.frames_[static_cast<size_t>(ahead)], 1);
      }
    }
    const int32_t page = lookup(hashes[i]);
    if (page == kNone) break;
    pages.push_back(pool_.take_shared(page));
  }
  return pages;
}

WritablePage PrefixCache::allocate() {
  if (pool_.num_blank() > 0) return pool_.take_blank();
  const int32_t page = pool_.oldest_idle();
  TS_ASSERT(page != PagePool::kNone, "a page was asked for and none is available");
  erase(page);
  return pool_.take_idle(page);
}

SharedPage PrefixCache::seal(WritablePage &&page, const PageHash &hash) {
  if (!enabled_) return pool_.seal(std::move(page), false);
  const int32_t twin = lookup(hash);
  if (twin != kNone) {
    TS_ASSERT(twin != page.id(), "a writable page is never indexed");
    const WritablePage duplicate = std::move(page);  // freed here
    return pool_.take_shared(twin);
  }
  insert(page.id(), hash);
  return pool_.seal(std::move(page), true);
}

void PrefixCache::forget(const SharedPage &page) {
  if (!enabled_ || !entries_[static_cast<size_t>(page.id())].indexed) return;
  erase(page.id());
  pool_.set_unfindable(page.id());
}

void PrefixCache::check() const {
  pool_.check();
  if (!enabled_) return;
  size_t num_indexed = 0;
  for (size_t page = 0; page < entries_.size(); ++page) {
    const Entry &entry = entries_[page];
    TS_ASSERT(entry.indexed == pool_.frames_[page].findable, "index and pool agree on what can be found");
    num_indexed += entry.indexed ? 1 : 0;
  }
  for (size_t b = 0; b < buckets_.size(); ++b) {
    for (int32_t page = buckets_[b]; page != kNone; page = entries_[static_cast<size_t>(page)].next) {
      const Entry &entry = entries_[static_cast<size_t>(page)];
      TS_ASSERT(entry.indexed && bucket(entry.hash) == b, "a page is in the chain of its hash");
      TS_ASSERT(num_indexed-- > 0, "no page is in two chains");
    }
  }
  TS_ASSERT(num_indexed == 0, "every indexed page is in a chain");
}

}  // namespace ts
