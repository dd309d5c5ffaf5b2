#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cache_groups.h"
#include "launch_abi.h"
#include "plan.h"
#include "program.h"
#include "tier.h"

namespace ts {

struct ExecutorOptions;

/// What computes an engine's steps: a CPU (Executor), or a GPU (CudaExecutor). The step thread alone calls run() and share().
class Device {
 public:
  Device() = default;
  Device(const Device &) = delete;
  Device &operator=(const Device &) = delete;
  virtual ~Device() = default;

  /// One step. Blocks until its logits are there. Throws Error (TS_LOST_RANK) if no step can be run any more.
  virtual void run(const ts_batch &batch) = 0;

  /// The second tier of its KV cache, if it has one: makes a step's copies to and from it, in order, and sets each one's state; before
  /// the step is run. Throws as run does.
  virtual void copy(std::span<PageCopy> /*copies*/) {}
  virtual TierOptions tier() const { return {}; }

  /// [num_logits, vocab_size] of the last run, in the host's memory; row r begins at logits() + r * logits_stride().
  virtual const float *logits() const = 0;
  virtual int64_t logits_stride() const = 0;

  /// Calls job(item, thread) once for each item below `count`, shared among the host's worker threads, with denormals kept. It must
  /// not throw.
  virtual void share(int32_t count, const std::function<void(int32_t item, int thread)> &job) = 0;

  /// There will be no more steps.
  virtual void end_steps() {}

  /// Where the batch's arrays must lie; empty: anywhere.
  virtual std::span<int32_t> batch_memory() const { return {}; }

  /// Calls back once, from another thread, when no step can be run any more. Null: no more.
  virtual void on_failure(const std::function<void(const std::string &message)> & /*callback*/) {}

  virtual const Limits &limits() const = 0;
  virtual const std::vector<CacheGroup> &groups() const = 0;
  virtual int32_t num_pages() const = 0;
  virtual int32_t num_threads() const = 0;  ///< of share()
  virtual const std::string &target() const = 0;
};

/// Opens what runs the plan best: a GPU that one of its targets is for, else the CPU; or what the options name. Throws Error as
/// those do; TS_NO_TARGET, with what each needs, if nothing here runs it.
std::unique_ptr<Device> open_device(const std::shared_ptr<const Plan> &plan, const ExecutorOptions &options);

/// Throws Error (TS_INTERNAL) for a batch that leaves the limits.
void check_batch(const ts_batch &batch, const Limits &limits);

}  // namespace ts
