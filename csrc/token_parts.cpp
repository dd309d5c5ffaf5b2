#include "token_parts.h"

#include <algorithm>

#include "batch.h"
#include "text.h"

namespace ts {

TokenParts::TokenParts(const Mesh &mesh, int32_t rank, int32_t max_seqs, int64_t slots_per_owner, int32_t num_groups)
    : slots_per_owner_(slots_per_owner), groups_(static_cast<size_t>(num_groups - 1) * (mesh.axes.size() + 1)) {
  for (int32_t axis = 0; axis < static_cast<int32_t>(mesh.axes.size()); ++axis) {
    Part &part = parts_.emplace_back();
    const auto size = static_cast<size_t>(mesh.axes[static_cast<size_t>(axis)].size);
    part.coordinate = mesh.coordinate(rank, axis);
    part.by_sequence = mesh.by_sequence(axis);
    part.starts.resize(size + 1);
    if (!part.by_sequence) continue;
    part.first_seqs.resize(size + 1);
    part.query_start.resize(static_cast<size_t>(max_seqs) + 1);
  }
}

void TokenParts::set(const ts_batch &batch) {
  whole_ = batch;
  for (Part &part : parts_) {
    part.by_sequence ? share_sequences(part) : share_equally(part);
    const auto mine = static_cast<size_t>(part.coordinate);
    const int32_t first = part.starts[mine];
    part.batch.num_tokens = part.starts[mine + 1] - first;
    part.batch.token_ids = batch.token_ids + first;
    part.batch.positions = batch.positions + first;
    part.batch.slots = batch.slots + first;
  }
  const size_t each = parts_.size() + 1;
  const auto num_groups = static_cast<int32_t>(groups_.size() / each) + 1;
  for (size_t i = 0; i < groups_.size(); ++i) {
    const ts_batch &first_of = first_group(static_cast<int32_t>(i % each) - 1);
    groups_[i] = group_batch(first_of, static_cast<int32_t>(i / each) + 1, num_groups, batch.num_tokens);
  }
}

void TokenParts::share_equally(Part &part) const {
  const auto ranks = static_cast<int32_t>(part.starts.size()) - 1;
  const int32_t each = (whole_.num_tokens + ranks - 1) / ranks;
  for (int32_t r = 0; r <= ranks; ++r) part.starts[static_cast<size_t>(r)] = std::min(r * each, whole_.num_tokens);
}

void TokenParts::share_sequences(Part &part) const {
  const size_t ranks = part.starts.size() - 1;
  size_t rank = 0;  // whose first sequence is the next to be found
  for (int32_t s = 0; s < whole_.num_seqs; ++s) {
    const int64_t owner = whole_.slots[whole_.query_start[s]] / slots_per_owner_;
    if (owner + 1 < static_cast<int64_t>(rank) || owner >= static_cast<int64_t>(ranks)) {
      fail(TS_INTERNAL, "sequence ", s, " of the step has its pages on rank ", owner, " of ", ranks,
           ", after one on rank ", static_cast<int64_t>(rank) - 1, ": wanted sequences sorted by rank");
    }
    for (; rank <= static_cast<size_t>(owner); ++rank) part.first_seqs[rank] = s;
  }
  for (; rank <= ranks; ++rank) part.first_seqs[rank] = whole_.num_seqs;
  for (size_t r = 0; r <= ranks; ++r) {
    const int32_t seq = part.first_seqs[r];
    part.starts[r] = seq == whole_.num_seqs ? whole_.num_tokens : whole_.query_start[seq];
  }
  const auto mine = static_cast<size_t>(part.coordinate);
  const int32_t first = part.first_seqs[mine];
  part.batch.num_seqs = part.first_seqs[mine + 1] - first;
  for (int32_t s = 0; s <= part.batch.num_seqs; ++s) {
    part.query_start[static_cast<size_t>(s)] =
        (first + s == whole_.num_seqs ? whole_.num_tokens : whole_.query_start[first + s]) - part.starts[mine];
  }
  part.batch.query_start = part.query_start.data();
  part.batch.context_len = whole_.context_len + first;
  part.batch.page_table = whole_.page_table + static_cast<int64_t>(first) * whole_.page_table_stride;
  part.batch.page_table_stride = whole_.page_table_stride;
}

}  // namespace ts
