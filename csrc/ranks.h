#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cache_sizes.h"
#include "plan.h"
#include "program.h"
#include "rank_group.h"
#include "rank_watch.h"

namespace ts {

/// This process's place among the ranks that run a plan together.
struct RankOptions {
  int32_t rank = 0;
  int32_t timeout_ms = 0;   ///< how long a rank waits for others that do not come, or do not move; 0: 60,000
  std::string rendezvous;   ///< on one host: a name that the ranks of this run share, and no other of this user has
  int32_t num_here = 0;     ///< ranks of the run on this host; 0: all. With fewer, MPI is between them
  std::string mpi_library;  ///< see Mpi
  std::vector<int32_t> children;  ///< rank 0's: see RendezvousOptions
};

/// The other ranks, met: what binds them, and the watch over them.
struct Ranks {
  std::shared_ptr<RankGroup> group;
  std::unique_ptr<RankWatch> watch;
};

/// Meets the other ranks of the plan's mesh: rank 0 tells them `sizes`. Throws Error (TS_LOST_RANK, TS_BAD_REQUEST).
Ranks meet_ranks(const Plan &plan, const Program &program, const RankOptions &options, int32_t num_threads,
                 const CacheSizes &sizes);

}  // namespace ts
