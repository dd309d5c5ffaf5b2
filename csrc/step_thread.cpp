#include "step_thread.h"

#include <pthread.h>

#include <system_error>
#include <utility>

#include "check.h"
#include "no_signals.h"
#include "text.h"

namespace ts {

StepThread::StepThread(RunStep run, CopyPages copy, int most_turns)
    : run_(std::move(run)), copy_(std::move(copy)), barrier_(2, most_turns) {
  const NoSignals no_signals;
  try {
    thread_ = std::thread([this] { work(); });
  } catch (const std::system_error &e) {
    fail(TS_INTERNAL, "cannot start the thread that runs steps: ", e.what());
  }
  pthread_setname_np(thread_.native_handle(), "ts-step");
}

StepThread::~StepThread() {
  if (runs()) barrier_.wait();
  quits_ = true;
  barrier_.wait();
  thread_.join();
}

void StepThread::start(const ts_batch &batch, std::span<PageCopy> copies) {
  TS_ASSERT(!runs(), "one step at a time");
  batch_ = &batch;
  copies_ = copies;
  barrier_.wait();
}

Logits StepThread::wait() {
  TS_ASSERT(runs(), "a step is started before it is waited for");
  barrier_.wait();
  batch_ = nullptr;
  if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
  return logits_;
}

void StepThread::work() {
  for (;;) {
    barrier_.wait();
    if (quits_) return;
    try {
      if (!copies_.empty()) copy_(copies_);
      logits_ = batch_->num_tokens > 0 ? run_(*batch_) : Logits{};
    } catch (...) {
      thrown_ = std::current_exception();
    }
    barrier_.wait();
  }
}

}  // namespace ts
