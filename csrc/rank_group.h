#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "file.h"
#include "tier.h"

namespace ts {

inline constexpr int32_t kMaxRanks = 256;

/// What the ranks of a run agree on before any of them loads: rank 0 decides it, all others are told.
struct RankLayout {
  int32_t num_ranks = 1;
  int32_t num_pages = 0;                         ///< of the KV cache, on every rank
  std::array<int32_t, kMaxRanks> num_threads{};  ///< of each rank
  std::array<int32_t, kMaxRanks> most_turns{};   ///< see Patience: 0 where a host's threads outnumber its cores
  std::array<int32_t, kMaxRanks> pids{};
  std::array<std::array<char, 64>, kMaxRanks> hosts{};  ///< their names, where there are several
  int32_t page_size = 0;                                ///< tokens of a page
  int32_t num_groups = 1;                               ///< of caches (cache_groups.h)
  TierOptions tier;                                     ///< on every rank
  std::array<char, 1024> offload_folder{};              ///< where it lies; empty: in memory
  uint64_t batch_ints = 0;                              ///< int32 that the batch arrays take, and copies behind them
  uint64_t staging_bytes = 0;                           ///< of one rank and one half: collectives alternate between two
};

/// "rank 1 (process 77 on host-b)", as far as it is known.
std::string rank_name(int32_t rank, int32_t pid, std::string_view host);

/// A batch in the group's batch area, or copies that are made before one: counts, and where its arrays begin, in int32 from the start
/// of the area.
struct PublishedBatch {
  int32_t num_tokens, num_seqs, num_logits, page_table_stride;
  int32_t num_copies;  ///< if not 0 there are no tokens
  /// token_ids, positions, slots, query_start, context_len, page_table, logit_rows, copies
  std::array<uint64_t, 8> arrays;
};

/// Bytes of a staging area.
struct StagedPart {
  uint64_t begin = 0, bytes = 0;
};

/// What rank peers[to] reads of the staging area of rank peers[from].
using StagedParts = std::function<StagedPart(size_t from, size_t to)>;

/// One rank's view of the ranks that run a plan together: where they wait for each other, what rank 0 publishes, and a staging area
/// each for collectives. Once one has aborted, every wait of all of them ends, and none begins.
class RankGroup {
 public:
  virtual ~RankGroup() = default;
  RankGroup(const RankGroup &) = delete;
  RankGroup &operator=(const RankGroup &) = delete;

  int32_t rank() const { return rank_; }
  const RankLayout &layout() const { return layout_; }
  std::string who(int32_t rank) const;
  int32_t most_turns() const { return layout_.most_turns[static_cast<size_t>(rank_)]; }

  /// Rank 0 has a socket to every other rank, by rank; a follower has one, to rank 0.
  std::span<const FileDescriptor> sockets() const { return sockets_; }

  // ---- collectives: every thread of every rank calls these, in the same order. False, on each thread of a rank alike, if the
  // group was aborted before it was done: then nothing is exchanged any more ----

  /// Returns once all threads of all ranks have called it.
  virtual bool barrier() = 0;

  /// Called by the threads of `peers`, in order and with this rank, when they have written to their rank's staging area. After it,
  /// what `parts` says that this rank reads of each peer's lies at staging(peer, half), until the exchange after next.
  virtual bool exchange(int32_t half, std::span<const int32_t> peers, const StagedParts &parts) = 0;

  /// The same in two calls: the first does not wait for other ranks, the second waits for what the first gave. Between them the
  /// threads call none of these but progress().
  virtual uint32_t start_exchange(int32_t half, std::span<const int32_t> peers, const StagedParts &parts) = 0;
  virtual bool finish_exchange(uint32_t started) = 0;
  virtual void progress() {
  }  ///< of one thread, now and then, between the two: who moves bytes only when called moves some

  /// What `rank` has staged; a thread writes to its own rank's alone. [staging_bytes]
  virtual uint8_t *staging(int32_t rank, int32_t half) const = 0;

  /// After the last launch of a step: nobody writes the next batch while another still reads this one.
  virtual bool end_step() = 0;

  // ---- steps: rank 0 publishes, the others wait ----

  virtual std::span<int32_t> batch_area() const = 0;  ///< where rank 0's batch arrays lie; the others only read it
  virtual void publish(const PublishedBatch &batch) = 0;
  virtual void publish_end() = 0;
  /// Follower: the next batch, or null once rank 0 has published the end. Throws as check() does.
  virtual const PublishedBatch *next() = 0;
  virtual bool ended() const = 0;  ///< rank 0 has published the end

  // ---- failure ----

  /// Ends every wait of the group. The message tells which rank is at fault and why; the first caller's stays.
  virtual void abort(std::string_view message) = 0;
  virtual bool aborted() const = 0;
  virtual std::string failure() const = 0;  ///< the message; empty while all is well
  void check() const;                       ///< throws Error (TS_LOST_RANK) with it if the group was aborted

  /// Shows that this rank runs; beats(r) changes while rank r does.
  virtual void beat() = 0;
  virtual uint32_t beats(int32_t rank) const = 0;
  /// Takes what has come from sockets()[i]. False if that is the end of it.
  virtual bool hear(size_t i) = 0;

 protected:
  RankGroup(const RankLayout &layout, int32_t rank, std::vector<FileDescriptor> sockets);

 private:
  const RankLayout layout_;
  const int32_t rank_;
  const std::vector<FileDescriptor> sockets_;
};

}  // namespace ts
