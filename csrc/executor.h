#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "launch_abi.h"
#include "plan.h"
#include "program.h"
#include "ranks.h"

namespace ts {

struct ExecutorOptions {
  int32_t num_threads = 0;  ///< 0: every core this process may use
  int32_t num_pages = 0;    ///< 0: from kv_bytes
  int64_t kv_bytes = 0;     ///< 0: see ts_engine_options
  int32_t max_seqs = 0;     ///< for the default of kv_bytes; 0: the plan's limit
  std::string target;       ///< empty: the best that the host can run
  RankOptions ranks;        ///< for a plan of several
};

/// Runs one target's program: of a step's bucket the list of launches, over worker threads, with a barrier between launches.
/// Owns the arena and the KV cache. Not thread-safe: the step thread alone calls run().
///
/// A plan of several ranks has an executor in as many processes. Rank 0's run() publishes the batch, which lies in memory that
/// all share, and the others follow() it, launch by launch.
class Executor {
 public:
  /// Picks the target, checks the program against the plan, loads the kernels, verifies weights as the plan says, and binds
  /// every argument to its address. With several ranks it returns when all are ready. Throws Error (TS_BAD_PLAN, TS_NO_TARGET,
  /// TS_NO_MEMORY, TS_LOST_RANK).
  Executor(std::shared_ptr<const Plan> plan, const ExecutorOptions &options);
  ~Executor();
  Executor(const Executor &) = delete;
  Executor &operator=(const Executor &) = delete;

  /// One step. Blocks until the last launch is done. With several ranks the batch's arrays lie in batch_memory(). Throws Error
  /// (TS_LOST_RANK) if another rank is gone: then no step can be run any more.
  void run(const ts_batch &batch);

  /// A rank but 0 runs what rank 0 publishes, until that closes. Throws Error (TS_LOST_RANK).
  void follow();

  /// Rank 0: there will be no more steps, and the others' follow() returns. The destructor does it too.
  void end_steps();

  /// Where rank 0's batch arrays must lie; empty with one rank.
  std::span<int32_t> batch_memory() const;

  /// With several ranks: calls back once, from another thread, when one of them is gone. Null: no more.
  void on_failure(std::function<void(const std::string &message)> callback);

  /// Calls job(item, thread) once for each item below `count`, shared among the worker threads, with denormals kept. It
  /// must not throw.
  void share(int32_t count, const std::function<void(int32_t item, int thread)> &job);

  /// [num_logits, vocab_size] of the last run; row r begins at logits() + r * logits_stride().
  const float *logits() const;
  int64_t logits_stride() const;

  const Limits &limits() const;
  const std::vector<CacheGroup> &groups() const;
  int32_t num_pages() const;
  int32_t num_threads() const;
  const std::string &target() const;

 private:
  void publish(const ts_batch &batch);

  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace ts
