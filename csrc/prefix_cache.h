#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "page_hash.h"
#include "page_pool.h"

namespace ts {

/// Finds sealed pages by hash, and hands out pages to write. Every operation costs O(1) expected.
class PrefixCache {
 public:
  /// `enabled` false: nothing is ever found. `pool` outlives the cache.
  PrefixCache(PagePool &pool, bool enabled);

  const PagePool &pool() const { return pool_; }
  bool enabled() const { return enabled_; }

  /// A reference to the page of that hash, if it is still here.
  std::optional<SharedPage> find(const PageHash &hash);

  /// The pages of the longest prefix of `hashes` that is here. Fetches ahead: a long prefix lies all over the index.
  std::vector<SharedPage> find_prefix(std::span<const PageHash> hashes);

  /// A page to write: a blank one, else the idle one whose last use is the longest ago, which is then forgotten.
  /// Demands pool().num_available() > 0.
  WritablePage allocate();

  /// `page` is full and `hash` names its content. Gives the page of that content from now on: `page` itself, or the
  /// one that was indexed under this hash before, and then `page` is free.
  SharedPage seal(WritablePage &&page, const PageHash &hash);

  /// Nobody finds this page any more. Its references stay good.
  void forget(const SharedPage &page);

  void check() const;  ///< asserts that index and pool agree; O(num_pages), for tests

 private:
  static constexpr int32_t kNone = -1;

  struct Entry {
    PageHash hash;
    int32_t next = kNone;  // in its bucket's chain
    bool indexed = false;
  };

  size_t bucket(const PageHash &hash) const { return hash.tail & (buckets_.size() - 1); }
  int32_t lookup(const PageHash &hash) const;
  void insert(int32_t page, const PageHash &hash);
  void erase(int32_t page);

  PagePool &pool_;
  bool enabled_;
  std::vector<Entry> entries_;    // [num_pages]
  std::vector<int32_t> buckets_;  // first page of each chain; a power of two, at least num_pages
};

}  // namespace ts
