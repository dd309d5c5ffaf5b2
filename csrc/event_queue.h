#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "engine.h"

namespace ts {

/// A ts_event and the memory that it points to.
struct Event {
  ts_event event{};
  std::vector<int32_t> top_tokens;
  std::vector<float> top_logprobs;
  std::string message;
};

/// From the step thread to the one thread that polls. Bounded: the step thread waits for room before a step, so a
/// poller that has stopped holds up the engine, and not the machine's memory.
class EventQueue {
 public:
  explicit EventQueue(size_t bound) : bound_(bound) {}

  void wait_for_room();          ///< returns at once after open_bound()
  void make_room(size_t count);  ///< of memory, for that many more; throws std::bad_alloc
  void push(
      std::vector<Event> &events);  ///< moves them in and clears the vector; neither waits nor throws after make_room
  void open_bound();                ///< nobody waits for room any more
  void close();                     ///< no push follows; pollers take what is left, then -1

  /// As ts_engine_poll. What the events point to lives until the next call.
  int32_t poll(ts_event *events, int32_t capacity, int32_t timeout_ms);

  void wait_for_poller();  ///< until no thread is inside poll(), after close()

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::condition_variable room_;
  std::condition_variable left_;
  std::vector<Event> queue_;  // from begin_ on
  size_t begin_ = 0;
  std::vector<Event> delivered_;  // by the last poll
  size_t bound_;
  int num_polling_ = 0;
  bool bounded_ = true;
  bool closed_ = false;
};

}  // namespace ts
