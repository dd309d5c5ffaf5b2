#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "memory.h"
#include "mpi.h"
#include "patience.h"
#include "rank_group.h"

namespace ts {

/// Ranks of several hosts. What a rank has staged goes to those who read it as messages of MPI, and lies in this process at the same place
/// of a staging area of the same size; so collectives read what they read in shared memory, and add in the same order. A batch goes
/// out as a message to each rank. Sockets to rank 0, apart from MPI, carry beats and why the group was aborted, and show who died.
///
/// Who waits for MPI polls, and looks at the group's state between polls: so nobody waits for a rank that is gone.
class MpiGroup : public RankGroup {
 public:
  MpiGroup(std::shared_ptr<Mpi> mpi, const RankLayout &layout, int32_t rank, std::vector<FileDescriptor> sockets);
  ~MpiGroup() override;

  bool barrier() override;
  bool exchange(int32_t half, std::span<const int32_t> peers, const StagedParts &parts) override;
  uint32_t start_exchange(int32_t half, std::span<const int32_t> peers, const StagedParts &parts) override;
  bool finish_exchange(uint32_t started) override;
  void progress() override;
  uint8_t *staging(int32_t rank, int32_t half) const override;
  bool end_step() override { return !aborted(); }  // a batch is a message: every rank has its own

  std::span<int32_t> batch_area() const override;
  void publish(const PublishedBatch &batch) override;
  void publish_end() override;
  const PublishedBatch *next() override;
  bool ended() const override { return ended_.load(); }

  void abort(std::string_view message) override;
  bool aborted() const override { return aborted_.load(std::memory_order_acquire); }
  std::string failure() const override;
  void beat() override;
  uint32_t beats(int32_t rank) const override;
  bool hear(size_t i) override;

 private:
  bool together(const std::function<bool()> &job);
  bool peers_live();
  bool post(int32_t half, std::span<const int32_t> peers, const StagedParts &parts);
  bool complete(std::span<Mpi::Request> requests);
  bool stop(int code);
  void hear_message(std::string &heard);
  size_t pack(const PublishedBatch &batch);
  void unpack();

  const std::shared_ptr<Mpi> mpi_;
  Memory staging_;
  Memory batch_;
  Memory message_;                      // the batch as it travels
  std::vector<int32_t> rows_;           // rank 0: the page table as the others have it
  PublishedBatch published_{};          // a follower's
  std::vector<Mpi::Request> requests_;  // of the exchange under way
  int progressed_ = 0;                  // a code: what MPI said of it meanwhile

  // This process's threads, before and after one of them exchanges.
  Patience patience_;
  std::atomic<uint32_t> num_arrived_ = 0;
  std::atomic<uint32_t> round_ = 0;
  bool exchanged_ = false;

  std::atomic<bool> ended_ = false, aborted_ = false;
  mutable std::mutex mutex_;  // guards the following
  std::string failure_;
  std::vector<std::atomic<uint32_t>> beats_;  // of ranks whose socket this is
  std::vector<std::string> heard_;            // from each socket, and not understood yet; the watch's alone
};

}  // namespace ts
