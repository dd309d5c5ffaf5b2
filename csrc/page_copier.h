#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "rank_group.h"
#include "tier.h"
#include "tier_store.h"
#include "workers.h"

namespace ts {

/// This rank's KV cache as the second tier sees it: num_layers pieces a page, [num_layers][num_pages][page_bytes].
struct KvCache {
  uint8_t *data = nullptr;
  int32_t num_layers = 0;
  int32_t num_pages = 0;  ///< of this rank: pages are numbered over all owners of sequences
  uint64_t page_bytes = 0;
  int32_t owner = 0;
};

/// Copies pages between the KV cache and the second tier. Each rank has its part of every page in a tier of its own, the same page in
/// the same slot; a copy is good if it is on all ranks.
class PageCopier {
 public:
  /// Throws as TierStore does. `group`: null for one rank. `folder`: see TierStore.
  PageCopier(const KvCache &kv, int32_t num_slots, int32_t max_copies, const std::string &folder, RankGroup *group);

  /// Makes the copies one after the other, each by all threads. Every rank calls it, with the same ones.
  void copy(std::span<const PageCopy> copies, Workers &workers);

  /// Of the last ones. With several ranks only rank 0 knows.
  bool failed(size_t copy) const { return failed_[copy] != 0; }

 private:
  bool copy_pieces(const PageCopy &copy, int thread, int num_threads);
  void tell_rank_0(size_t num_copies, int thread);

  const KvCache kv_;
  const int32_t num_slots_;
  RankGroup *const group_;
  TierStore store_;
  std::vector<uint8_t> failed_;  // [max_copies] on this rank; then, on rank 0, on any
  std::vector<int32_t> ranks_;   // all
};

}  // namespace ts
