#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cache_groups.h"
#include "plan.h"

namespace ts {

/// The limits that a program was arranged for; the scheduler never exceeds them.
struct Limits {
  int32_t max_tokens = 0;   ///< T of a step
  int32_t max_seqs = 0;     ///< S of a step
  int32_t max_context = 0;  ///< tokens of one sequence
  int32_t page_size = 0;    ///< tokens of a page
  int32_t vocab_size = 0;
};

/// A range of the arena, in bytes. Buffers whose lifetimes do not overlap may share memory.
struct Buffer {
  std::string name;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

/// One argument of a launch. A kernel of a GPU is given arrays of the batch (BatchArray), and nulls, in the same way.
struct Argument {
  enum class Kind : uint8_t { buffer, weight, kv, batch, null };
  Kind kind = Kind::buffer;
  int32_t index = 0;                ///< of the buffer, of the layer, or of the batch's array
  const uint8_t *weight = nullptr;  ///< the entry's bytes, in the mapped file
  std::string entry = {};           ///< the weight's, of this rank
};

/// The arrays of a batch (launch_abi.h), as a GPU's kernels take them; sizes are its first four numbers.
enum class BatchArray : uint8_t {
  sizes,
  token_ids,
  positions,
  slots,
  query_start,
  context_len,
  page_table,
  logit_rows
};

/// A kernel of a GPU target: its cubin within tsp/kernels/<target>, what a launch asks for, and how parameters are packed.
struct GpuKernel {
  struct Param {
    uint32_t offset = 0, bytes = 0;
  };
  std::string name;
  uint64_t offset = 0, bytes = 0;
  uint32_t threads = 0;       ///< of a thread block
  uint32_t shared_bytes = 0;  ///< dynamic, of a thread block
  uint32_t registers = 0;     ///< of a thread
  std::vector<Param> params;

  /// Bytes of all parameters together.
  uint32_t param_bytes() const { return params.empty() ? 0 : params.back().offset + params.back().bytes; }
};

/// What a collective launch does over the ranks of one axis of the mesh. With n ranks, r the own coordinate, and a value seen as
/// [outer][...], outer = rows * times:
///   all_reduce      out[o][e] = in_0[o][e] + in_1[o][e] + ..., in the order of ranks (or their max)
///   reduce_scatter  out[o][e] = in_0[o][r][e] + in_1[o][r][e] + ...
///   all_gather      out[o][q][e] = in_q[o][e]
///   slice           out[o][e] = in[o][r][e]
///   send            out[o][e] of the rank at coordinate dst = in[o][e] of the one at src; the others do nothing
///   all_to_all      of two dims, one is gathered and the other split: out[o][q][p][e] = in_q[o][p][r][e] if the first is
///                   gathered, out[o][p][q][e] = in_q[o][r][p][e] if the second is; p < part
///   ragged_all_to_all  rows of routes, of `run` elements, from the ranks of their tokens to those of their experts, or back. With
///                   counts[q][x] rows of rank q's tokens for expert x, of which each rank has an equal share in order, rows lie
///                   by expert on the ranks of their tokens; on those of their experts by expert, then by their tokens' rank
/// The dim of ranks' parts, [q][e] above and of an all_to_all [q][p], may be ragged: where `tokens`, a rank's part of it is its
/// tokens of the step (token_parts.h), and `run` (of an all_to_all `part`) that of one token.
struct Collective {
  enum class Kind : uint8_t { all_reduce, reduce_scatter, all_gather, all_to_all, slice, send, ragged_all_to_all };
  enum class Reduce : uint8_t { sum, max };
  enum class Rows : uint8_t { one, tokens, logits };
  Kind kind = Kind::all_reduce;
  Reduce reduce = Reduce::sum;
  Rows rows = Rows::one;
  int32_t rows_axis = -1;     ///< if rows are tokens, and those of this rank's part over an axis: which
  bool tokens = false;        ///< ranks' parts are their tokens
  bool gathers_first = true;  ///< of an all_to_all's two dims
  int32_t axis = 0;           ///< of the mesh
  int32_t num_ranks = 1;      ///< on it
  int32_t src = 0, dst = 0;   ///< of a send
  int32_t element_bytes = 4;
  bool integers = false;  ///< a reduction's elements are i32, else f32
  int64_t times = 1;
  int64_t part = 1;         ///< of an all_to_all: runs of one rank in its first dim
  int64_t run = 1;          ///< elements e of one rank
  int64_t experts = 0;      ///< of a ragged_all_to_all: of all ranks on the axis together
  int64_t top = 0;          ///< the most rows of one token
  bool to_experts = false;  ///< or to tokens

  /// Whether ranks have something for each other, and so meet for it.
  bool exchanges() const { return num_ranks > 1 && kind != Kind::slice; }
  int64_t outer(int64_t num_tokens, int64_t num_logits) const {
    return times * (rows == Rows::tokens ? num_tokens : rows == Rows::logits ? num_logits : 1);
  }
  /// Elements of an input and an output for each of outer, if a rank has `mine` of `all` tokens.
  int64_t in_run(int64_t mine, int64_t all) const;
  int64_t out_run(int64_t mine, int64_t all) const;
  /// Rows that rank q's tokens have for experts first..last - 1.
  int64_t rows_for(const int32_t *counts, int64_t q, int64_t first, int64_t last) const;
  /// The most elements that a ragged_all_to_all takes and gives.
  int64_t most_taken(const Limits &limits, const Mesh &mesh) const;
  int64_t most_given(const Limits &limits, const Mesh &mesh) const;
  /// The most that a step within the limits has: tokens of one rank over the axis, and outer.
  int64_t most_tokens(const Limits &limits, const Mesh &mesh) const;
  int64_t most_outer(const Limits &limits, const Mesh &mesh) const;
};

/// A kernel's call, or a collective: at once, or in two launches, of which the first does not wait for other ranks, and the last gives
/// the output. Launches between them run meanwhile.
struct Launch {
  enum class Phase : uint8_t { whole, start, finish };
  static constexpr int32_t kEveryStage = -1;
  std::string kernel;  ///< symbol in the target's shared object, or its kernels; empty for a collective
  std::array<uint32_t, 3> grid = {1, 1, 1};  ///< of a GPU: thread blocks
  int32_t stage = kEveryStage;               ///< whose ranks alone run it
  int32_t tokens_axis = -1;  ///< a kernel's: it sees this rank's part of the batch over that axis; -1: all of it
  int32_t group = 0;         ///< a kernel's that takes layers' caches: their group, whose slots and page table it sees
  std::string op;            ///< what it computes, for messages and profiles
  /// A collective's: its input, of a ragged_all_to_all the counts, and its output, which is a buffer apart from the others.
  std::vector<Argument> arguments;
  std::optional<Collective> collective;
  Phase phase = Phase::whole;  ///< a collective's; a finish is in all else what its start is
};

/// What steps of up to limits.max_tokens tokens run, and of more than the bucket before it.
struct Bucket {
  Limits limits;  ///< the program's, for fewer tokens and so maybe fewer sequences
  std::vector<Launch> launches;
  int32_t logits_buffer = 0;
  int64_t logits_stride = 0;  ///< f32 elements from one row to the next
};

/// What the steps of a target run, checked against the plan it came from.
struct Program {
  std::string target;
  int32_t rank = 0;   ///< whose weights the arguments are
  int32_t stage = 0;  ///< of the pipeline, that the rank runs
  Limits limits;
  uint64_t arena_bytes = 0;
  std::vector<Buffer> buffers;
  int32_t num_layers = 0;             ///< of the KV cache
  std::vector<int32_t> layer_stages;  ///< [num_layers] the stage whose ranks alone have the layer's cache
  std::vector<CacheGroup> groups;     ///< of layers
  std::vector<int32_t> layer_groups;  ///< [num_layers]
  uint64_t page_bytes = 0;            ///< of one layer's page
  std::vector<Bucket> buckets;        ///< the last one's limits are the program's
  std::map<std::string, GpuKernel, std::less<>> kernels;  ///< of a GPU target; a CPU's are symbols

  bool is_here(int32_t of_stage) const { return of_stage == Launch::kEveryStage || of_stage == stage; }

  // A page of the pool belongs to one group at a time, and holds a part for each layer of it that the rank has: memory is as many
  // slabs of num_pages * page_bytes as the largest group has layers, and a group's i-th layer lies in the i-th.
  int32_t slab_of(int32_t layer) const;
  int32_t num_slabs() const;   ///< that this rank has
  int32_t most_slabs() const;  ///< that any rank has
};

/// Parses `tsp/program/<target>` for one rank of the plan's mesh, and checks all of it: ABI, limits against the model, buffers against
/// the arena, arguments against buffers, weights and layers, collectives against mesh and buffers. Throws Error (TS_BAD_PLAN) with
/// the place and both numbers.
Program parse_program(const Plan &plan, std::string_view target, int32_t rank = 0);

}  // namespace ts
