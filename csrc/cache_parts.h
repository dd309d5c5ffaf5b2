#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "page_pool.h"
#include "prefix_cache.h"
#include "tier.h"

namespace ts {

/// The KV cache: a pool of pages and an index of them for each owner of sequences. There is one owner, unless ranks share
/// sequences out between them (dp): then each has the cache of its own sequences. Pages are numbered over all owners.
class CacheParts {
 public:
  /// `num_pages`: of each owner.
  CacheParts(int32_t num_owners, int32_t num_pages, int32_t page_size, bool prefix_cache,
             const std::vector<CacheGroup> &groups, const TierOptions &tier = {});

  int32_t num_owners() const { return static_cast<int32_t>(parts_.size()); }
  PrefixCache &of(int32_t owner) { return parts_[static_cast<size_t>(owner)]->cache; }
  const PagePool &pool(int32_t owner) const { return parts_[static_cast<size_t>(owner)]->pool; }

  /// The copies that the next step makes, in order, before all else.
  std::vector<PageCopy> take_copies();
  void end_copies(std::vector<PageCopy> &&copies);  ///< see Tier::end

  // Of all owners.
  int32_t num_blank() const;
  int32_t num_idle() const;
  int32_t num_held() const;  ///< in the second tier

  void check() const;  ///< asserts every part's invariants; O(num_pages), for tests

 private:
  struct Part {
    Part(int32_t first_page, int32_t num_pages, int32_t page_size, bool prefix_cache,
         const std::vector<CacheGroup> &groups, std::unique_ptr<Tier> tier_)
        : pool(num_pages, page_size, first_page),
          tier(std::move(tier_)),
          cache(pool, prefix_cache, groups, tier.get()) {}

    PagePool pool;
    std::unique_ptr<Tier> tier;  // none: what is evicted is lost
    PrefixCache cache;
  };
  const TierOptions tier_;
  std::vector<PageCopy> copies_;              // of the next step
  std::vector<PageCopy> spare_;               // memory for the one after
  std::vector<std::unique_ptr<Part>> parts_;  // they do not move: pages point to their pool
};

}  // namespace ts
