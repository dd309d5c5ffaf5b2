#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "patience.h"

namespace ts {

/// Where a fixed number of threads wait for each other, again and again. A thread that waits spins for a short while, then
/// sleeps.
class Barrier {
 public:
  /// `most_turns`: see Patience.
  Barrier(int num_threads, int most_turns) : num_threads_(num_threads), patience_(most_turns) {}

  /// Returns once all threads have called it. What each did before is seen by all after.
  void wait();

 private:
  const int num_threads_;
  Patience patience_;
  // On lines of their own, so that arriving does not slow those who watch the round.
  alignas(64) std::atomic<int32_t> num_arrived_ = 0;
  alignas(64) std::atomic<int32_t> round_ = 0;
  std::atomic<int32_t> num_sleeping_ = 0;
};

/// Threads that run one job at a time together with the caller, who is thread 0. All run it in the kernels' float mode.
class Workers {
 public:
  /// Starts num_threads - 1 threads, all signals blocked. `most_turns`: see Patience. Throws Error (TS_INTERNAL) if the
  /// system has no more.
  Workers(int num_threads, int most_turns);
  explicit Workers(int num_threads);  ///< that have the usable cores to themselves
  ~Workers();
  Workers(const Workers &) = delete;
  Workers &operator=(const Workers &) = delete;

  int num_threads() const { return num_threads_; }

  /// Calls job(thread, num_threads, barrier) on every thread; it must not throw. Returns when all are done. One caller at
  /// a time.
  template <class Job>
  void run(Job &job) {
    run_erased([](void *context, int thread, int num_threads,
                  Barrier &barrier) noexcept { (*static_cast<Job *>(context))(thread, num_threads, barrier); },
               &job);
  }

  /// Calls job(item, thread) once for each item below `count`, shared among the threads, with denormals kept. It must not throw.
  void share(int32_t count, const std::function<void(int32_t item, int thread)> &job);

 private:
  using Call = void (*)(void *context, int thread, int num_threads, Barrier &barrier) noexcept;

  void run_erased(Call call, void *context);
  void work(int thread);
  void start(int32_t order);

  static constexpr int32_t kWait = 0, kGo = 1, kQuit = 2;

  const int num_threads_;
  Barrier barrier_;
  std::atomic<int32_t> order_ = kWait;  // what a new thread does first
  Call call_ = nullptr;                 // the job; null ends the threads
  void *context_ = nullptr;
  std::vector<std::thread> threads_;
};

}  // namespace ts
