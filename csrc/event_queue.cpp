#include "event_queue.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "check.h"

namespace ts {

void EventQueue::wait_for_room() {
  std::unique_lock lock(mutex_);
  room_.wait(lock, [this] { return queue_.size() - begin_ < bound_ || !bounded_; });
}

void EventQueue::make_room(size_t count) {
  const std::lock_guard lock(mutex_);
  if (begin_ >= queue_.size() - begin_) {  // each event moves once at most, on average
    queue_.erase(queue_.begin(), queue_.begin() + static_cast<std::ptrdiff_t>(begin_));
    begin_ = 0;
  }
  if (queue_.size() + count > queue_.capacity()) queue_.reserve(2 * (queue_.size() + count));
}

void EventQueue::push(std::vector<Event> &events) {
  if (events.empty()) return;
  {
    const std::lock_guard lock(mutex_);
    TS_ASSERT(!closed_, "an event after the last");
    for (Event &event : events) queue_.push_back(std::move(event));
  }
  events.clear();
  arrived_.notify_one();
}

void EventQueue::open_bound() {
  const std::lock_guard lock(mutex_);
  bounded_ = false;
  room_.notify_all();
}

void EventQueue::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  arrived_.notify_all();
}

int32_t EventQueue::poll(ts_event *events, int32_t capacity, int32_t timeout_ms) {
  std::unique_lock lock(mutex_);
  ++num_polling_;
  const auto ready = [this] { return begin_ < queue_.size() || closed_; };
  if (timeout_ms < 0) {
    arrived_.wait(lock, ready);
  } else {
    arrived_.wait_for(lock, std::chrono::milliseconds(timeout_ms), ready);
  }
  --num_polling_;  // it leaves with the lock
  left_.notify_all();
  const size_t count = std::min(queue_.size() - begin_, static_cast<size_t>(std::max(capacity, 0)));
  const bool over = closed_ && begin_ == queue_.size();
  delivered_.clear();
  delivered_.reserve(count);
  for (size_t i = 0; i < count; ++i) delivered_.push_back(std::move(queue_[begin_++]));
  for (size_t i = 0; i < count; ++i) {  // now that they do not move any more
    const Event &from = delivered_[i];
    events[i] = from.event;
    events[i].num_top = static_cast<int32_t>(from.top_tokens.size());
    events[i].top_tokens = from.top_tokens.data();
    events[i].top_logprobs = from.top_logprobs.data();
    events[i].message = from.message.c_str();
  }
  room_.notify_one();
  return over ? -1 : static_cast<int32_t>(count);
}

void EventQueue::wait_for_poller() {
  std::unique_lock lock(mutex_);
  TS_ASSERT(closed_, "a poller leaves once the queue is closed");
  left_.wait(lock, [this] { return num_polling_ == 0; });
}

}  // namespace ts
