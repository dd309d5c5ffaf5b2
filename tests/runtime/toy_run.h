#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine_core.h"
#include "recording.h"
#include "toy_model.h"

/// Runs of the real engine around the toy's model, which may be written down and repeated.
namespace toy {

inline constexpr ts::Digest kPlan = {1, 2, 3};

/// An engine around the toy model, until its last event.
class ToyRun {
 public:
  using Hook = std::function<void(uint64_t step, ts::EngineCore &core)>;  // before each step, by the step thread

  using CopyFails = std::function<bool(const ts::PageCopy &copy)>;

  ToyRun(const ts::EngineOptions &options, ts::Tape tape, Hook hook = {}, int32_t shift = 0, CopyFails copy_fails = {})
      : model_(options),
        core(
            options,
            [this, hook = std::move(hook), shift](const ts_batch &batch) {
              while (!ready_) std::this_thread::yield();
              if (hook) hook(++num_steps_, core);
              ts::Logits logits = model_.run(batch);
              if (shift == 0) return logits;
              const float *end = logits.data + batch.num_logits * logits.stride;
              shifted_.assign(logits.data + shift, end);
              shifted_.resize(shifted_.size() + static_cast<size_t>(shift), -30.0F);
              logits.data = shifted_.data();
              return logits;
            },
            ts::SharedRows{1,
                           [this](int32_t count, const ts::RowJob &job) {
                             if (on_sample) on_sample(num_steps_);
                             for (int32_t row = 0; row < count; ++row) job(row, 0);
                           }},
            std::move(tape),
            [this, fails = std::move(copy_fails)](std::span<ts::PageCopy> copies) {
              for (ts::PageCopy &copy : copies) model_.copy(copy, fails && fails(copy));
            }) {
    ready_ = true;
  }

  void collect(size_t num_finished) {
    std::vector<ts_event> events(16);
    for (int32_t n = 0; num_finished > 0 && n >= 0;) {
      n = core.poll(events.data(), 16, 10000);
      for (int32_t i = 0; i < n; ++i) {
        const ts_event &e = events[static_cast<size_t>(i)];
        if (e.kind == TS_EVENT_TOKEN) tokens[e.id].push_back(e.token);
        if (e.kind != TS_EVENT_FINISHED) continue;
        finishes[e.id] = e.finish;
        if (e.finish == TS_FINISH_ERROR) message = e.message;
        --num_finished;
      }
    }
  }

  ts_stats stats() const {
    ts_stats s{};
    core.stats(s);
    return s;
  }

 private:
  Model model_;
  std::atomic<bool> ready_ = false;
  uint64_t num_steps_ = 0;
  std::vector<float> shifted_;  // logits of another model

 public:
  std::map<uint64_t, std::vector<int32_t>> tokens;
  std::map<uint64_t, int32_t> finishes;
  std::string message;  ///< of the last error
  std::function<void(uint64_t step)>
      on_sample;  ///< by the step thread, before it samples; set before the first request
  ts::EngineCore core;
};

inline ts::Tape recording(const std::string &file) {
  return {.recorder = std::make_unique<ts::Recorder>(file, ts::TraceHeader{kPlan, "toy", {}})};
}

inline ts::Tape replaying(const std::string &file) {
  auto reader = std::make_unique<ts::TraceReader>(file);
  ts::read_header(*reader, kPlan);
  return {.replay = std::make_unique<ts::Replay>(std::move(reader))};
}

}  // namespace toy
