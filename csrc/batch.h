#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "check.h"
#include "launch_abi.h"
#include "page.h"

namespace ts {

/// Owns the memory behind a ts_batch. The page table persists: its rows [0, num_seqs) are those of the running
/// sequences, and change only where a sequence gets a page or moves to another row. The other arrays are written anew
/// each step. Nothing allocates after construction.
///
/// With several cache groups (cache_groups.h) a row of the page table is an equal part of max_pages for each, in order, and `slots`
/// has T of the first group, then T of the next: what one group's launches see is group_batch().
class BatchArrays {
 public:
  /// `memory`: num_ints() int32 on a 64-byte boundary that outlive it, such as what ranks share; empty: its own.
  /// `max_pages`: of one sequence in one group.
  BatchArrays(int32_t max_tokens, int32_t max_seqs, int32_t max_pages, int32_t num_groups = 1,
              std::span<int32_t> memory = {});
  static size_t num_ints(int32_t max_tokens, int32_t max_seqs, int32_t max_pages, int32_t num_groups);
  BatchArrays(const BatchArrays &) = delete;
  BatchArrays &operator=(const BatchArrays &) = delete;

  std::span<int32_t> row(int32_t seq);  ///< [num_groups, max_pages] of the page table
  void move_row(int32_t from, int32_t to, int32_t num_pages);

  void clear(int32_t num_tokens);          ///< of the step that follows
  void add_sequence(int32_t context_len);  ///< the next row's; its tokens follow
  void add_token(int32_t token, int32_t position, Slot slot);
  static constexpr int32_t kToCome = -1;                    ///< a token that the batch before gives
  void set_token(int32_t token, int32_t value);             ///< in place of kToCome
  void want_logits();                                       ///< of the token added last
  void set_slot(int32_t group, int32_t token, Slot slot) {  ///< in a group behind the first
    TS_ASSERT(token < view_.num_tokens, "a token's slots follow it");
    slots_[static_cast<size_t>(group) * static_cast<size_t>(num_tokens_) + static_cast<size_t>(token)] = slot.value();
  }
  int32_t num_tokens() const { return view_.num_tokens; }  ///< added so far

  const ts_batch &view() const { return view_; }  ///< whole as soon as every sequence has a token

 private:
  int32_t max_seqs_;
  int32_t max_pages_;
  int32_t num_groups_;
  int32_t num_tokens_ = 0;  // of the step, once it is whole
  std::vector<int32_t> own_;
  std::span<int32_t> token_ids_;    // [max_tokens]
  std::span<int32_t> positions_;    // [max_tokens]
  std::span<int32_t> slots_;        // [num_groups, num_tokens]
  std::span<int32_t> query_start_;  // [max_seqs + 1]
  std::span<int32_t> context_len_;  // [max_seqs]
  std::span<int32_t> logit_rows_;   // [max_seqs]
  std::span<int32_t> page_table_;   // [max_seqs, num_groups, max_pages]
  ts_batch view_{};
};

/// What launches of one cache group see of a step whose first group's batch is `batch`, or a rank's part of it.
/// `num_tokens`: of the whole step.
inline ts_batch group_batch(ts_batch batch, int32_t group, int32_t num_groups, int32_t num_tokens) {
  batch.slots += int64_t{group} * num_tokens;
  batch.page_table += int64_t{group} * (batch.page_table_stride / num_groups);
  return batch;
}

inline void BatchArrays::add_sequence(int32_t context_len) {
  const auto seq = static_cast<size_t>(view_.num_seqs);
  TS_ASSERT(view_.num_seqs < max_seqs_, "more sequences than a step may hold");
  TS_ASSERT(seq == 0 || query_start_[seq] > query_start_[seq - 1], "a sequence has no token in this step");
  context_len_[seq] = context_len;
  query_start_[seq + 1] = view_.num_tokens;
  ++view_.num_seqs;
}

inline void BatchArrays::add_token(int32_t token, int32_t position, Slot slot) {
  const auto at = static_cast<size_t>(view_.num_tokens);
  TS_ASSERT(view_.num_tokens < num_tokens_, "more tokens than the step has");
  token_ids_[at] = token;
  positions_[at] = position;
  slots_[at] = slot.value();
  query_start_[static_cast<size_t>(view_.num_seqs)] = ++view_.num_tokens;
}

inline void BatchArrays::set_token(int32_t token, int32_t value) {
  TS_ASSERT(token >= 0 && token < view_.num_tokens && token_ids_[static_cast<size_t>(token)] == kToCome,
            "only what is still to come is filled in, once");
  token_ids_[static_cast<size_t>(token)] = value;
}

inline void BatchArrays::want_logits() {
  TS_ASSERT(view_.num_logits < max_seqs_, "more rows of logits than a step may hold");
  logit_rows_[static_cast<size_t>(view_.num_logits++)] = view_.num_tokens - 1;
}

}  // namespace ts
