#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "page_pool.h"
#include "prefix_cache.h"

namespace ts {

/// The KV cache: a pool of pages and an index of them for each owner of sequences. There is one owner, unless ranks share
/// sequences out between them (dp): then each has the cache of its own sequences. Pages are numbered over all owners.
class CacheParts {
 public:
  /// `num_pages`: of each owner.
  CacheParts(int32_t num_owners, int32_t num_pages, int32_t page_size, bool prefix_cache,
             const std::vector<CacheGroup> &groups);

  int32_t num_owners() const { return static_cast<int32_t>(parts_.size()); }
  PrefixCache &of(int32_t owner) { return parts_[static_cast<size_t>(owner)]->cache; }
  const PagePool &pool(int32_t owner) const { return parts_[static_cast<size_t>(owner)]->pool; }

  // Of all owners.
  int32_t num_blank() const;
  int32_t num_idle() const;

  void check() const;  ///< asserts every part's invariants; O(num_pages), for tests

 private:
  struct Part {
    Part(int32_t first_page, int32_t num_pages, int32_t page_size, bool prefix_cache,
         const std::vector<CacheGroup> &groups)
        : pool(num_pages, page_size, first_page), cache(pool, prefix_cache, groups) {}

    PagePool pool;
    PrefixCache cache;
  };
  std::vector<std::unique_ptr<Part>> parts_;  // they do not move: pages point to their pool
};

}  // namespace ts
