#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "device.h"
#include "launch_abi.h"
#include "plan.h"
#include "program.h"
#include "ranks.h"
#include "tier.h"

namespace ts {

struct ExecutorOptions {
  int32_t num_threads = 0;     ///< 0: every core this process may use
  int32_t num_pages = 0;       ///< 0: from kv_bytes
  int64_t kv_bytes = 0;        ///< 0: see ts_engine_options
  int32_t max_seqs = 0;        ///< for the default of kv_bytes; 0: the plan's limit
  int64_t offload_bytes = 0;   ///< of the second tier; 0: there is none
  std::string offload_folder;  ///< where it lies; empty: in memory
  std::string target;          ///< empty: the best that the host can run
  std::string cuda_library;    ///< the file of NVIDIA's driver; empty: where the system finds it
  RankOptions ranks;           ///< for a plan of several
};

/// Threads that compute: so many, or with 0 every core that this process may use. Throws Error (TS_BAD_REQUEST).
int choose_threads(int wanted);

/// Runs one target's program on a CPU: of a step's bucket the list of launches, over worker threads, with a barrier between launches.
/// Owns the arena and the KV cache. Not thread-safe: the step thread alone calls run().
///
/// A plan of several ranks has an executor in as many processes. Rank 0's run() publishes the batch, which lies in memory that
/// all share, and the others follow() it, launch by launch.
class Executor : public Device {
 public:
  /// Picks the target, checks the program against the plan, loads the kernels, verifies weights as the plan says, and binds
  /// every argument to its address. With several ranks it returns when all are ready. Throws Error (TS_BAD_PLAN, TS_NO_TARGET,
  /// TS_NO_MEMORY, TS_LOST_RANK).
  Executor(std::shared_ptr<const Plan> plan, const ExecutorOptions &options);
  ~Executor() override;

  /// One step. Blocks until the last launch is done. With several ranks the batch's arrays lie in batch_memory(). Throws Error
  /// (TS_LOST_RANK) if another rank is gone: then no step can be run any more.
  void run(const ts_batch &batch) override;

  void copy(std::span<PageCopy> copies) override;
  TierOptions tier() const override;

  /// A rank but 0 runs and copies what rank 0 publishes, until that closes. Throws Error (TS_LOST_RANK).
  void follow();

  /// Rank 0: there will be no more steps, and the others' follow() returns. The destructor does it too.
  void end_steps() override;

  /// Where rank 0's batch arrays must lie; empty with one rank.
  std::span<int32_t> batch_memory() const override;

  /// With several ranks: calls back once, from another thread, when one of them is gone. Null: no more.
  void on_failure(const std::function<void(const std::string &message)> &callback) override;

  void share(int32_t count, const std::function<void(int32_t item, int thread)> &job) override;

  const float *logits() const override;
  int64_t logits_stride() const override;

  const Limits &limits() const override;
  const std::vector<CacheGroup> &groups() const override;
  int32_t num_pages() const override;
  int32_t num_threads() const override;
  const std::string &target() const override;

 private:
  void publish(const ts_batch &batch);
  void publish(std::span<const PageCopy> copies);

  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace ts
