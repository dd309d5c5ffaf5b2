#include "workers.h"

#include <immintrin.h>
#include <pthread.h>

#include <algorithm>
#include <csignal>
#include <string>
#include <system_error>

#include "host.h"
#include "text.h"

namespace ts {
namespace {

// Turns of a pause, 25 to 60 ns each: long enough to bridge the time between launches and between steps, short enough that
// an idle engine rests. Where others want the cores too, spinning only takes time from the thread that is waited for: each wait
// that had to sleep halves the turns, and waits that did not bring them back step by step.
constexpr int kMostSpins = 4000;
constexpr int kFewestSpins = 32;
constexpr int kMoreSpins = 64;

/// Blocks every signal on this thread while it lives, and so on threads that it starts: handlers belong to the process, not to us.
class NoSignals {
 public:
  NoSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  NoSignals(const NoSignals &) = delete;
  NoSignals &operator=(const NoSignals &) = delete;

 private:
  sigset_t before_{};
};

}  // namespace

void Barrier::wait() {
  if (num_threads_ == 1) return;
  const int32_t round = round_.load(std::memory_order_relaxed);  // cannot change before this thread arrives
  if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
    num_arrived_.store(0, std::memory_order_relaxed);  // seen by whoever sees the new round
    // Sequentially consistent, as below: either this thread sees the sleeper, or the sleeper sees the new round.
    round_.store(static_cast<int32_t>(static_cast<uint32_t>(round) + 1), std::memory_order_seq_cst);
    if (num_sleeping_.load(std::memory_order_seq_cst) > 0) round_.notify_all();
    return;
  }
  const int spins = spins_.load(std::memory_order_relaxed);
  for (int i = 0; i < spins; ++i) {
    if (round_.load(std::memory_order_acquire) != round) {
      if (spins < max_spins_) spins_.store(std::min(spins + kMoreSpins, max_spins_), std::memory_order_relaxed);
      return;
    }
    _mm_pause();
  }
  spins_.store(std::min(std::max(spins / 2, kFewestSpins), max_spins_), std::memory_order_relaxed);
  num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
  while (round_.load(std::memory_order_seq_cst) == round) round_.wait(round, std::memory_order_seq_cst);
  num_sleeping_.fetch_sub(1, std::memory_order_relaxed);
}

Workers::Workers(int num_threads)
    : num_threads_(num_threads), barrier_(num_threads, num_threads <= usable_cores() ? kMostSpins : 0) {
  const NoSignals no_signals;
  try {
    threads_.reserve(num_threads - 1);
    for (int i = 1; i < num_threads; ++i) {
      threads_.emplace_back([this, i] { work(i); });
      const std::string name = "ts-worker-" + std::to_string(i);
      pthread_setname_np(threads_.back().native_handle(), name.c_str());
    }
  } catch (const std::system_error &e) {
    start(kQuit);
    for (std::thread &thread : threads_) thread.join();
    fail(TS_INTERNAL, "cannot start thread ", threads_.size() + 1, " of ", num_threads, ": ", e.what());
  }
  start(kGo);
}

Workers::~Workers() {
  call_ = nullptr;
  barrier_.wait();
  for (std::thread &thread : threads_) thread.join();
}

void Workers::start(int32_t order) {
  order_.store(order);
  order_.notify_all();
}

void Workers::work(int thread) {
  order_.wait(kWait);
  if (order_.load() == kQuit) return;
  const FloatMode float_mode(Denormals::flush);
  for (;;) {
    barrier_.wait();
    if (call_ == nullptr) return;
    call_(context_, thread, num_threads_, barrier_);
    barrier_.wait();
  }
}

void Workers::run_erased(Call call, void *context) {
  const FloatMode float_mode(Denormals::flush);
  call_ = call;
  context_ = context;
  barrier_.wait();
  call(context, 0, num_threads_, barrier_);
  barrier_.wait();
}

}  // namespace ts
