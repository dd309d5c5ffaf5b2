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
class BatchArrays {
 public:
  /// `memory`: num_ints() int32 on a 64-byte boundary that outlive it, such as what ranks share; empty: its own.
  BatchArrays(int32_t max_tokens, int32_t max_seqs, int32_t max_pages, std::span<int32_t> memory = {});
  static size_t num_ints(int32_t max_tokens, int32_t max_seqs, int32_t max_pages);
  BatchArrays(const BatchArrays &) = delete;
  BatchArrays &operator=(const BatchArrays &) = delete;

  std::span<int32_t> row(int32_t seq);  ///< [max_pages] of the page table
  void move_row(int32_t from, int32_t to, int32_t num_pages);

  void clear();
  void add_sequence(int32_t context_len);  ///< the next row's; its tokens follow
  void add_token(int32_t token, int32_t position, Slot slot);
  void want_logits();  ///< of the token added last

  const ts_batch &view() const { return view_; }  ///< whole as soon as every sequence has a token

 private:
  int32_t max_seqs_;
  int32_t max_pages_;
  std::vector<int32_t> own_;
  std::span<int32_t> token_ids_;    // [max_tokens]
  std::span<int32_t> positions_;    // [max_tokens]
  std::span<int32_t> slots_;        // [max_tokens]
  std::span<int32_t> query_start_;  // [max_seqs + 1]
  std::span<int32_t> context_len_;  // [max_seqs]
  std::span<int32_t> logit_rows_;   // [max_seqs]
  std::span<int32_t> page_table_;   // [max_seqs, max_pages]
  ts_batch view_{};
};

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
  TS_ASSERT(at < token_ids_.size(), "more tokens than a step may hold");
  token_ids_[at] = token;
  positions_[at] = position;
  slots_[at] = slot.value();
  query_start_[static_cast<size_t>(view_.num_seqs)] = ++view_.num_tokens;
}

inline void BatchArrays::want_logits() {
  TS_ASSERT(view_.num_logits < max_seqs_, "more rows of logits than a step may hold");
  logit_rows_[static_cast<size_t>(view_.num_logits++)] = view_.num_tokens - 1;
}

}  // namespace ts
