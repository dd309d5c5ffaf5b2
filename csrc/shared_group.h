#pragma once

#include <memory>

#include "patience.h"
#include "rank_group.h"
#include "shared_memory.h"

namespace ts {

/// The ranks of one host, over memory that all of them share.
class SharedGroup : public RankGroup {
 public:
  /// Bytes that a layout takes.
  static uint64_t bytes(const RankLayout &layout);

  /// `memory` is of that size, zeroed, and the same for all ranks.
  SharedGroup(std::shared_ptr<SharedMemory> memory, const RankLayout &layout, int32_t rank,
              std::vector<FileDescriptor> sockets);

  bool barrier() override;
  bool exchange(int32_t half, std::span<const int32_t> peers, const StagedParts &parts) override;
  uint32_t start_exchange(int32_t half, std::span<const int32_t> peers, const StagedParts &parts) override;
  bool finish_exchange(uint32_t started) override { return pass(started); }
  uint8_t *staging(int32_t rank, int32_t half) const override;
  bool end_step() override { return barrier(); }

  std::span<int32_t> batch_area() const override;
  void publish(const PublishedBatch &batch) override;
  void publish_end() override;
  const PublishedBatch *next() override;
  bool ended() const override;

  void abort(std::string_view message) override;
  bool aborted() const override;
  std::string failure() const override;
  void beat() override;
  uint32_t beats(int32_t rank) const override;
  bool hear(size_t i) override;

 private:
  struct Header;
  uint32_t arrive();
  bool pass(uint32_t round);
  void announce();

  std::shared_ptr<SharedMemory> memory_;
  Header *header_;
  uint32_t num_threads_ = 0;  // of all ranks
  uint32_t step_ = 0;         // the last one seen
  Patience patience_;         // of this process
};

}  // namespace ts
