// What a program's collectives and caches take, of one rank.
#include <algorithm>
#include <numeric>

#include "program.h"

namespace ts {
namespace {

int64_t most_tokens_over(int32_t axis, const Limits &limits, const Mesh &mesh) {
  const int32_t ranks = mesh.axes[static_cast<size_t>(axis)].size;
  return mesh.by_sequence(axis) ? limits.max_tokens : (limits.max_tokens + ranks - 1) / ranks;
}

}  // namespace

int64_t Collective::most_tokens(const Limits &limits, const Mesh &mesh) const {
  return most_tokens_over(axis, limits, mesh);
}

int64_t Collective::rows_for(const int32_t *counts, int64_t q, int64_t first, int64_t last) const {
  return std::accumulate(counts + q * experts + first, counts + q * experts + last, int64_t{0});
}

int64_t Collective::most_taken(const Limits &limits, const Mesh &mesh) const {
  return (to_experts ? most_tokens(limits, mesh) : limits.max_tokens) * top * run;
}

int64_t Collective::most_given(const Limits &limits, const Mesh &mesh) const {
  return (to_experts ? limits.max_tokens : most_tokens(limits, mesh)) * top * run;
}

int64_t Collective::most_outer(const Limits &limits, const Mesh &mesh) const {
  return outer(rows_axis < 0 ? limits.max_tokens : most_tokens_over(rows_axis, limits, mesh), limits.max_seqs);
}

int64_t Collective::in_run(int64_t mine, int64_t all) const {
  const int64_t own = tokens ? mine : 1, whole = tokens ? all : num_ranks;
  switch (kind) {
    case Kind::all_reduce:
    case Kind::send:
      return run;
    case Kind::reduce_scatter:
    case Kind::slice:
      return whole * run;
    case Kind::all_gather:
      return own * run;
    case Kind::all_to_all:
      return gathers_first ? own * part * num_ranks * run : whole * part * run;
    case Kind::ragged_all_to_all:
      break;
  }
  return run;
}

int64_t Collective::out_run(int64_t mine, int64_t all) const {
  const int64_t own = tokens ? mine : 1, whole = tokens ? all : num_ranks;
  switch (kind) {
    case Kind::all_reduce:
    case Kind::send:
      return run;
    case Kind::reduce_scatter:
    case Kind::slice:
      return own * run;
    case Kind::all_gather:
      return whole * run;
    case Kind::all_to_all:
      return gathers_first ? whole * part * run : own * part * num_ranks * run;
    case Kind::ragged_all_to_all:
      break;
  }
  return run;
}

namespace {

/// Layers of the largest group on a stage; those on no stage of their own count on each.
int32_t slabs_of_stage(const Program &program, int32_t stage) {
  std::vector<int32_t> num_layers(program.groups.size());
  for (size_t layer = 0; layer < program.layer_stages.size(); ++layer) {
    const int32_t of = program.layer_stages[layer];
    if (of != Launch::kEveryStage && of != stage) continue;
    ++num_layers[static_cast<size_t>(program.layer_groups[layer])];
  }
  return std::ranges::max(num_layers);
}

}  // namespace

int32_t Program::slab_of(int32_t layer) const {
  int32_t slab = 0;
  for (int32_t before = 0; before < layer; ++before) {
    const auto b = static_cast<size_t>(before);
    slab += layer_groups[b] == layer_groups[static_cast<size_t>(layer)] && is_here(layer_stages[b]) ? 1 : 0;
  }
  return slab;
}

int32_t Program::num_slabs() const { return slabs_of_stage(*this, stage); }

int32_t Program::most_slabs() const {
  int32_t most = num_slabs();
  for (const int32_t stage_of_layer : layer_stages) most = std::max(most, slabs_of_stage(*this, stage_of_layer));
  return most;
}

}  // namespace ts
