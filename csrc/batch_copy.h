#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "batch.h"
#include "cache_groups.h"
#include "context.h"
#include "scheduled_batch.h"

namespace ts {

/// The arrays of one of two batches that may be in flight. Its rows of the page table are a copy of the scheduler's, which goes on
/// changing while the step runs. A row that belongs to the same sequence as when the copy was last used is brought up to date by
/// what has changed since.
class BatchCopy {
 public:
  BatchCopy(int32_t max_tokens, int32_t max_seqs, int32_t max_pages, int32_t num_groups, std::span<int32_t> memory);

  /// `row`: the scheduler's, of whose pages are `context`'s. `admission` says whether it is still the same sequence; `position` is
  /// that of its first token in this step: what no token from there on reads is left out.
  void copy_row(int32_t r, std::span<const int32_t> row, uint64_t admission, const Context &context,
                std::span<const CacheGroup> groups, int32_t position, int32_t page_size);

  BatchArrays arrays;
  std::vector<LogitRow> logit_rows;

 private:
  /// Of one group's part of a row.
  struct Part {
    int32_t num_settled = 0;  // entries that do not change any more, but to be left out
    int32_t num_left_out = 0;
  };

  size_t num_groups_;
  std::vector<uint64_t> admissions_;  // [max_seqs] whose pages each row has; 0: nobody's
  std::vector<Part> parts_;           // [max_seqs, num_groups]
};

}  // namespace ts
