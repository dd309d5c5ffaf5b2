#include <algorithm>
#include <utility>

#include "check.h"
#include "clock.h"
#include "engine_core.h"
#include "text.h"

// What callers' threads ask of the engine.
namespace ts {

void EngineCore::check_room() const {
  if (!failure_.empty()) fail(TS_LOST_RANK, failure_);
  if (closing_) fail(TS_CLOSED, "the engine is closing and takes no more requests");
  if (tape_.replay) fail(TS_CLOSED, "the engine replays a trace and takes no other requests");
  const int32_t num_waiting = num_inbox_ + published_.num_waiting;
  if (num_waiting < options_.max_queue) return;
  fail(TS_BUSY, num_waiting, " requests are waiting, and the queue holds ", options_.max_queue, ": try again later");
}

void EngineCore::submit(const ts_request &request) {
  {
    const std::lock_guard lock(mutex_);
    check_room();  // before the work of hashing
  }
  Submitted submitted{make_sequence(request, limits_), now_ms()};
  if (tape_.recorder) submitted.record = record_of(request, submitted.at_ms);
  {
    const std::lock_guard lock(mutex_);
    check_room();
    if (live_.contains(request.id)) {
      fail(TS_BAD_REQUEST, "id ", request.id, " belongs to a request that has not finished: take another");
    }
    inbox_.emplace_back(std::move(submitted));
    try {
      live_.emplace(request.id, Live{});
    } catch (...) {
      inbox_.pop_back();
      throw;
    }
    ++num_inbox_;
  }
  work_.notify_one();
}

int32_t EngineCore::retry_after_ms() {
  const int64_t now = now_ms();
  const std::lock_guard lock(mutex_);
  const auto known = static_cast<int64_t>(std::min<uint64_t>(num_left_queue_, kPace));
  if (known == 0) return 1000;  // nobody was admitted yet
  const int64_t since = left_queue_ms_[(num_left_queue_ - static_cast<uint64_t>(known)) % kPace];
  const int64_t pace = std::max<int64_t>(1, (now - since) / known);
  next_place_ms_ = std::min(std::max(now, next_place_ms_) + pace, now + pace * options_.max_queue);
  return static_cast<int32_t>(std::min<int64_t>(next_place_ms_ - now, INT32_MAX));
}

void EngineCore::cancel(uint64_t id) {
  {
    const std::lock_guard lock(mutex_);
    const auto it = live_.find(id);
    if (it == live_.end() || it->second.cancelled || tape_.replay) return;
    inbox_.emplace_back(Cancelled{id});
    it->second.cancelled = true;
  }
  work_.notify_one();
}

void EngineCore::close() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  events_.open_bound();
  work_.notify_one();
}

void EngineCore::abandon(const std::string &reason, ts_status status) {
  {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) {
      failure_ = reason;
      failure_status_ = status;
    }
  }
  close();
}

std::string EngineCore::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

ts_status EngineCore::failure_status() const {
  const std::lock_guard lock(mutex_);
  return failure_status_;
}

std::string EngineCore::recording_failure() const {
  const std::lock_guard lock(mutex_);
  return recording_failure_;
}

void EngineCore::stats(ts_stats &stats) const {
  const SchedulerOptions &s = options_.scheduler;
  const std::lock_guard lock(mutex_);
  stats = published_;
  stats.num_waiting += num_inbox_;
  stats.max_context = s.max_context;
  stats.vocab_size = options_.vocab_size;
  stats.page_size = s.page_size;
  stats.token_budget = s.token_budget;
  stats.max_seqs = s.max_seqs;
}

}  // namespace ts
