// Collectives of ranks that are processes of one host, for tests/bench/collectives.py, which loads this library in each of them.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "collective.h"
#include "error.h"
#include "patience.h"
#include "shared_group.h"

namespace ts {
namespace {

using Kind = Collective::Kind;

RankLayout layout_of(int32_t num_ranks, uint64_t staging_bytes) {
  RankLayout layout;
  layout.num_ranks = num_ranks;
  layout.page_size = 32;
  layout.batch_ints = 1;
  layout.staging_bytes = staging_bytes;
  for (size_t rank = 0; rank < static_cast<size_t>(num_ranks); ++rank) {
    layout.num_threads[rank] = 1;
    layout.most_turns[rank] = Patience::kMostTurns;
  }
  return layout;
}

/// A rank of one thread.
struct Rank {
  Mesh mesh;
  int32_t rank;
  RankLayout layout;
  std::shared_ptr<SharedMemory> memory;
  SharedGroup group;
  TokenParts tokens;

  Rank(int32_t num_ranks, int32_t rank_, uint64_t staging_bytes, int fd)
      : mesh{{{"tp", num_ranks}}},
        rank(rank_),
        layout(layout_of(num_ranks, staging_bytes)),
        memory(fd < 0 ? std::make_shared<SharedMemory>(SharedGroup::bytes(layout))
                      : std::make_shared<SharedMemory>(fd, SharedGroup::bytes(layout))),
        group(memory, layout, rank_, {}),
        tokens(mesh, rank_, 1, 32) {}
};

/// `elements`: of a rank's part, or of an all_reduce the whole.
Collective what(Kind kind, int32_t num_ranks, int64_t elements) {
  Collective c;
  c.kind = kind;
  c.num_ranks = num_ranks;
  c.run = elements;
  return c;
}

}  // namespace
}  // namespace ts

extern "C" {

/// Rank 0 makes the memory, with fd -1; the others map it. Null if there is too little.
void *rank_open(int32_t num_ranks, int32_t rank, int64_t staging_bytes, int32_t fd) {
  try {
    return new ts::Rank(num_ranks, rank, static_cast<uint64_t>(staging_bytes), fd);
  } catch (const ts::Error &) {
    return nullptr;
  }
}

void rank_close(void *handle) { delete static_cast<ts::Rank *>(handle); }

int32_t rank_fd(void *handle) { return static_cast<ts::Rank *>(handle)->memory->fd(); }

/// Seconds of one of `times` collectives on end. kind: 0 all_reduce, 1 reduce_scatter, 2 all_gather; `elements` of f32, of the whole
/// value.
double rank_collective(void *handle, int32_t kind, const float *in, float *out, int64_t elements, int32_t times) {
  auto &here = *static_cast<ts::Rank *>(handle);
  const auto kinds = std::to_array({ts::Kind::all_reduce, ts::Kind::reduce_scatter, ts::Kind::all_gather});
  const int32_t num_ranks = here.layout.num_ranks;
  const ts::Collective what =
      ts::what(kinds.at(static_cast<size_t>(kind)), num_ranks, kind == 0 ? elements : elements / num_ranks);
  std::vector<ts::BoundCollective> halves;  // as a program's launches take them in turn
  for (const int32_t half : {0, 1}) halves.emplace_back(what, here.mesh, here.rank, &here.group, half, in, out);
  here.group.barrier();
  const auto begin = std::chrono::steady_clock::now();
  for (int32_t i = 0; i < times; ++i) halves[static_cast<size_t>(i % 2)].run(here.tokens, 0, 1);
  const auto end = std::chrono::steady_clock::now();
  here.group.barrier();
  return std::chrono::duration<double>(end - begin).count() / times;
}

}  // extern "C"
