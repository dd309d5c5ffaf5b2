#include "shared_group.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <type_traits>

#include "check.h"
#include "futex.h"
#include "text.h"

namespace ts {
namespace {

constexpr uint64_t kLine = 64;
constexpr uint64_t kPage = 4096;
// Words that count rounds go up by 2: their lowest bit says that the group was aborted, and so wakes whoever sleeps on them.
constexpr uint32_t kAborted = 1;
constexpr uint32_t kRound = 2;
constexpr size_t kMaxMessage = 800;

constexpr uint64_t round_up(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

/// A word that counts rounds, and who sleeps on it.
struct RoundWord {
  alignas(kLine) std::atomic<uint32_t> value;
  std::atomic<uint32_t> num_sleeping;

  /// Waits until the value is no longer `seen`; what it is then.
  uint32_t wait(uint32_t seen, Patience &patience) {
    if (!patience.spin([&] { return value.load(std::memory_order_acquire) != seen; })) {
      num_sleeping.fetch_add(1, std::memory_order_seq_cst);
      while (value.load(std::memory_order_seq_cst) == seen) futex_wait(value, seen);
      num_sleeping.fetch_sub(1, std::memory_order_relaxed);
    }
    return value.load(std::memory_order_acquire);
  }

  // Sequentially consistent on both sides: either this thread sees the sleeper, or the sleeper sees the new value.
  void wake() {
    if (num_sleeping.load(std::memory_order_seq_cst) > 0) futex_wake_all(value);
  }
};

enum Failure : uint32_t { kNone, kBeingWritten, kWritten };

}  // namespace

struct SharedGroup::Header {
  alignas(kLine) std::atomic<uint32_t> num_arrived;  // threads, at the barrier
  RoundWord barrier;
  RoundWord step;  // that rank 0 has published
  PublishedBatch batch;
  std::atomic<uint32_t> is_end;
  alignas(kLine) std::atomic<uint32_t> failure;
  std::array<char, kMaxMessage> message;  // NUL-terminated
  struct alignas(kLine) Slot {
    std::atomic<uint32_t> beats;
  };
  std::array<Slot, kMaxRanks> slots;
};

namespace {

constexpr uint64_t kHeaderBytes = 8 * kPage;

uint64_t batch_bytes(const RankLayout &layout) { return round_up(layout.batch_ints * sizeof(int32_t), kPage); }

}  // namespace

uint64_t SharedGroup::bytes(const RankLayout &layout) {
  return kHeaderBytes + batch_bytes(layout) +
         2 * static_cast<uint64_t>(layout.num_ranks) * round_up(layout.staging_bytes, kPage);
}

SharedGroup::SharedGroup(std::shared_ptr<SharedMemory> memory, const RankLayout &layout, int32_t rank,
                         std::vector<FileDescriptor> sockets)
    : RankGroup(layout, rank, std::move(sockets)),
      memory_(std::move(memory)),
      header_(reinterpret_cast<Header *>(memory_->data())),  // zeros are a valid start for every field
      patience_(most_turns()) {
  static_assert(sizeof(Header) <= kHeaderBytes && std::is_trivially_destructible_v<Header>);
  TS_ASSERT(memory_->size() == bytes(layout), "the shared memory is of another layout");
  for (int32_t r = 0; r < layout.num_ranks; ++r) num_threads_ += static_cast<uint32_t>(layout.num_threads[r]);
}

/// A thread comes to the barrier, and does not wait. The round that it has to pass.
uint32_t SharedGroup::arrive() {
  Header &h = *header_;
  // cannot change before this thread arrives, but to aborted
  const uint32_t round = h.barrier.value.load(std::memory_order_acquire);
  if ((round & kAborted) != 0) return round;
  if (h.num_arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < num_threads_) return round;
  h.num_arrived.store(0, std::memory_order_relaxed);  // seen by whoever sees the new round
  // One word decides whether the round was passed or the group aborted first, so all threads agree.
  uint32_t seen = round;
  if (h.barrier.value.compare_exchange_strong(seen, round + kRound, std::memory_order_seq_cst)) h.barrier.wake();
  return round;
}

bool SharedGroup::pass(uint32_t round) {
  return (round & kAborted) == 0 && header_->barrier.wait(round, patience_) != (round | kAborted);
}

bool SharedGroup::barrier() { return pass(arrive()); }

/// Staging areas lie where all ranks see them: to have waited is enough.
bool SharedGroup::exchange(int32_t, std::span<const int32_t>, const StagedParts &) { return barrier(); }

uint32_t SharedGroup::start_exchange(int32_t, std::span<const int32_t>, const StagedParts &) { return arrive(); }

std::span<int32_t> SharedGroup::batch_area() const {
  return {reinterpret_cast<int32_t *>(memory_->data() + kHeaderBytes), layout().batch_ints};
}

uint8_t *SharedGroup::staging(int32_t rank, int32_t half) const {
  const uint64_t index = 2 * static_cast<uint64_t>(rank) + static_cast<uint64_t>(half);
  return memory_->data() + kHeaderBytes + batch_bytes(layout()) + index * round_up(layout().staging_bytes, kPage);
}

void SharedGroup::announce() {
  header_->step.value.fetch_add(kRound, std::memory_order_seq_cst);
  header_->step.wake();
}

void SharedGroup::publish(const PublishedBatch &batch) {
  header_->batch = batch;
  announce();
}

void SharedGroup::publish_end() {
  header_->is_end.store(1, std::memory_order_seq_cst);
  announce();
}

const PublishedBatch *SharedGroup::next() {
  step_ = header_->step.wait(step_, patience_);
  if (ended()) return nullptr;
  check();
  return &header_->batch;
}

bool SharedGroup::ended() const { return header_->is_end.load(std::memory_order_seq_cst) != 0; }

void SharedGroup::abort(std::string_view message) {
  Header &h = *header_;
  uint32_t none = kNone;
  if (h.failure.compare_exchange_strong(none, kBeingWritten)) {
    const std::string_view fits = utf8_prefix(message, kMaxMessage - 1);
    std::ranges::copy(fits, h.message.begin());
    h.failure.store(kWritten, std::memory_order_seq_cst);
  }
  for (RoundWord *word : {&h.barrier, &h.step}) {
    word->value.fetch_or(kAborted, std::memory_order_seq_cst);
    futex_wake_all(word->value);
  }
}

bool SharedGroup::aborted() const { return (header_->barrier.value.load(std::memory_order_acquire) & kAborted) != 0; }

std::string SharedGroup::failure() const {
  if (!aborted()) return {};
  // Who was first may be writing still, or was killed while it wrote.
  for (int i = 0; i < 200 && header_->failure.load(std::memory_order_acquire) != kWritten; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  if (header_->failure.load(std::memory_order_acquire) != kWritten) return "a rank ended without saying why";
  return header_->message.data();
}

void SharedGroup::beat() { header_->slots[static_cast<size_t>(rank())].beats.fetch_add(1, std::memory_order_relaxed); }

/// Nothing is ever sent after the answer: what can be read is the end.
bool SharedGroup::hear(size_t) { return false; }

uint32_t SharedGroup::beats(int32_t rank) const {
  return header_->slots[static_cast<size_t>(rank)].beats.load(std::memory_order_relaxed);
}

}  // namespace ts
