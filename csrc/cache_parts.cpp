#include "cache_parts.h"

#include "check.h"

namespace ts {

CacheParts::CacheParts(int32_t num_owners, int32_t num_pages, int32_t page_size, bool prefix_cache,
                       const std::vector<CacheGroup> &groups) {
  TS_ASSERT(num_owners >= 1, "the cache has an owner");
  for (int32_t owner = 0; owner < num_owners; ++owner) {
    parts_.push_back(std::make_unique<Part>(owner * num_pages, num_pages, page_size, prefix_cache, groups));
  }
}

int32_t CacheParts::num_blank() const {
  int32_t pages = 0;
  for (const auto &part : parts_) pages += part->pool.num_blank();
  return pages;
}

int32_t CacheParts::num_idle() const {
  int32_t pages = 0;
  for (const auto &part : parts_) pages += part->pool.num_idle();
  return pages;
}

void CacheParts::check() const {
  for (const auto &part : parts_) part->cache.check();
}

}  // namespace ts
