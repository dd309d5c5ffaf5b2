#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "patience.h"
#include "shared_memory.h"

namespace ts {

inline constexpr int32_t kMaxRanks = 256;

/// What the ranks of one host agree on before any of them loads: rank 0 decides it, all others are told.
struct RankLayout {
  int32_t num_ranks = 1;
  int32_t num_pages = 0;                         ///< of the KV cache, on every rank
  int32_t most_turns = 0;                        ///< see Patience: 0 where the ranks' threads outnumber the cores
  std::array<int32_t, kMaxRanks> num_threads{};  ///< of each rank
  std::array<int32_t, kMaxRanks> pids{};
  uint64_t batch_ints = 0;     ///< int32 that the batch arrays take
  uint64_t staging_bytes = 0;  ///< of one rank and one half: collectives alternate between two
};

/// A batch in shared memory: counts, and where its arrays begin, in int32 from the start of the area.
struct SharedBatch {
  int32_t num_tokens, num_seqs, num_logits, page_table_stride;
  std::array<uint64_t, 7> arrays;  ///< token_ids, positions, slots, query_start, context_len, page_table, logit_rows
};

/// One rank's view of the memory that all ranks of a host share: where they wait for each other, what rank 0 publishes, and a
/// staging area each for collectives. Once one has aborted, every wait of all of them ends, and none begins.
class RankGroup {
 public:
  /// Bytes that a layout takes.
  static uint64_t bytes(const RankLayout &layout);

  /// `memory` is of that size, zeroed, and the same for all ranks.
  RankGroup(std::shared_ptr<SharedMemory> memory, const RankLayout &layout, int32_t rank);
  RankGroup(const RankGroup &) = delete;
  RankGroup &operator=(const RankGroup &) = delete;

  int32_t rank() const { return rank_; }
  const RankLayout &layout() const { return layout_; }

  /// Every thread of every rank calls it; returns once all have. False, on each of them alike, if the group was aborted before that:
  /// then no barrier is passed any more.
  bool barrier();

  // ---- steps: rank 0 publishes, the others wait ----

  std::span<int32_t> batch_area() const;  ///< where rank 0's batch arrays lie; the others only read it
  void publish(const SharedBatch &batch);
  void publish_end();
  /// Follower: the next batch, or null once rank 0 has published the end. Throws as check() does.
  const SharedBatch *next();

  // ---- failure ----

  /// Ends every wait of the group. The message tells which rank is at fault and why; the first caller's stays.
  void abort(std::string_view message);
  bool aborted() const;
  std::string failure() const;  ///< the message; empty while all is well
  void check() const;           ///< throws Error (TS_LOST_RANK) with it if the group was aborted
  bool ended() const;           ///< rank 0 has published the end

  /// Shows that this rank runs; beats(r) changes while rank r does.
  void beat();
  uint32_t beats(int32_t rank) const;

  uint8_t *staging(int32_t rank, int32_t half) const;  ///< [staging_bytes]

 private:
  struct Header;
  void announce();

  std::shared_ptr<SharedMemory> memory_;
  const RankLayout layout_;
  const int32_t rank_;
  Header *header_;
  uint32_t num_threads_ = 0;  // of all ranks
  uint32_t step_ = 0;         // the last one seen
  Patience patience_;         // of this process
};

}  // namespace ts
