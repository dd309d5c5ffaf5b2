#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "engine.h"

namespace ts {

/// Events in order, and what they point to: each has its num_top of the tops, and each that finishes a request a message. Their own
/// pointers are set when they are delivered.
class Events {
 public:
  ts_event &add_token(uint64_t id, int32_t token);
  void add_top(int32_t token, float logprob);  ///< of the event that was added last
  ts_event &add_finished(uint64_t id, ts_finish finish, const std::string &message);

  size_t size() const { return events_.size(); }
  bool empty() const { return events_.empty(); }
  void clear();
  void reserve(const Events &more);  ///< room for those too; throws std::bad_alloc
  void append(Events &more);         ///< moves them in and clears `more`; does not throw after reserve

  /// Writes at most `capacity` of those that were not taken yet; what they point to lives until clear() or append().
  size_t take(ts_event *events, size_t capacity);
  bool all_taken() const { return next_ == events_.size(); }

 private:
  std::vector<ts_event> events_;
  std::vector<int32_t> top_tokens_;
  std::vector<float> top_logprobs_;
  std::vector<std::string> messages_;
  size_t next_ = 0, next_top_ = 0, next_message_ = 0;  // to be taken
};

/// From the step thread to the one thread that polls. Bounded: the step thread waits for room before a step, so a
/// poller that has stopped holds up the engine, and not the machine's memory. Neither holds the other up for longer than it takes to
/// hand a step's events over: the poller takes all that there are at once.
class EventQueue {
 public:
  explicit EventQueue(size_t bound) : bound_(bound) {}

  void wait_for_room();                ///< returns at once after open_bound()
  void make_room(const Events &more);  ///< of memory; throws std::bad_alloc
  void push(Events &events);           ///< moves them in and clears it; neither waits nor throws after make_room
  void open_bound();                   ///< nobody waits for room any more
  void close();                        ///< no push follows; pollers take what is left, then -1

  /// As ts_engine_poll. What the events point to lives until the next call.
  int32_t poll(ts_event *events, int32_t capacity, int32_t timeout_ms);

  void wait_for_poller();  ///< until no thread is inside poll(), after close()

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::condition_variable room_;
  std::condition_variable left_;
  Events queue_;
  size_t num_undelivered_ = 0;  // in queue_ and delivered_
  size_t bound_;
  int num_polling_ = 0;
  bool bounded_ = true;
  bool closed_ = false;

  Events delivered_;  // the poller's: what it took from the queue, and gives out
};

}  // namespace ts
