#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "launch_abi.h"
#include "program.h"

namespace ts {

/// Where a step's batch lies in the device's memory, and in the pinned memory that it is copied from. Steps of one bucket have the
/// same places, as its graph holds their addresses: sizes, the arrays of tokens and sequences, slots of each cache group, and each
/// group's page table last. A page table is packed for the step, with as many entries a row as the longest context has pages: its
/// stride is one of the sizes.
class CudaBatch {
 public:
  /// `limits`: of the bucket; `width`: entries of one group's row, at most.
  CudaBatch(const Limits &limits, int32_t num_groups, int32_t width);

  uint64_t bytes() const { return bytes_; }

  /// Where an array begins, for launches of a cache group: a multiple of 64 bytes.
  uint64_t offset(BatchArray array, int32_t group) const;

  struct Range {
    uint64_t offset = 0, bytes = 0;
  };

  /// Writes a step to `memory`, of bytes(), and says which parts of it the device needs: one for each group. O(tokens + pages of
  /// the contexts).
  std::span<const Range> pack(const ts_batch &batch, std::span<uint8_t> memory);

 private:
  void pack_pages(const ts_batch &batch, int32_t group, int32_t stride, int32_t *table) const;

  Limits limits_;
  int32_t num_groups_, width_;
  uint64_t token_ids_ = 0, positions_ = 0, query_start_ = 0, context_len_ = 0, logit_rows_ = 0;
  std::vector<uint64_t> slots_, page_tables_;  // [num_groups]
  uint64_t bytes_ = 0;
  std::vector<Range> ranges_;  // of the step
};

}  // namespace ts
