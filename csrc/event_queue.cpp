#include "event_queue.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <utility>

#include "check.h"

namespace ts {

// ---- events ---------------------------------------------------------------------------------------------------------

namespace {

/// Room for `more` elements behind those that there are; it grows by a factor.
template <class T>
void reserve_more(std::vector<T> &vector, size_t more) {
  const size_t wanted = vector.size() + more;
  if (wanted > vector.capacity()) vector.reserve(2 * wanted);
}

template <class T>
void move_behind(std::vector<T> &vector, std::vector<T> &more) {
  vector.insert(vector.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
}

}  // namespace

ts_event &Events::add_token(uint64_t id, int32_t token) {
  ts_event &event = events_.emplace_back();
  event.id = id;
  event.kind = TS_EVENT_TOKEN;
  event.token = token;
  return event;
}

void Events::add_top(int32_t token, float logprob) {
  top_tokens_.push_back(token);
  top_logprobs_.push_back(logprob);
  ++events_.back().num_top;
}

ts_event &Events::add_finished(uint64_t id, ts_finish finish, const std::string &message) {
  reserve_more(events_, 1);
  messages_.push_back(message);  // nothing is added if this throws, and nothing throws behind it
  ts_event &event = events_.emplace_back();
  event.id = id;
  event.kind = TS_EVENT_FINISHED;
  event.finish = finish;
  return event;
}

void Events::clear() {
  events_.clear();
  top_tokens_.clear();
  top_logprobs_.clear();
  messages_.clear();
  next_ = next_top_ = next_message_ = 0;
}

void Events::reserve(const Events &more) {
  reserve_more(events_, more.events_.size());
  reserve_more(top_tokens_, more.top_tokens_.size());
  reserve_more(top_logprobs_, more.top_logprobs_.size());
  reserve_more(messages_, more.messages_.size());
}

void Events::append(Events &more) {
  TS_ASSERT(next_ == 0 && more.next_ == 0, "events move before any of them is taken");
  move_behind(events_, more.events_);
  move_behind(top_tokens_, more.top_tokens_);
  move_behind(top_logprobs_, more.top_logprobs_);
  move_behind(messages_, more.messages_);
  more.clear();
}

size_t Events::take(ts_event *events, size_t capacity) {
  const size_t count = std::min(events_.size() - next_, capacity);
  for (size_t i = 0; i < count; ++i) {
    ts_event &event = events[i];
    event = events_[next_++];
    event.top_tokens = top_tokens_.data() + next_top_;
    event.top_logprobs = top_logprobs_.data() + next_top_;
    next_top_ += static_cast<size_t>(event.num_top);
    event.message = event.kind == TS_EVENT_FINISHED ? messages_[next_message_++].c_str() : "";
  }
  return count;
}

// ---- queue ----------------------------------------------------------------------------------------------------------

void EventQueue::wait_for_room() {
  std::unique_lock lock(mutex_);
  room_.wait(lock, [this] { return num_undelivered_ < bound_ || !bounded_; });
}

void EventQueue::make_room(const Events &more) {
  if (more.empty()) return;
  const std::lock_guard lock(mutex_);
  queue_.reserve(more);
}

void EventQueue::push(Events &events) {
  if (events.empty()) return;
  {
    const std::lock_guard lock(mutex_);
    TS_ASSERT(!closed_, "an event after the last");
    num_undelivered_ += events.size();
    if (queue_.empty()) {  // also where the poller has taken the one that room was made in
      std::swap(queue_, events);
    } else {
      queue_.append(events);
    }
  }
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
  bool over = false;
  if (delivered_.all_taken()) {
    const auto ready = [this] { return !queue_.empty() || closed_; };
    if (timeout_ms < 0) {
      arrived_.wait(lock, ready);
    } else {
      arrived_.wait_for(lock, std::chrono::milliseconds(timeout_ms), ready);
    }
    over = closed_ && queue_.empty();
    delivered_.clear();
    std::swap(delivered_, queue_);
  }
  lock.unlock();
  const size_t count = delivered_.take(events, static_cast<size_t>(std::max(capacity, 0)));
  lock.lock();
  num_undelivered_ -= count;
  --num_polling_;  // it leaves with the lock
  left_.notify_all();
  room_.notify_one();
  return over ? -1 : static_cast<int32_t>(count);
}

void EventQueue::wait_for_poller() {
  std::unique_lock lock(mutex_);
  TS_ASSERT(closed_, "a poller leaves once the queue is closed");
  left_.wait(lock, [this] { return num_polling_ == 0; });
}

}  // namespace ts
