#pragma once

#include <exception>
#include <functional>
#include <span>
#include <thread>

#include "launch_abi.h"
#include "tier.h"
#include "workers.h"

namespace ts {

/// [num_logits, vocab_size]: row r begins at data + r * stride. Valid until the next step.
struct Logits {
  const float *data = nullptr;
  int64_t stride = 0;
};

/// What computes a step: the executor, or a test's model. Called by one thread at a time. An exception ends the
/// requests of the step.
using RunStep = std::function<Logits(const ts_batch &)>;

/// What copies pages to and from the second tier, in order, before the step is run: it sets each one's state. As RunStep.
using CopyPages = std::function<void(std::span<PageCopy>)>;

/// A thread that runs one step at a time, while the one that started it schedules the next.
class StepThread {
 public:
  /// All signals are blocked in it. `most_turns`: see Patience. Throws Error (TS_INTERNAL) if the system has no more threads.
  StepThread(RunStep run, CopyPages copy, int most_turns);
  ~StepThread();  ///< waits for the step, if one runs
  StepThread(const StepThread &) = delete;
  StepThread &operator=(const StepThread &) = delete;

  bool runs() const { return batch_ != nullptr; }

  /// Makes the copies, and runs the batch, if it has tokens. Both live until the step is waited for. No step runs.
  void start(const ts_batch &batch, std::span<PageCopy> copies);

  /// What the step gave, or throws what it threw. A step runs.
  Logits wait();

 private:
  void work();

  const RunStep run_;
  const CopyPages copy_;
  Barrier barrier_;
  bool quits_ = false;
  const ts_batch *batch_ = nullptr;  // the step that runs
  std::span<PageCopy> copies_;
  Logits logits_;
  std::exception_ptr thrown_;
  std::thread thread_;  // last: it starts when the rest is there
};

}  // namespace ts
