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

int32_t Program::layers_before(int32_t layer) const {
  const auto end = layer_stages.begin() + layer;
  return static_cast<int32_t>(std::count_if(layer_stages.begin(), end, [this](int32_t s) { return is_here(s); }));
}

int32_t Program::most_layers() const {
  const auto everywhere = static_cast<int32_t>(std::ranges::count(layer_stages, Launch::kEveryStage));
  int32_t most = everywhere;
  for (const int32_t stage : layer_stages) {
    if (stage == Launch::kEveryStage) continue;
    most = std::max(most, everywhere + static_cast<int32_t>(std::ranges::count(layer_stages, stage)));
  }
  return most;
}

}  // namespace ts
