#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "mesh.h"
#include "program.h"
#include "rank_group.h"
#include "token_parts.h"

namespace ts {

/// One collective of a program, bound to one rank's buffers and to the staging areas of all. Every thread of every rank runs it, at
/// once or in two calls.
///
/// A rank copies what others need into its staging area, all meet at the group's barrier, and each thread takes its part of the
/// output from all areas. Areas have two halves, which collectives take in turn: so one barrier each is enough, as who passes that of
/// the next has read all of this one. A large all_reduce of more than two ranks has a second step: each rank reduces a part, and
/// the others copy it, so that what a rank reads does not grow with their number.
///
/// Reductions are in f32 and in the order of ranks, whatever the threads: every rank gets the same bits.
class BoundCollective {
 public:
  /// `group` may be null if the axis has one rank. `half`: 0 and 1 in turn. counts: of a ragged_all_to_all [ranks][experts]. `is_here`:
  /// whether this rank's stage runs it; a rank of another only waits with the others.
  BoundCollective(const Collective &what, const Mesh &mesh, int32_t rank, RankGroup *group, int32_t half,
                  const void *in, void *out, const void *counts = nullptr, bool is_here = true);

  /// False if the group was aborted: then the step is over.
  bool run(const TokenParts &tokens, int thread, int num_threads) const;

  /// The same in two calls, of one that exchanges something: the first stages the input and does not wait, the second waits for what
  /// the first gave, and gives the output. Between them no other begins, nobody writes the input or uses the output.
  uint32_t start(const TokenParts &tokens, int thread, int num_threads) const;
  bool finish(uint32_t started, const TokenParts &tokens, int thread, int num_threads) const;

  /// Bytes of staging that it may need, of one half.
  static uint64_t staging_bytes(const Collective &what, const Limits &limits, const Mesh &mesh);

 private:
  /// Where the ranks' parts lie in the dim of which each has one.
  struct Parts {
    const TokenParts *tokens;  // null: equal parts of `unit`
    int32_t axis;
    int64_t unit, num_ranks;
    int64_t begin(size_t q) const {
      return unit * (tokens != nullptr ? tokens->start(axis, static_cast<int32_t>(q)) : static_cast<int64_t>(q));
    }
    int64_t size(size_t q) const { return begin(q + 1) - begin(q); }
    int64_t whole() const { return begin(static_cast<size_t>(num_ranks)); }
  };
  Parts parts(const TokenParts &tokens, int64_t unit) const;
  /// What a step makes of it.
  struct Extent {
    int64_t all;    // tokens of the step
    int64_t outer;  // of this rank
    bool in_two;    // steps
  };
  Extent extent(const TokenParts &tokens) const;
  int64_t elements(const Extent &step, const TokenParts &tokens, size_t q) const;
  const uint8_t *part_of(size_t peer) const;  ///< what the peer put into its staging area; mine is `in_`
  void put(const Extent &step, const TokenParts &tokens, int thread, int num_threads) const;
  template <class Use>
  auto with_staged(const Extent &step, const TokenParts &tokens, const Use &use) const;
  bool take(const Extent &step, const TokenParts &tokens, int thread, int num_threads) const;
  void put_range(int64_t elements, int thread, int num_threads) const;
  void receive(int64_t elements, int thread, int num_threads) const;
  StagedPart share_of_rank(const Extent &step, size_t owner, int64_t from) const;
  bool reduce_in_two(const Extent &step, int thread, int num_threads) const;
  void reduce(int64_t outer, int64_t row, int64_t begin, int64_t size, int thread, int num_threads) const;
  void gather(int64_t outer, const Parts &parts, int thread, int num_threads) const;
  void slice(int64_t outer, const Parts &parts, int thread, int num_threads) const;
  void exchange(int64_t outer, const Parts &parts, int thread, int num_threads) const;
  template <class T>
  void reduce_range(T *out, int64_t from, int64_t count) const;
  void put_rows(int thread, int num_threads) const;
  void take_by_expert(int thread, int num_threads) const;
  void take_by_token(int thread, int num_threads) const;
  template <class Body>
  void for_pieces(size_t owner, std::pair<int64_t, int64_t> range, const Body &body) const;
  void copy_rows(uint8_t *to, int64_t to_row, const uint8_t *from, int64_t from_row, int64_t count) const;
  int64_t rows_of_experts(size_t owner) const;
  int64_t rows_between(size_t from, size_t to) const;
  int64_t first_row(size_t from, size_t to) const;
  int64_t first_expert(size_t owner) const {
    return static_cast<int64_t>(owner) * what_.experts / static_cast<int64_t>(peers_.size());
  }

  const Collective what_;
  RankGroup *group_;
  int32_t half_;
  std::vector<int32_t> peers_;  // ranks that take part, in order, with this one: those on the axis; none if it does not
  size_t coordinate_;           // among them
  const uint8_t *in_;
  uint8_t *out_;
  const int32_t *counts_;
};

}  // namespace ts
