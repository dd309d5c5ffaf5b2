#pragma once

#include <cstdint>
#include <vector>

#include "launch_abi.h"
#include "mesh.h"

namespace ts {

/// Who has which tokens of a step, where they are sharded over an axis of the mesh: `token_starts` of tscompile/mesh.py, for all
/// launches of the step alike. Over an axis by sequence (dp) the sequences are sorted by the rank whose part of the cache they
/// have their pages in; over any other, ranks have equal parts, ceil(tokens / ranks), the last ones shorter or empty.
///
/// A rank's part of the batch is a batch of its own, `of(axis)`, for kernels that work on it: its tokens, and over an axis by
/// sequence its sequences. Nothing allocates after construction.
class TokenParts {
 public:
  static constexpr int32_t kWhole = -1;  ///< no axis: all tokens

  /// `slots_per_owner`: of the cache, those of one coordinate of an axis by sequence.
  /// `num_groups`: of caches (cache_groups.h).
  TokenParts(const Mesh &mesh, int32_t rank, int32_t max_seqs, int64_t slots_per_owner, int32_t num_groups = 1);
  TokenParts(const TokenParts &) = delete;
  TokenParts &operator=(const TokenParts &) = delete;

  /// Before each step. O(sequences). Throws Error (TS_INTERNAL) if sequences are not sorted by their owner.
  void set(const ts_batch &batch);

  /// The first token of a coordinate; of the one past the last, the number of tokens.
  int64_t start(int32_t axis, int32_t coordinate) const {
    return parts_[static_cast<size_t>(axis)].starts[static_cast<size_t>(coordinate)];
  }

  /// What this rank has over an axis, or the whole batch. The address stays. Of a part in equal parts only the arrays of tokens may
  /// be read. `group`: whose slots and page table.
  const ts_batch &of(int32_t axis, int32_t group = 0) const {
    return group == 0 ? first_group(axis)
                      : groups_[static_cast<size_t>(group - 1) * (parts_.size() + 1) + static_cast<size_t>(axis + 1)];
  }

 private:
  struct Part {
    int32_t coordinate = 0;
    bool by_sequence = false;
    std::vector<int32_t> starts;       // [ranks + 1] tokens
    std::vector<int32_t> first_seqs;   // [ranks + 1] sequences, by sequence
    std::vector<int32_t> query_start;  // [max_seqs + 1] of this rank's, by sequence
    ts_batch batch{};
  };

  const ts_batch &first_group(int32_t axis) const {
    return axis == kWhole ? whole_ : parts_[static_cast<size_t>(axis)].batch;
  }
  void share_equally(Part &part) const;
  void share_sequences(Part &part) const;

  const int64_t slots_per_owner_;
  std::vector<Part> parts_;  // an axis each
  ts_batch whole_{};
  std::vector<ts_batch> groups_;  // [num_groups - 1, 1 + axes] the same, of the groups behind the first
};

}  // namespace ts
