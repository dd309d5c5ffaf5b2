#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "cache_groups.h"
#include "engine.h"
#include "hash_index.h"
#include "huge_vector.h"
#include "page_hash.h"
#include "page_pool.h"
#include "tier.h"

namespace ts {

/// Why a prompt was not found any further, and from which token on.
struct Miss {
  ts_miss why = TS_MISS_NONE;
  int32_t at = 0;
};

/// Finds sealed pages by hash, and hands out pages to write. Every operation costs O(1) expected.
class PrefixCache {
 public:
  /// `enabled` false: nothing is ever found. `groups`: whose pages these are; their hashes differ (PageHash::of_group). `tier`:
  /// keeps what is evicted; null: it is lost. Pool and tier outlive the cache.
  PrefixCache(PagePool &pool, bool enabled, std::vector<CacheGroup> groups = {CacheGroup{}}, Tier *tier = nullptr);

  const PagePool &pool() const { return pool_; }
  bool enabled() const { return enabled_; }
  std::span<const CacheGroup> groups() const { return groups_; }
  Tier *tier() { return tier_; }
  bool holds(const PageHash &hash) const { return enabled_ && pages_.find(hash) != kNone; }

  /// A reference to the page of that hash, if it is still here.
  std::optional<SharedPage> find(const PageHash &hash);

  /// The pages of the longest prefix of `hashes` that is here. Fetches ahead: a long prefix lies all over the index.
  std::vector<SharedPage> find_prefix(std::span<const PageHash> hashes);

  /// A page to write: a blank one, else an idle one, which is then forgotten: of those that were not found again since they
  /// were written the one whose last use is the longest ago, else of the others.
  /// Demands pool().num_available() > 0.
  WritablePage allocate();

  /// `page` is full and `hash` names its content. Gives the page of that content from now on: `page` itself, or the
  /// one that was indexed under this hash before, and then `page` is free, or goes to `duplicates`. Its tokens and its parent's hash
  /// explain misses, if they are given.
  SharedPage seal(WritablePage &&page, const PageHash &hash, const PageHash &parent = {},
                  std::span<const int32_t> tokens = {}, std::vector<WritablePage> *duplicates = nullptr);

  /// Why the page named `hash`, which continues `parent`, is not here. `at` counts from the page's first token: how many of
  /// `tokens` the page has in common with the one that was sealed last behind the same parent. If it is here after all, but other
  /// groups lack what it takes to go on behind it: evicted. O(page_size).
  Miss explain(const PageHash &hash, const PageHash &parent, std::span<const int32_t> tokens) const;

  /// Nobody finds a page of that hash any more, here or in the second tier. Its references stay good.
  void forget(const PageHash &hash);

  void check() const;  ///< asserts that index and pool agree; O(num_pages), for tests

 private:
  static constexpr int32_t kNone = HashIndex::kNone;

  struct Origin {
    PageHash parent;
    int32_t last_child = kNone;  // of the pages that continue this one; it may have been evicted since
  };

  size_t first(const PageHash &root) const { return root.head & (firsts_.size() - 1); }
  void remember(const PageHash &hash);
  void prefetch_eviction() const;

  PagePool &pool_;
  bool enabled_;
  std::vector<CacheGroup> groups_;
  Tier *tier_;
  HashIndex pages_;              // [num_pages] by id
  HashIndex evicted_;            // [num_pages] what was evicted last
  int32_t next_evicted_ = 0;     // where in evicted_ the next one goes
  HugeVector<Origin> origins_;   // [num_pages]
  HugeVector<int32_t> tokens_;   // [num_pages, page_size] of indexed pages
  std::vector<int32_t> firsts_;  // last child of a root, by its hash
};

}  // namespace ts
