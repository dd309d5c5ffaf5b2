#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "clock.h"
#include "engine_core.h"
#include "text.h"

/// Steps of which each is scheduled while the one before it runs.
namespace ts {
namespace {

/// Whatever throws, no step runs on without its batch.
class Landing {
 public:
  explicit Landing(StepThread &thread) : thread_(thread) {}
  ~Landing() {
    try {
      if (thread_.runs()) thread_.wait();
    } catch (...) {  // NOLINT(bugprone-empty-catch): what is thrown already says more
    }
  }
  Landing(const Landing &) = delete;
  Landing &operator=(const Landing &) = delete;

 private:
  StepThread &thread_;
};

}  // namespace

/// Runs `first`, and what is scheduled behind it, until there is nothing. A turn takes in what has come, schedules behind the step that
/// runs and waits for it, starts the next one, and commits.
void EngineCore::run_ahead(Batch &&first) {
  std::optional<Batch> older(std::move(first)), younger;
  const Landing landing(*step_thread_);
  publish(older->arrays().num_seqs);  // as a turn without overlap does
  uint64_t began_ns = start(*older);
  for (;;) {
    const bool goes_on = take_turn_behind(*older, younger);
    if (!finish_step(*older, younger, began_ns)) break;
    if (younger) {
      younger->fill(*older, outcomes_);
      began_ns = start(*younger);
    }
    const uint64_t begin = now_ns();
    scheduler_->commit(std::move(*older), outcomes_, took_ns_, younger ? &*younger : nullptr);
    schedule_ns_ += now_ns() - begin;
    if (!goes_on) start_over(nullptr);
    if (!younger) break;
    publish(younger->arrays().num_seqs);
    older.reset();
    older.emplace(std::move(*younger));
    younger.reset();
  }
}

/// Lets the step run. A replay does not where it differs, which is said when it is waited for.
uint64_t EngineCore::start(Batch &batch) {
  const auto num_groups = static_cast<int32_t>(limits_.groups.size());
  ++num_steps_;
  if (tape_.recorder) tape_.recorder->batch(num_steps_, batch, limits_.page_size, num_groups);
  if (tape_.replay) difference_ = tape_.replay->compare(num_steps_, batch, limits_.page_size, num_groups);
  if (tape_.replay && tape_.replay->restart()) throw std::runtime_error(*tape_.replay->restart());
  if (difference_.empty()) step_thread_->start(batch.arrays(), batch.copies());
  return now_ns();
}

/// A turn while `older` runs: what came, and the step behind it. False if the engine was abandoned.
bool EngineCore::take_turn_behind(Batch &older, std::optional<Batch> &younger) {
  events_.wait_for_room();
  tape_.replay ? take_replayed_turn() : take_turn(false);
  if (!turn_.failure.empty()) return false;
  enter(&older);
  const uint64_t begin = now_ns();
  if (std::optional<Batch> batch = scheduler_->schedule_ahead(older)) younger.emplace(std::move(*batch));
  schedule_ns_ += now_ns() - begin;
  publish(younger ? younger->arrays().num_seqs : older.arrays().num_seqs);
  if (tape_.replay && tape_.replay->scheduled() && !younger) {
    abandon("a step differs: the trace has one where this run has none", TS_DIFFERS);
  }
  return true;
}

/// Waits for the step and samples. False if it could not be run: then its requests have ended, and the step behind it will not run.
bool EngineCore::finish_step(Batch &older, std::optional<Batch> &younger, uint64_t began_ns) {
  const Replay *replay = tape_.replay.get();
  const auto demand_none = [](const std::string &difference) {
    if (!difference.empty()) fail(TS_DIFFERS, difference);
  };
  try {
    demand_none(std::exchange(difference_, {}));
    const Logits logits = step_thread_->wait();
    if (replay && replay->step_failure()) throw std::runtime_error(*replay->step_failure());
    if (replay) demand_none(replay->repeat(older.copies()));
    sample(older, logits);
    if (replay) demand_none(tape_.replay->compare(older, outcomes_));
  } catch (const std::exception &e) {
    outbox_.clear();
    if (tape_.recorder) tape_.recorder->failed(e.what());
    const std::string message = std::string("the step failed: ") + e.what();
    if (younger) {
      scheduler_->fail(std::move(older), std::move(*younger), message);
    } else {
      scheduler_->fail(std::move(older), message);
    }
    abandon_if_lost(e);
    return false;
  }
  const uint64_t end = now_ns();
  took_ns_ = replay ? replay->took_ns() : static_cast<int64_t>(end - began_ns);
  step_ns_ += end - began_ns;
  if (tape_.recorder) tape_.recorder->result(took_ns_, outcomes_, older.copies());
  if (replay && replay->restart() && !replay->scheduled()) throw std::runtime_error(*replay->restart());
  return true;
}

}  // namespace ts
