#include "cuda_batch.h"

#include <algorithm>
#include <cstring>

#include "cache_groups.h"
#include "check.h"
#include "text.h"

namespace ts {
namespace {

constexpr uint64_t kLine = 64;
constexpr uint64_t kSizes = 4;  // num_tokens, num_seqs, num_logits, page_table_stride

uint64_t round_up(uint64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

uint64_t bytes_of(int64_t ints) { return static_cast<uint64_t>(ints) * sizeof(int32_t); }

}  // namespace

CudaBatch::CudaBatch(const Limits &limits, int32_t num_groups, int32_t width)
    : limits_(limits), num_groups_(num_groups), width_(width) {
  const auto take = [this](int64_t ints) {
    const uint64_t offset = bytes_;
    bytes_ += round_up(bytes_of(ints));
    return offset;
  };
  take(kSizes);
  token_ids_ = take(limits.max_tokens);
  positions_ = take(limits.max_tokens);
  query_start_ = take(int64_t{limits.max_seqs} + 1);
  context_len_ = take(limits.max_seqs);
  logit_rows_ = take(limits.max_seqs);
  for (int32_t group = 0; group < num_groups; ++group) slots_.push_back(take(limits.max_tokens));
  for (int32_t group = 0; group < num_groups; ++group) {
    page_tables_.push_back(take(int64_t{limits.max_seqs} * width));
  }
  ranges_.resize(static_cast<size_t>(num_groups));
}

uint64_t CudaBatch::offset(BatchArray array, int32_t group) const {
  const auto g = static_cast<size_t>(group);
  switch (array) {
    case BatchArray::sizes:
      return 0;
    case BatchArray::token_ids:
      return token_ids_;
    case BatchArray::positions:
      return positions_;
    case BatchArray::slots:
      return slots_[g];
    case BatchArray::query_start:
      return query_start_;
    case BatchArray::context_len:
      return context_len_;
    case BatchArray::page_table:
      return page_tables_[g];
    case BatchArray::logit_rows:
      return logit_rows_;
  }
  fail(TS_INTERNAL, "an array of the batch that there is not");
}

/// A group's page table, a row a sequence. What lies behind a row's own pages is never read.
void CudaBatch::pack_pages(const ts_batch &batch, int32_t group, int32_t stride, int32_t *table) const {
  const int32_t each = batch.page_table_stride / num_groups_;  // of a row of all groups
  for (int32_t seq = 0; seq < batch.num_seqs; ++seq) {
    const int32_t *row = batch.page_table + int64_t{seq} * batch.page_table_stride + int64_t{group} * each;
    const int32_t used = std::min(num_pages_for(batch.context_len[seq], limits_.page_size), each);
    std::copy_n(row, used, table + int64_t{seq} * stride);
  }
}

std::span<const CudaBatch::Range> CudaBatch::pack(const ts_batch &batch, std::span<uint8_t> memory) {
  TS_ASSERT(memory.size() >= bytes_ && batch.num_tokens <= limits_.max_tokens && batch.num_seqs <= limits_.max_seqs,
            "a batch is of its bucket");
  const auto put = [&](uint64_t offset, const int32_t *array, int64_t ints) {
    std::memcpy(memory.data() + offset, array, bytes_of(ints));
  };
  const int32_t longest = *std::max_element(batch.context_len, batch.context_len + batch.num_seqs);
  const int32_t stride = std::min(num_pages_for(longest, limits_.page_size), width_);
  const int32_t sizes[kSizes] = {batch.num_tokens, batch.num_seqs, batch.num_logits, stride};
  put(0, sizes, kSizes);
  put(token_ids_, batch.token_ids, batch.num_tokens);
  put(positions_, batch.positions, batch.num_tokens);
  put(query_start_, batch.query_start, int64_t{batch.num_seqs} + 1);
  put(context_len_, batch.context_len, batch.num_seqs);
  put(logit_rows_, batch.logit_rows, batch.num_logits);
  for (int32_t group = 0; group < num_groups_; ++group) {
    const auto g = static_cast<size_t>(group);
    put(slots_[g], batch.slots + int64_t{group} * batch.num_tokens, batch.num_tokens);
    pack_pages(batch, group, stride, reinterpret_cast<int32_t *>(memory.data() + page_tables_[g]));
    const uint64_t end = page_tables_[g] + bytes_of(int64_t{batch.num_seqs} * stride);
    const uint64_t begin = group == 0 ? 0 : page_tables_[g];  // the first has all arrays before it
    ranges_[g] = {begin, end - begin};
  }
  return ranges_;
}

}  // namespace ts
