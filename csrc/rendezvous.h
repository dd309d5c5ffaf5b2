#pragma once

#include <sched.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "file.h"
#include "meeting_place.h"
#include "rank_group.h"
#include "sha256.h"
#include "shared_memory.h"

namespace ts {

/// How the processes of one run find each other.
struct RendezvousOptions {
  int32_t rank = 0;
  int32_t num_ranks = 1;
  MeetingPlace *place = nullptr;
  bool share_memory = true;  ///< all are on one host, and rank 0 hands out memory for all
  int32_t timeout_ms = 0;    ///< how long a rank waits for the others
  std::vector<int32_t>
      children;  ///< rank 0's, of whom it started itself: [num_ranks] process ids, 0 for others; or empty
};

/// What a rank says of itself when it comes.
struct RankHello {
  Digest seal{};                  ///< of its plan: all must have the same
  std::array<char, 32> target{};  ///< so too
  int32_t num_threads = 0;        ///< 0: its share of the cores
  int32_t usable_cores = 1;       ///< of this process
  cpu_set_t cores{};              ///< those that it may run on
  std::array<char, 64> host{};    ///< where it runs
};

RankHello make_hello(const Digest &seal, std::string_view target, int32_t num_threads);

/// The ranks of a run, met: what they agreed on, and the memory that they share, if they do.
struct Company {
  RankLayout layout;
  std::shared_ptr<SharedMemory> memory;
  std::vector<FileDescriptor> sockets;  ///< see RankGroup; they tell at once when a rank dies
};

/// Rank 0 waits until all others have come, decides each one's threads, and may share memory with them. `layout` holds what it
/// knows already. Throws Error (TS_LOST_RANK) naming who did not come in time, died on the way, or does not fit, and tells all who
/// came; TS_BAD_REQUEST if another run has the place.
Company lead(const RendezvousOptions &options, const RankHello &mine, RankLayout layout);

/// Another rank comes to rank 0, and waits until all have come. Throws Error (TS_LOST_RANK) if that does not happen in time.
Company join(const RendezvousOptions &options, const RankHello &mine);

/// For rank 0 and tests: each rank's threads, and how long they spin, from what the ranks said. Ranks that may run on the
/// same cores of a host share them.
void share_cores(const std::vector<RankHello> &hellos, RankLayout &layout);

}  // namespace ts
