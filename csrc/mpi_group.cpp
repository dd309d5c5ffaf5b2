#include "mpi_group.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "cache_groups.h"
#include "check.h"
#include "text.h"
#include "tier.h"

namespace ts {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int32_t kExchange = 1, kBatch = 2;  // tags
constexpr char kBeat = 'b', kAbort = 'a';     // on the sockets; an abort has two bytes of length and its message
constexpr size_t kMaxMessage = 800;
constexpr size_t kHeaderInts = sizeof(PublishedBatch) / sizeof(int32_t);
constexpr auto kYield = std::chrono::milliseconds(2);  // that who waits for MPI polls without sleeping
constexpr auto kMostSleep = std::chrono::milliseconds(1);
constexpr auto kNaming = std::chrono::seconds(1);  // for the watch to say who died, when MPI has failed

constexpr int kHighFile = 768;  // above any that an MPI library has open; below the usual limit

enum Array : uint8_t { kTokenIds, kPositions, kSlots, kQueryStart, kContextLen, kPageTable, kLogitRows, kCopies };

constexpr uint64_t round_up(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

/// Bytes from one staging area to the next.
uint64_t staging_stride(const RankLayout &layout) { return round_up(layout.staging_bytes, 4096); }

/// Ints that a batch may take as a message: each row of the page table comes with two counts.
uint64_t message_ints(const RankLayout &layout) {
  return kHeaderInts + (1 + 2 * static_cast<uint64_t>(layout.num_groups)) * layout.batch_ints;
}

/// The arrays but the page table: how many ints of each are used.
std::array<std::pair<Array, int32_t>, 7> used(const PublishedBatch &b, int32_t num_groups) {
  return {{{kTokenIds, b.num_tokens},
           {kPositions, b.num_tokens},
           {kSlots, num_groups * b.num_tokens},
           {kQueryStart, b.num_seqs + 1},
           {kContextLen, b.num_seqs},
           {kLogitRows, b.num_logits},
           {kCopies, static_cast<int32_t>(ints_of(b.num_copies))}}};
}

/// Linux closes a killed process's files from the highest down. So these are, and that a rank is gone is seen here before MPI's own
/// connections break: MPICH over UCX ends with a segmentation fault where it sends over one that has.
std::vector<FileDescriptor> closed_first(std::vector<FileDescriptor> sockets) {
  for (FileDescriptor &socket : sockets) {
    if (!socket.valid()) continue;
    const int high = fcntl(socket.get(), F_DUPFD_CLOEXEC, kHighFile);
    if (high >= 0) socket = FileDescriptor(high);
  }
  return sockets;
}

}  // namespace

MpiGroup::MpiGroup(std::shared_ptr<Mpi> mpi, const RankLayout &layout, int32_t rank,
                   std::vector<FileDescriptor> sockets)
    : RankGroup(layout, rank, closed_first(std::move(sockets))),
      mpi_(std::move(mpi)),
      staging_(2 * static_cast<uint64_t>(layout.num_ranks) * staging_stride(layout), "what ranks exchange"),
      batch_(layout.batch_ints * sizeof(int32_t), "the batch"),
      message_(message_ints(layout) * sizeof(int32_t), "the batch's message"),
      rows_(rank == 0 ? layout.batch_ints : 0, -1),
      patience_(most_turns()),
      beats_(static_cast<size_t>(layout.num_ranks)),
      heard_(this->sockets().size()) {}

MpiGroup::~MpiGroup() {
  if (ended_ && !aborted_) mpi_->finish();
}

// ---- collectives ----------------------------------------------------------------------------------------------------

/// The last of this process's threads to come does the job, and all return what it says.
bool MpiGroup::together(const std::function<bool()> &job) {
  const uint32_t round = round_.load(std::memory_order_acquire);  // cannot change before this thread arrives
  const auto num_threads = static_cast<uint32_t>(layout().num_threads[static_cast<size_t>(rank())]);
  if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < num_threads) {
    if (!patience_.spin([&] { return round_.load(std::memory_order_acquire) != round; })) {
      round_.wait(round, std::memory_order_acquire);
    }
    return exchanged_;
  }
  num_arrived_.store(0, std::memory_order_relaxed);
  exchanged_ = job();
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  return exchanged_;
}

/// Nothing may be sent to a rank that is gone: MPI might not survive it.
bool MpiGroup::peers_live() {
  if (aborted()) return false;
  std::array<pollfd, kMaxRanks> polled;
  const size_t num = sockets().size();
  for (size_t i = 0; i < num; ++i) polled[i] = {sockets()[i].get(), POLLRDHUP, 0};
  if (poll(polled.data(), num, 0) <= 0) return true;
  for (size_t i = 0; i < num; ++i) {
    if (polled[i].revents != 0) abort(who(rank() == 0 ? static_cast<int32_t>(i) : 0) + " died");
  }
  return !aborted();
}

/// MPI has failed. If a rank is gone, the watch is about to say which.
bool MpiGroup::stop(int code) {
  for (const auto until = Clock::now() + kNaming; !aborted() && Clock::now() < until;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  abort(who(rank()) + ": MPI failed: " + mpi_->text(code));
  return false;
}

bool MpiGroup::complete(std::span<Mpi::Request> requests) {
  const auto test = [&](int &code) {
    bool done = false;
    code = mpi_->test(requests, done);
    return done || code != 0;
  };
  int code = 0;
  if (!patience_.spin([&] { return aborted() || test(code); })) {
    const auto begin = Clock::now();
    while (!aborted() && !test(code)) {
      const auto waited = Clock::now() - begin;
      if (waited < kYield) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(std::min<Clock::duration>(waited / 16, kMostSleep));
      }
    }
  }
  if (aborted()) return false;
  return code == 0 || stop(code);
}

bool MpiGroup::barrier() {
  return together([this] {
    if (!peers_live()) return false;
    Mpi::Request request = nullptr;
    if (const int code = mpi_->barrier(request)) return stop(code);
    return complete({&request, 1});
  });
}

bool MpiGroup::post(int32_t half, std::span<const int32_t> peers, const StagedParts &parts) {
  if (!peers_live()) return false;
  const auto mine = static_cast<size_t>(std::ranges::find(peers, rank()) - peers.begin());
  requests_.clear();
  int code = 0;
  for (size_t q = 0; q < peers.size() && code == 0; ++q) {
    const StagedPart part = parts(q, mine);
    if (q == mine || part.bytes == 0) continue;
    code =
        mpi_->receive(staging(peers[q], half) + part.begin, part.bytes, peers[q], kExchange, requests_.emplace_back());
  }
  for (size_t q = 0; q < peers.size() && code == 0; ++q) {
    const StagedPart part = parts(mine, q);
    if (q == mine || part.bytes == 0) continue;
    code = mpi_->send(staging(rank(), half) + part.begin, part.bytes, peers[q], kExchange, requests_.emplace_back());
  }
  return code == 0 || stop(code);
}

bool MpiGroup::exchange(int32_t half, std::span<const int32_t> peers, const StagedParts &parts) {
  return together([&] { return post(half, peers, parts) && complete(requests_); });
}

uint32_t MpiGroup::start_exchange(int32_t half, std::span<const int32_t> peers, const StagedParts &parts) {
  return together([&] {
    progressed_ = 0;
    return post(half, peers, parts);
  })
             ? 1
             : 0;
}

void MpiGroup::progress() {
  bool done = false;
  if (!aborted() && progressed_ == 0) progressed_ = mpi_->test(requests_, done);
}

bool MpiGroup::finish_exchange(uint32_t started) {
  return started != 0 && together([this] { return progressed_ == 0 ? complete(requests_) : stop(progressed_); });
}

uint8_t *MpiGroup::staging(int32_t rank, int32_t half) const {
  return staging_.data() + (2 * static_cast<uint64_t>(rank) + static_cast<uint64_t>(half)) * staging_stride(layout());
}

// ---- steps ----------------------------------------------------------------------------------------------------------

std::span<int32_t> MpiGroup::batch_area() const {
  return {reinterpret_cast<int32_t *>(batch_.data()), layout().batch_ints};
}

/// Header, the arrays, and what has changed in each row of the page table; its ints.
size_t MpiGroup::pack(const PublishedBatch &batch) {
  const std::span<const int32_t> area = batch_area();
  auto *const message = reinterpret_cast<int32_t *>(message_.data());
  std::memcpy(message, &batch, sizeof(batch));
  int32_t *at = message + kHeaderInts;
  for (const auto &[array, count] : used(batch, layout().num_groups)) {
    at = std::ranges::copy(area.subspan(batch.arrays[array], static_cast<size_t>(count)), at).out;
  }
  const int32_t width = batch.page_table_stride / layout().num_groups;
  for (int32_t i = 0; i < batch.num_seqs * layout().num_groups; ++i) {  // a group's part of a row each
    const auto offset = static_cast<size_t>(i) * static_cast<size_t>(width);
    const int32_t context = area[batch.arrays[kContextLen] + static_cast<size_t>(i / layout().num_groups)];
    const int32_t pages = std::max(num_pages_for(context, layout().page_size), 2);  // a recurrent group has two entries
    const auto row = area.subspan(batch.arrays[kPageTable] + offset, static_cast<size_t>(std::min(pages, width)));
    const auto known = std::span(rows_).subspan(offset, row.size());
    const auto first = std::ranges::mismatch(row, known).in1 - row.begin();
    const auto changed = row.subspan(static_cast<size_t>(first));
    std::ranges::copy(changed, known.begin() + first);
    *at++ = static_cast<int32_t>(first);
    *at++ = static_cast<int32_t>(changed.size());
    at = std::ranges::copy(changed, at).out;
  }
  return static_cast<size_t>(at - message);
}

void MpiGroup::unpack() {
  const std::span<int32_t> area = batch_area();
  const auto *message = reinterpret_cast<const int32_t *>(message_.data());
  std::memcpy(&published_, message, sizeof(published_));
  const int32_t *at = message + kHeaderInts;
  for (const auto &[array, count] : used(published_, layout().num_groups)) {
    std::copy_n(at, count, area.begin() + static_cast<ptrdiff_t>(published_.arrays[array]));
    at += count;
  }
  const int32_t width = published_.page_table_stride / layout().num_groups;
  for (int32_t i = 0; i < published_.num_seqs * layout().num_groups; ++i) {
    const int32_t first = *at++, count = *at++;
    const auto row = static_cast<ptrdiff_t>(published_.arrays[kPageTable]) + ptrdiff_t{i} * width;
    std::copy_n(at, count, area.begin() + row + first);
    at += count;
  }
}

void MpiGroup::publish(const PublishedBatch &batch) {
  if (!peers_live()) return;
  const size_t bytes = pack(batch) * sizeof(int32_t);
  requests_.clear();
  for (int32_t r = 1; r < layout().num_ranks; ++r) {
    if (const int code = mpi_->send(message_.data(), bytes, r, kBatch, requests_.emplace_back())) {
      stop(code);
      return;
    }
  }
  complete(requests_);
}

/// A batch without tokens or copies.
void MpiGroup::publish_end() {
  if (ended_) return;
  publish({});
  ended_ = true;
  if (!aborted()) mpi_->finish();
}

const PublishedBatch *MpiGroup::next() {
  check();
  Mpi::Request request = nullptr;
  const uint64_t most = message_ints(layout()) * sizeof(int32_t);
  if (const int code = mpi_->receive(message_.data(), most, 0, kBatch, request)) {
    stop(code);
  } else if (complete({&request, 1})) {
    unpack();
    if (published_.num_tokens > 0 || published_.num_copies > 0) return &published_;
    ended_ = true;
    return nullptr;
  }
  check();
  return nullptr;
}

// ---- failure --------------------------------------------------------------------------------------------------------

void MpiGroup::abort(std::string_view message) {
  const std::string_view fits = utf8_prefix(message, kMaxMessage);
  {
    const std::lock_guard lock(mutex_);
    if (aborted_ || ended_) return;
    failure_ = fits;
    aborted_.store(true, std::memory_order_release);
  }
  // Rank 0 tells all others, whoever told it.
  std::string frame = {kAbort, static_cast<char>(fits.size() & 0xFF), static_cast<char>(fits.size() >> 8)};
  frame += fits;
  for (const FileDescriptor &socket : sockets()) {
    if (socket.valid()) static_cast<void>(send(socket.get(), frame.data(), frame.size(), MSG_DONTWAIT | MSG_NOSIGNAL));
  }
}

std::string MpiGroup::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

void MpiGroup::beat() {
  for (const FileDescriptor &socket : sockets()) {
    if (socket.valid()) static_cast<void>(send(socket.get(), &kBeat, 1, MSG_DONTWAIT | MSG_NOSIGNAL));
  }
}

uint32_t MpiGroup::beats(int32_t rank) const { return beats_[static_cast<size_t>(rank)].load(); }

bool MpiGroup::hear(size_t i) {
  std::array<char, 1024> bytes;
  for (;;) {
    const ssize_t size = recv(sockets()[i].get(), bytes.data(), bytes.size(), MSG_DONTWAIT);
    if (size < 0 && (errno == EAGAIN || errno == EINTR)) return true;
    if (size <= 0) return false;
    heard_[i].append(bytes.data(), static_cast<size_t>(size));
    ++beats_[rank() == 0 ? i : 0];
    hear_message(heard_[i]);
  }
}

/// Takes beats, and an abort when it is whole.
void MpiGroup::hear_message(std::string &heard) {
  heard.erase(0, std::min(heard.find_first_not_of(kBeat), heard.size()));
  if (heard.size() < 3) return;
  const size_t length = static_cast<uint8_t>(heard[1]) + 256 * static_cast<size_t>(static_cast<uint8_t>(heard[2]));
  if (heard.size() < 3 + length) return;
  abort(std::string_view(heard).substr(3, length));
  heard.clear();
}

}  // namespace ts
