#include "batch.h"

#include <algorithm>
#include <cstddef>

#include "check.h"

namespace ts {

namespace {

constexpr size_t kLine = 16;  // int32 of a cache line: where each array begins

size_t round_up(size_t count) { return (count + kLine - 1) / kLine * kLine; }

}  // namespace

size_t BatchArrays::num_ints(int32_t max_tokens, int32_t max_seqs, int32_t max_pages, int32_t num_groups) {
  const auto tokens = static_cast<size_t>(max_tokens), seqs = static_cast<size_t>(max_seqs);
  const auto groups = static_cast<size_t>(num_groups);
  return 2 * round_up(tokens) + round_up(groups * tokens) + round_up(seqs + 1) + 2 * round_up(seqs) +
         round_up(seqs * groups * static_cast<size_t>(max_pages));
}

BatchArrays::BatchArrays(int32_t max_tokens, int32_t max_seqs, int32_t max_pages, int32_t num_groups,
                         std::span<int32_t> memory)
    : max_seqs_(max_seqs),
      max_pages_(max_pages),
      num_groups_(num_groups),
      own_(memory.empty() ? num_ints(max_tokens, max_seqs, max_pages, num_groups) : 0) {
  if (memory.empty()) memory = own_;
  TS_ASSERT(memory.size() >= num_ints(max_tokens, max_seqs, max_pages, num_groups),
            "the memory is too small for a batch");
  std::ranges::fill(memory, 0);
  const auto take = [&](size_t count) {
    const std::span<int32_t> taken = memory.first(count);
    memory = memory.subspan(round_up(count));
    return taken;
  };
  const auto tokens = static_cast<size_t>(max_tokens), seqs = static_cast<size_t>(max_seqs);
  const auto groups = static_cast<size_t>(num_groups);
  token_ids_ = take(tokens);
  positions_ = take(tokens);
  slots_ = take(groups * tokens);
  query_start_ = take(seqs + 1);
  context_len_ = take(seqs);
  logit_rows_ = take(seqs);
  page_table_ = take(seqs * groups * static_cast<size_t>(max_pages));
  view_.page_table_stride = num_groups * max_pages;
  view_.token_ids = token_ids_.data();
  view_.positions = positions_.data();
  view_.slots = slots_.data();
  view_.query_start = query_start_.data();
  view_.context_len = context_len_.data();
  view_.page_table = page_table_.data();
  view_.logit_rows = logit_rows_.data();
}

std::span<int32_t> BatchArrays::row(int32_t seq) {
  TS_ASSERT(seq >= 0 && seq < max_seqs_, "the page table has no such row");
  const auto stride = static_cast<size_t>(num_groups_) * static_cast<size_t>(max_pages_);
  return page_table_.subspan(static_cast<size_t>(seq) * stride, stride);
}

void BatchArrays::move_row(int32_t from, int32_t to, int32_t num_pages) {
  for (int32_t group = 0; group < num_groups_; ++group) {
    const auto begin = static_cast<size_t>(group) * static_cast<size_t>(max_pages_);
    const std::span<int32_t> source = row(from).subspan(begin, static_cast<size_t>(num_pages));
    std::copy(source.begin(), source.end(), row(to).begin() + static_cast<ptrdiff_t>(begin));
  }
}

void BatchArrays::clear(int32_t num_tokens) {
  TS_ASSERT(num_tokens <= static_cast<int32_t>(token_ids_.size()), "more tokens than a step may hold");
  num_tokens_ = num_tokens;
  view_.num_tokens = 0;
  view_.num_seqs = 0;
  view_.num_logits = 0;
}

}  // namespace ts
