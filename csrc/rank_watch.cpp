#include "rank_watch.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "no_signals.h"
#include "text.h"

namespace ts {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int32_t kMostTick_ms = 250;

}  // namespace

RankWatch::RankWatch(std::shared_ptr<RankGroup> group, int32_t timeout_ms)
    : group_(std::move(group)),
      timeout_ms_(timeout_ms),
      tick_ms_(std::clamp(timeout_ms / 8, 1, kMostTick_ms)),
      stop_(eventfd(0, EFD_CLOEXEC)),
      seen_(group_->sockets().size()) {
  if (!stop_.valid()) fail(TS_IO, "no eventfd for the ranks: ", std::strerror(errno));
  const NoSignals no_signals;
  thread_ = std::thread([this] { loop(); });
  pthread_setname_np(thread_.native_handle(), "ts-ranks");
}

RankWatch::~RankWatch() {
  const uint64_t one = 1;
  while (write(stop_.get(), &one, sizeof(one)) < 0 && errno == EINTR) {
  }
  thread_.join();
}

void RankWatch::on_failure(std::function<void(const std::string &)> callback) {
  const std::lock_guard lock(mutex_);
  callback_ = std::move(callback);
  if (failed_ && callback_) callback_(group_->failure());
}

/// Rank 0 has a socket to every rank, by rank; a follower has one, to rank 0.
int32_t RankWatch::rank_of(size_t socket) const { return group_->rank() == 0 ? static_cast<int32_t>(socket) : 0; }

void RankWatch::loop() {
  std::vector<pollfd> polled{{stop_.get(), POLLIN, 0}};
  for (const FileDescriptor &socket : group_->sockets()) polled.push_back({socket.get(), POLLIN | POLLRDHUP, 0});
  auto next_tick = Clock::now();
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(next_tick - Clock::now()).count();
    const int num = poll(polled.data(), polled.size(), static_cast<int>(std::max<int64_t>(left, 0)));
    if (polled[0].revents != 0) return;
    for (size_t i = 0; num > 0 && i + 1 < polled.size(); ++i) {
      if (polled[i + 1].revents != 0 && !group_->hear(i) && !group_->ended())
        group_->abort(group_->who(rank_of(i)) + " died");
    }
    if (Clock::now() >= next_tick) {
      next_tick = Clock::now() + std::chrono::milliseconds(tick_ms_);
      group_->beat();
      check_beats();
    }
    if (group_->aborted()) return report();
    if (group_->ended()) polled.resize(1);  // sockets close now, one after the other
  }
}

void RankWatch::check_beats() {
  for (size_t i = 0; i < group_->sockets().size(); ++i) {
    if (!group_->sockets()[i].valid()) continue;  // rank 0's own place
    const uint32_t beats = group_->beats(rank_of(i));
    seen_[i].quiet_ms = beats == seen_[i].beats ? seen_[i].quiet_ms + tick_ms_ : 0;
    seen_[i].beats = beats;
    if (seen_[i].quiet_ms >= timeout_ms_ && !group_->ended()) {
      group_->abort(group_->who(rank_of(i)) + " has not moved for " + std::to_string((timeout_ms_ + 999) / 1000) +
                    " s: it is stopped, or its machine is overloaded");
    }
  }
}

void RankWatch::report() {
  const std::lock_guard lock(mutex_);
  failed_ = true;
  if (callback_) callback_(group_->failure());
}

}  // namespace ts
