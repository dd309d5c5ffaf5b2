#include "engine_core.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <string>
#include <thread>
#include <utility>

#include "check.h"
#include "clock.h"
#include "host.h"
#include "patience.h"
#include "text.h"

namespace ts {
namespace {

SchedulerCounters sum_of(const SchedulerCounters &a, const SchedulerCounters &b) {
  return {a.num_prompt_tokens + b.num_prompt_tokens,
          a.num_cached_tokens + b.num_cached_tokens,
          a.num_output_tokens + b.num_output_tokens,
          a.num_preemptions + b.num_preemptions,
          a.num_finished + b.num_finished,
          a.num_admitted + b.num_admitted,
          a.num_drafted_tokens + b.num_drafted_tokens,
          a.num_accepted_tokens + b.num_accepted_tokens,
          a.num_restored_tokens + b.num_restored_tokens,
          a.num_pages_kept + b.num_pages_kept,
          a.num_pages_restored + b.num_pages_restored,
          a.num_pages_broken + b.num_pages_broken};
}

/// Which of its sequence's outputs a row of logits decides.
uint64_t output_of(const Batch &batch, int32_t logit) {
  return static_cast<uint64_t>(batch.sequence(logit).num_outputs()) + static_cast<uint64_t>(batch.ahead(logit));
}

std::string what(const std::exception_ptr &exception) {
  try {
    std::rethrow_exception(exception);
  } catch (const std::exception &e) {
    return e.what();
  } catch (...) {
    return "an unknown exception";
  }
}

}  // namespace

RequestLimits limits_of(const EngineOptions &options) {
  const SchedulerOptions &s = options.scheduler;
  return {options.vocab_size, s.max_context,         s.page_size, s.num_pages, s.token_budget,
          s.prefix_cache,     options.eos_token_ids, s.max_draft, s.groups};
}

EngineCore::EngineCore(const EngineOptions &options, RunStep run, SharedRows rows, Tape tape, CopyPages copy)
    : options_(options),
      limits_(limits_of(options)),
      run_(std::move(run)),
      copy_(std::move(copy)),
      rows_(std::move(rows)),
      tape_(std::move(tape)),
      events_(static_cast<size_t>(options.max_events)),
      scheduler_(std::make_unique<Scheduler>(options.scheduler)),
      samplers_(static_cast<size_t>(rows_.num_threads), Sampler(options.vocab_size)),
      rows_sampled_(static_cast<size_t>(options.scheduler.max_seqs)) {
  published_.num_pages = published_.num_pages_free = options.scheduler.num_owners * options.scheduler.num_pages;
  published_.num_slots = options.scheduler.num_owners * options.scheduler.tier.num_slots;
  outcomes_.reserve(static_cast<size_t>(options.scheduler.max_seqs));
  if (options.scheduler.ahead) {
    const bool room = rows_.num_threads < usable_cores();
    step_thread_ = std::make_unique<StepThread>(run_, copy_, room ? Patience::kMostTurns : 0);
  }
  thread_ = std::thread([this] { loop(); });
}

EngineCore::~EngineCore() {
  close();
  thread_.join();
  events_.wait_for_poller();
}

// ---- step thread ----------------------------------------------------------------------------------------------------

void EngineCore::loop() {
  std::exception_ptr thrown;  // by the turn before
  for (bool open = true; open || thrown;) {
    try {
      if (thrown) {
        if (tape_.recorder) tape_.recorder->restarted(what(thrown));
        start_over(thrown);
        thrown = nullptr;
        continue;
      }
      events_.wait_for_room();
      tape_.replay ? take_replayed_turn() : take_turn(true);
      open = !turn_.closing;
      if (!turn_.failure.empty()) {
        start_over(nullptr);
        continue;
      }
      enter();
      step();
      if (tape_.recorder && scheduler_->idle())
        tape_.recorder->flush();  // whoever sees the last event may end the process
      publish(scheduler_->num_running());
    } catch (...) {
      // Not even memory for starting over: it is tried until there is some.
      if (thrown) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      thrown = std::current_exception();
    }
  }
  options_.at_end();
  if (tape_.recorder) tape_.recorder->flush();
  events_.close();
}

/// Takes the inbox. `waits`: once there is something to do.
void EngineCore::take_turn(bool waits) {
  turn_.messages.clear();
  {
    std::unique_lock lock(mutex_);
    if (waits) work_.wait(lock, [this] { return closing_ || !inbox_.empty() || !scheduler_->idle(); });
    turn_.messages.swap(inbox_);
    published_.num_waiting += std::exchange(num_inbox_, 0);
    for (const Message &message : turn_.messages) {
      if (const auto *submitted = std::get_if<Submitted>(&message)) live_.at(submitted->sequence->id).drained = true;
    }
    turn_.closing = closing_;
    turn_.failure = failure_;
    if (tape_.recorder && recording_failure_.empty()) recording_failure_ = tape_.recorder->failure();
  }
  turn_.now_ms = now_ms();
  if (tape_.recorder) tape_.recorder->taken(turn_);
}

/// The trace's next turn in place of the inbox. A trace that cannot be read on ends the engine, as its own end does.
void EngineCore::take_replayed_turn() {
  turn_.messages.clear();
  turn_.failure = failure();
  if (turn_.failure.empty()) {
    ts_status status = TS_OK;
    try {
      tape_.replay->take(turn_, limits_);
    } catch (const Error &e) {
      turn_.failure = e.what();
      status = e.status();
    }
    if (!turn_.failure.empty()) abandon(turn_.failure, status);
  }
  turn_.closing = turn_.closing || !turn_.failure.empty();
  const std::lock_guard lock(mutex_);
  for (const Message &message : turn_.messages) {
    if (const auto *submitted = std::get_if<Submitted>(&message)) {
      live_.emplace(submitted->sequence->id, Live{.drained = true});
    }
  }
}

/// Tells the scheduler what the turn brings. If the engine is closing, every request is cancelled.
void EngineCore::enter(Batch *in_flight) {
  const Replay *replay = tape_.replay.get();
  const bool ran = in_flight != nullptr && replay && replay->ran();  // the step before
  if (replay && replay->restart() && !replay->scheduled() && !ran) throw std::runtime_error(*replay->restart());
  scheduler_->set_time(turn_.now_ms, in_flight);
  for (Message &message : turn_.messages) {
    if (auto *submitted = std::get_if<Submitted>(&message)) {
      scheduler_->submit(std::move(submitted->sequence), turn_.now_ms - submitted->at_ms);
    } else {
      scheduler_->cancel(std::get<Cancelled>(message).id, in_flight);
    }
  }
  if (turn_.closing) scheduler_->cancel_all(in_flight);
}

void EngineCore::step() {
  const uint64_t begin = now_ns();
  std::optional<Batch> batch = scheduler_->schedule();
  if (!batch) {
    if (tape_.replay && tape_.replay->scheduled())
      abandon("a step differs: the trace has one where this run has none", TS_DIFFERS);
    return;
  }
  schedule_ns_ += now_ns() - begin;
  if (step_thread_) return run_ahead(std::move(*batch));
  ++num_steps_;
  publish(batch->arrays().num_seqs);  // cancelled requests and room in the queue need not wait for the step
  const Replay *replay = tape_.replay.get();
  if (replay && replay->restart() && !replay->ran()) throw std::runtime_error(*replay->restart());
  run(std::move(*batch), begin);
  step_ns_ += now_ns() - begin;
  if (replay && replay->restart()) throw std::runtime_error(*replay->restart());
}

void EngineCore::run(Batch &&batch, uint64_t began_ns) {
  try {
    compute(batch);
  } catch (const std::exception &e) {
    outbox_.clear();
    if (tape_.recorder) tape_.recorder->failed(e.what());
    scheduler_->fail(std::move(batch), std::string("the step failed: ") + e.what());
    abandon_if_lost(e);
    return;
  }
  const uint64_t begin = now_ns();
  const auto took_ns = tape_.replay ? tape_.replay->took_ns() : static_cast<int64_t>(begin - began_ns);
  if (tape_.recorder) tape_.recorder->result(took_ns, outcomes_, batch.copies());
  scheduler_->commit(std::move(batch), outcomes_, took_ns);
  schedule_ns_ += now_ns() - begin;
}

void EngineCore::abandon_if_lost(const std::exception &e) {
  const auto *error = dynamic_cast<const Error *>(&e);
  if (error != nullptr && (error->status() == TS_LOST_RANK || error->status() == TS_DIFFERS)) {
    abandon(e.what(), error->status());
  }
}

/// Runs the step and samples. A replay throws where it differs, and where the trace's step could not be run.
void EngineCore::compute(Batch &batch) {
  const auto demand_none = [](const std::string &difference) {
    if (!difference.empty()) fail(TS_DIFFERS, difference);
  };
  const auto num_groups = static_cast<int32_t>(limits_.groups.size());
  if (tape_.recorder) tape_.recorder->batch(num_steps_, batch, limits_.page_size, num_groups);
  if (tape_.replay) {
    demand_none(tape_.replay->compare(num_steps_, batch, limits_.page_size, num_groups));
    if (const auto &why = tape_.replay->step_failure()) throw std::runtime_error(*why);
  }
  if (!batch.copies().empty()) {
    copy_(batch.copies());
    if (tape_.replay) demand_none(tape_.replay->repeat(batch.copies()));
  }
  sample(batch, batch.arrays().num_tokens > 0 ? run_(batch.arrays()) : Logits{});
  if (tape_.replay) demand_none(tape_.replay->compare(batch, outcomes_));
}

void EngineCore::sample(const Batch &batch, const Logits &logits) {
  const auto vocab_size = static_cast<size_t>(options_.vocab_size);
  const auto job = [&](int32_t row, int thread) {
    if (!batch.wants(row)) return;
    const Sequence &sequence = batch.sequence(row);
    RowSampled &out = rows_sampled_[static_cast<size_t>(row)];
    try {
      out.thrown = nullptr;
      out.sampled = samplers_[static_cast<size_t>(thread)].sample({logits.data + row * logits.stride, vocab_size},
                                                                  sequence.sampling, sequence.counts.counts(),
                                                                  output_of(batch, row));
    } catch (...) {  // no memory for the candidates, say; nor, then, for a message
      out.thrown = std::current_exception();
    }
  };
  rows_.share(batch.num_logits(), std::ref(job));  // by reference: a step allocates nothing for it
  outcomes_.clear();
  bool counts = true;
  for (int32_t i = 0; i < batch.num_logits(); ++i) {
    counts = batch.wants(i) && (counts || batch.ahead(i) == 0);
    if (!counts) {
      outcomes_.emplace_back();
      continue;
    }
    const Sequence &sequence = batch.sequence(i);
    auto &[sampled, thrown] = rows_sampled_[static_cast<size_t>(i)];
    if (tape_.replay && tape_.replay->not_sampled(i)) thrown = std::make_exception_ptr(std::bad_alloc());
    if (thrown) {
      sampled = {};
      sampled.token = Outcome::kNotSampled;
      sampled.error = "sampling failed: " + what(thrown);
    }
    if (sampled.error.empty()) {
      ts_event &event = outbox_.add_token(sequence.id, sampled.token);
      event.logprob = sampled.logprob;
      if (sequence.num_outputs() == 0) {
        event.num_cached = sequence.num_cached;
        event.num_restored = sequence.num_restored;
        event.miss = sequence.miss.why;
        event.miss_at = sequence.miss.at;
      }
      for (const auto &[token, logprob] : sampled.top) outbox_.add_top(token, logprob);
    }
    counts = sampled.error.empty() && batch.goes_on(i, sampled.token);
    outcomes_.push_back({sampled.token, std::move(sampled.error)});
  }
}

/// Publishes what has changed, or throws and leaves every request in live_ that has no last event. A request's id is free
/// again before its last event can be seen.
void EngineCore::publish(int32_t num_running) {
  scheduler_->take_finished(finished_);
  for (const Finished &f : finished_) {
    ts_event &event = outbox_.add_finished(f.id(), f.finish(), f.message());
    event.num_cached = f.num_cached();
    event.num_restored = f.num_restored();
    event.miss = f.miss().why;
    event.miss_at = f.miss().at;
  }
  events_.make_room(outbox_);
  const SchedulerCounters sums = sum_of(counters_before_, scheduler_->counters());
  {
    const std::lock_guard lock(mutex_);
    for (; num_left_queue_ < sums.num_admitted; ++num_left_queue_) left_queue_ms_[num_left_queue_ % kPace] = now_ms();
    ts_stats &s = published_;
    for (const Finished &f : finished_) s.num_finished += live_.erase(f.id());
    s.num_waiting = scheduler_->num_waiting();
    s.num_running = num_running;
    s.num_pages_free = scheduler_->cache().num_blank();
    s.num_pages_cached = scheduler_->cache().num_idle();
    s.num_steps = num_steps_;
    s.num_prompt_tokens = sums.num_prompt_tokens;
    s.num_cached_tokens = sums.num_cached_tokens;
    s.num_output_tokens = sums.num_output_tokens;
    s.num_preemptions = sums.num_preemptions;
    s.num_slots_held = scheduler_->cache().num_held();
    s.num_restored_tokens = sums.num_restored_tokens;
    s.num_pages_kept = sums.num_pages_kept;
    s.num_pages_restored = sums.num_pages_restored;
    s.num_pages_broken = sums.num_pages_broken;
    s.num_drafted_tokens = sums.num_drafted_tokens;
    s.num_accepted_tokens = sums.num_accepted_tokens;
    s.step_ns = step_ns_;
    s.schedule_ns = schedule_ns_;
  }
  finished_.clear();
  events_.push(outbox_);
}

/// After an exception where none is expected (no memory for a table, say), or when the engine was abandoned: the scheduler
/// may be half-way through a change, so it is given up with the whole cache, and every request that it knew ends. Those in
/// the inbox are served, but for an engine that was abandoned. If this throws, it is called again, and goes on where it was.
void EngineCore::start_over(const std::exception_ptr &thrown) {
  if (scheduler_) {
    counters_before_ = sum_of(counters_before_, scheduler_->counters());
    outbox_.clear();
    finished_.clear();
    turn_.messages.clear();
    scheduler_.reset();
  }
  std::string reason = failure();
  if (reason.empty()) reason = "the engine had to start over: " + what(thrown);
  {
    const std::lock_guard lock(mutex_);
    for (auto it = live_.begin(); it != live_.end();) {
      if (it->second.drained) {
        outbox_.add_finished(it->first, TS_FINISH_ERROR, reason);
        it = live_.erase(it);
        ++published_.num_finished;
      } else {
        ++it;
      }
    }
  }
  events_.make_room(outbox_);
  auto scheduler = std::make_unique<Scheduler>(options_.scheduler);
  events_.push(outbox_);
  scheduler_ = std::move(scheduler);
  publish(0);
}

}  // namespace ts
