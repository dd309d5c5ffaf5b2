#include "workers.h"

#include <pthread.h>

#include <string>
#include <system_error>

#include "host.h"
#include "no_signals.h"
#include "text.h"

namespace ts {

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
  if (patience_.spin([&] { return round_.load(std::memory_order_acquire) != round; })) return;
  num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
  while (round_.load(std::memory_order_seq_cst) == round) round_.wait(round, std::memory_order_seq_cst);
  num_sleeping_.fetch_sub(1, std::memory_order_relaxed);
}

Workers::Workers(int num_threads) : Workers(num_threads, num_threads <= usable_cores() ? Patience::kMostTurns : 0) {}

Workers::Workers(int num_threads, int most_turns) : num_threads_(num_threads), barrier_(num_threads, most_turns) {
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

void Workers::share(int32_t count, const std::function<void(int32_t item, int thread)> &job) {
  std::atomic<int32_t> next = 0;
  auto take = [&](int thread, int, Barrier &) {
    const FloatMode float_mode(Denormals::keep);
    for (int32_t item = next++; item < count; item = next++) job(item, thread);
  };
  if (count > 1) {
    run(take);
  } else if (count == 1) {  // no other thread need wake
    const FloatMode float_mode(Denormals::keep);
    job(0, 0);
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
