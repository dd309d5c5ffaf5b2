#include "batch_copy.h"

#include <algorithm>

#include "check.h"

namespace ts {

BatchCopy::BatchCopy(int32_t max_tokens, int32_t max_seqs, int32_t max_pages, int32_t num_groups,
                     std::span<int32_t> memory)
    : arrays(max_tokens, max_seqs, max_pages, num_groups, memory), num_groups_(static_cast<size_t>(num_groups)) {
  const auto seqs = static_cast<size_t>(max_seqs);
  logit_rows.reserve(seqs);
  admissions_.resize(seqs);
  parts_.resize(seqs * num_groups_);
}

void BatchCopy::copy_row(int32_t r, std::span<const int32_t> row, uint64_t admission, const Context &context,
                         std::span<const CacheGroup> groups, int32_t position, int32_t page_size) {
  const auto index = static_cast<size_t>(r);
  const bool same = admissions_[index] == admission;
  admissions_[index] = admission;
  const size_t each = row.size() / num_groups_;
  for (size_t g = 0; g < num_groups_; ++g) {
    const std::span<const int32_t> from = row.subspan(g * each, each);
    const std::span<int32_t> to = arrays.row(r).subspan(g * each, each);
    Part &part = parts_[index * num_groups_ + g];
    if (!same) part = {};
    const auto begin = static_cast<size_t>(part.num_settled);
    const auto end = static_cast<size_t>(context.num_entries(groups, g));
    TS_ASSERT(begin <= end, "a sequence that was not admitted anew keeps its pages");
    std::copy(from.begin() + static_cast<ptrdiff_t>(begin), from.begin() + static_cast<ptrdiff_t>(end),
              to.begin() + static_cast<ptrdiff_t>(begin));
    if (groups[g].recurrent()) continue;
    part.num_settled = context.num_sealed(g);
    const int32_t first = groups[g].first_page(position / page_size * page_size, page_size);
    for (; part.num_left_out < first; ++part.num_left_out) {
      to[static_cast<size_t>(part.num_left_out)] = CacheGroup::kNoPage;
    }
  }
}

}  // namespace ts
