#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "engine.h"
#include "event_queue.h"
#include "recording.h"
#include "request.h"
#include "sampler.h"
#include "scheduler.h"
#include "step_thread.h"

namespace ts {

/// job(row, thread): must not throw.
using RowJob = std::function<void(int32_t row, int thread)>;

/// Threads that share rows: share(count, job) calls job once for every row below `count`, with a thread below num_threads
/// that runs one row at a time, and returns when all are done. By default the step thread alone.
struct SharedRows {
  int num_threads = 1;
  std::function<void(int32_t count, const RowJob &job)> share = [](int32_t count, const RowJob &job) {
    for (int32_t row = 0; row < count; ++row) job(row, 0);
  };
};

struct EngineOptions {
  SchedulerOptions scheduler;
  int32_t vocab_size = 0;
  int32_t max_queue = 1024;   ///< requests waiting
  int32_t max_events = 8192;  ///< events not polled, from which on no step begins
  std::vector<int32_t> eos_token_ids;
  std::function<void()> at_end = [] {};  ///< called by the step thread after its last step, before poll says -1
};

RequestLimits limits_of(const EngineOptions &options);

/// What writes a run down, or what it is repeated from: at most one of them.
struct Tape {
  std::unique_ptr<Recorder> recorder = {};
  std::unique_ptr<Replay> replay = {};
};

/// The engine behind the C ABI: an inbox, the step thread, and the queue of events. Each turn of the step thread
/// drains the inbox, schedules, runs, samples, commits and publishes; with nothing to do it sleeps. A replay takes its turns from a
/// trace instead, and nobody else's requests; where it differs it is abandoned, and after its last turn it closes.
///
/// With SchedulerOptions::ahead steps run on a thread of their own, and a turn schedules the next step while one runs: between two
/// steps there is no more than sampling. Turns stay the order of everything: each takes in, schedules, and then commits the step before.
class EngineCore {
 public:
  EngineCore(const EngineOptions &options, RunStep run, SharedRows rows = {}, Tape tape = {}, CopyPages copy = {});
  ~EngineCore();  ///< cancels every request, joins the step thread, and waits for a poll in progress to return
  EngineCore(const EngineCore &) = delete;
  EngineCore &operator=(const EngineCore &) = delete;

  void submit(const ts_request &request);  ///< throws Error: TS_BAD_REQUEST, TS_BUSY, TS_CLOSED
  void cancel(uint64_t id);

  /// How long until there is a place in the queue for one who was just told TS_BUSY, at the pace of the last kPace admissions, and
  /// behind those who were told before.
  int32_t retry_after_ms();
  int32_t poll(ts_event *events, int32_t capacity, int32_t timeout_ms) {
    return events_.poll(events, capacity, timeout_ms);
  }
  void stats(ts_stats &stats) const;  ///< fills what it knows: requests, pages, sums, limits

  /// Refuses new requests and ends the live ones; poll gives their last events, and then -1. May be called twice.
  void close();

  /// The same, when nothing can be computed any more: the live requests end with this error.
  void abandon(const std::string &reason, ts_status status = TS_LOST_RANK);
  std::string failure() const;       ///< that reason; empty while all is well
  ts_status failure_status() const;  ///< TS_OK also where a replay has failed as its trace did

  /// Of a run that is recorded: why no more of it is, or nothing.
  std::string recording_failure() const;
  const Tape &tape() const { return tape_; }  ///< once poll has said -1

 private:
  struct Live {
    bool drained = false;  // out of the inbox: the step thread knows it
    bool cancelled = false;
  };

  struct RowSampled {
    Sampled sampled;
    std::exception_ptr thrown;
  };

  void check_room() const;  // with mutex_ held
  void loop();
  void take_turn(bool waits);
  void take_replayed_turn();
  void enter(Batch *in_flight = nullptr);
  void step();
  void run(Batch &&batch, uint64_t began_ns);
  void compute(Batch &batch);
  void sample(const Batch &batch, const Logits &logits);
  void publish(int32_t num_running);
  void start_over(const std::exception_ptr &thrown);
  void abandon_if_lost(const std::exception &e);

  // engine_ahead.cpp
  void run_ahead(Batch &&first);
  uint64_t start(Batch &batch);
  bool take_turn_behind(Batch &older, std::optional<Batch> &younger);
  bool finish_step(Batch &older, std::optional<Batch> &younger, uint64_t began_ns);

  const EngineOptions options_;
  const RequestLimits limits_;
  const RunStep run_;
  const CopyPages copy_;
  const SharedRows rows_;
  const Tape tape_;
  EventQueue events_;

  mutable std::mutex mutex_;  // guards the following
  std::condition_variable work_;
  std::vector<Message> inbox_;
  std::unordered_map<uint64_t, Live> live_;
  int32_t num_inbox_ = 0;  // requests in the inbox; the published stats count those beyond it
  static constexpr size_t kPace = 16;
  std::array<int64_t, kPace> left_queue_ms_{};  // when requests were admitted, the latest num_left_queue_
  uint64_t num_left_queue_ = 0;
  int64_t next_place_ms_ = 0;  // promised to the last who was told to come back
  bool closing_ = false;
  std::string failure_, recording_failure_;
  ts_status failure_status_ = TS_OK;
  ts_stats published_{};

  // The step thread's own.
  std::unique_ptr<Scheduler> scheduler_;  // none while it starts over
  std::vector<Sampler> samplers_;         // one a thread
  std::vector<RowSampled> rows_sampled_;
  Turn turn_;
  std::vector<Outcome> outcomes_;
  Events outbox_;
  std::vector<Finished> finished_;
  SchedulerCounters counters_before_;  // of schedulers that were given up
  uint64_t num_steps_ = 0, step_ns_ = 0, schedule_ns_ = 0;
  std::unique_ptr<StepThread> step_thread_;  // with steps scheduled ahead
  int64_t took_ns_ = 0;                      // the step that is committed
  std::string difference_;                   // of a replay: how the step that should run is another

  std::thread thread_;  // last: it starts when the rest is there
};

}  // namespace ts
