// The control plane without a model, for tests/bench/control.py, which loads this library: sequences decode, turns are
// admitted, and each call says how many seconds its timed part took. Pages hold 64 tokens; nobody reads their content.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "engine_core.h"
#include "request.h"
#include "scheduler.h"

namespace ts {
namespace {

constexpr int32_t kPageSize = 64;
constexpr int32_t kPromptVocab = 150'000;
constexpr int32_t kBudget = 8192;
constexpr int32_t kRoom = 16'384;  // tokens that a context may grow by

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

/// `num_tokens` ids, others for every `seed`.
std::vector<int32_t> prompt_of(int32_t num_tokens, uint64_t seed) {
  std::vector<int32_t> ids(static_cast<size_t>(num_tokens));
  uint64_t x = seed * 0x9E3779B97F4A7C15 + 1;
  for (int32_t &id : ids) {
    x = x * 6364136223846793005 + 1442695040888963407;
    id = static_cast<int32_t>((x >> 33) % kPromptVocab);
  }
  return ids;
}

ts_request request_of(uint64_t id, const std::vector<int32_t> &prompt, int32_t max_tokens) {
  ts_request r{};
  r.size = sizeof(r);
  r.id = id;
  r.prompt = prompt.data();
  r.num_prompt = static_cast<int32_t>(prompt.size());
  r.max_tokens = max_tokens;
  r.top_p = 1;
  r.repetition_penalty = 1;
  r.num_logprobs = -1;
  return r;
}

EngineOptions options_of(int32_t num_seqs, int32_t context, int32_t num_pages) {
  EngineOptions o;
  o.scheduler = {.token_budget = kBudget,
                 .max_seqs = num_seqs + 1,
                 .max_context = context + kRoom,
                 .page_size = kPageSize,
                 .num_pages = num_pages,
                 .prefix_cache = true};
  o.vocab_size = kPromptVocab;
  return o;
}

/// The scheduler in the caller's thread.
class Plane {
 public:
  Plane(int32_t num_seqs, int32_t context, int32_t num_pages)
      : context_(context),
        limits_(limits_of(options_of(num_seqs, context, num_pages))),
        scheduler_(options_of(num_seqs, context, num_pages).scheduler) {
    outcomes_.reserve(static_cast<size_t>(num_seqs) + 1);
  }
  ~Plane() { scheduler_.cancel_all(); }
  Plane(const Plane &) = delete;
  Plane &operator=(const Plane &) = delete;

  /// Sequences that decode for long, each a token longer than the last, so that every step crosses its share of pages.
  void decode(int32_t num_seqs) {
    for (int32_t i = 0; i < num_seqs; ++i) {
      submit(prompt_of(context_ + i % kPageSize, next_id_), kRoom - kPageSize);
      while (step() > num_decoding_ + 1) {
      }
      ++num_decoding_;
    }
  }

  /// Leaves no blank page: all are of sessions that have ended.
  void fill() {
    while (const int32_t num_blank = scheduler_.pool().num_blank()) {
      const int32_t num_pages = std::min(num_blank, context_ / kPageSize);
      submit(prompt_of(num_pages * kPageSize, next_id_), 1);
      while (step() > 0) {
      }
    }
  }

  double timed_step() {
    const Clock::time_point begin = Clock::now();
    step();
    return seconds_since(begin);
  }

  /// A session of `context` tokens has ended, and its next turn of `num_new` tokens comes. Adds to seconds[0] making the
  /// request, hashes included, [1] the step's schedule, [2] its commit.
  void admit(int32_t num_new, double *seconds) {
    if (session_.empty()) {
      session_ = prompt_of(context_, next_id_);
      submit(session_, 1);
      while (step() > num_decoding_) {
      }
    }
    std::vector<int32_t> prompt = session_;
    const std::vector<int32_t> turn = prompt_of(num_new, next_id_);
    prompt.insert(prompt.end(), turn.begin(), turn.end());
    const uint64_t id = next_id_;
    Clock::time_point begin = Clock::now();
    auto sequence = make_sequence(request_of(next_id_++, prompt, 8), limits_);
    seconds[0] += seconds_since(begin);
    begin = Clock::now();
    scheduler_.submit(std::move(sequence));
    std::optional<Batch> batch = scheduler_.schedule();
    seconds[1] += seconds_since(begin);
    begin = Clock::now();
    commit(std::move(*batch));
    seconds[2] += seconds_since(begin);
    scheduler_.cancel(id);
    scheduler_.take_finished(finished_);
  }

  /// Makes the request of a prompt of `context` tokens.
  double timed_request() {
    if (session_.empty()) session_ = prompt_of(context_, next_id_);
    const Clock::time_point begin = Clock::now();
    const auto sequence = make_sequence(request_of(next_id_++, session_, 8), limits_);
    return seconds_since(begin);
  }

 private:
  void submit(const std::vector<int32_t> &prompt, int32_t max_tokens) {
    scheduler_.submit(make_sequence(request_of(next_id_++, prompt, max_tokens), limits_));
  }

  /// Returns how many tokens it computed beyond what the sequences that decode for long have.
  int32_t step() {
    std::optional<Batch> batch = scheduler_.schedule();
    if (!batch) return 0;
    const int32_t num_tokens = batch->arrays().num_tokens;
    commit(std::move(*batch));
    return num_tokens;
  }

  void commit(Batch &&batch) {
    outcomes_.clear();
    for (int32_t i = 0; i < batch.num_logits(); ++i) outcomes_.push_back({next_token_++ % kPromptVocab, {}});
    scheduler_.commit(std::move(batch), outcomes_);
    scheduler_.take_finished(finished_);
  }

  int32_t context_;
  RequestLimits limits_;
  Scheduler scheduler_;
  std::vector<Outcome> outcomes_;
  std::vector<Finished> finished_;
  std::vector<int32_t> session_;
  uint64_t next_id_ = 1;
  int32_t next_token_ = 0;
  int32_t num_decoding_ = 0;
};

/// The engine's own step thread over a model that answers when it is told to. A turn is all that the thread does between two
/// runs of the model: sampling (of 16 logits), commit, events, inbox, schedule, batch arrays.
class Engine {
 public:
  Engine(int32_t num_seqs, int32_t context, int32_t num_pages) : num_seqs_(num_seqs), logits_(16) {
    EngineOptions options = options_of(num_seqs, context, num_pages);
    options.vocab_size = static_cast<int32_t>(logits_.size());
    core_ = std::make_unique<EngineCore>(options, [this](const ts_batch &batch) { return run(batch); });
    poller_ = std::thread([this] {
      std::vector<ts_event> events(256);
      while (core_->poll(events.data(), 256, -1) >= 0) {
      }
    });
    for (int32_t i = 0; i < num_seqs; ++i) {
      std::vector<int32_t> prompt = prompt_of(context + i % kPageSize, static_cast<uint64_t>(i));
      for (int32_t &id : prompt) id %= options.vocab_size;
      core_->submit(request_of(static_cast<uint64_t>(i) + 1, prompt, kRoom - kPageSize));
    }
    while (!all_decode_) one_turn();
  }
  ~Engine() {
    core_->close();
    num_wanted_ = INT64_MAX;
    num_wanted_.notify_all();
    poller_.join();
  }
  Engine(const Engine &) = delete;
  Engine &operator=(const Engine &) = delete;

  /// Lets the model answer, and returns how many seconds later it is asked again.
  double one_turn() {
    const int64_t turn = ++num_wanted_;
    num_wanted_.notify_all();
    for (int64_t done = num_turns_; done < turn; done = num_turns_) num_turns_.wait(done);
    return seconds_;
  }

 private:
  Logits run(const ts_batch &batch) {
    seconds_ = seconds_since(answered_);
    all_decode_ = batch.num_tokens == num_seqs_ && batch.num_seqs == num_seqs_;
    if (num_asked_++ > 0) ++num_turns_;
    num_turns_.notify_all();
    // A thread that computes a step is awake when it ends. It sleeps when no turn is asked for any more.
    const Clock::time_point begin = Clock::now();
    for (int64_t wanted = num_wanted_; wanted <= num_turns_; wanted = num_wanted_) {
      _mm_pause();
      if (seconds_since(begin) > 1e-3) num_wanted_.wait(wanted);
    }
    answered_ = Clock::now();
    return {logits_.data(), 0};
  }

  const int32_t num_seqs_;
  std::vector<float> logits_;
  std::atomic<int64_t> num_wanted_ = 0, num_turns_ = 0;
  // The step thread's; others read them once num_turns_ says so.
  double seconds_ = 0;
  bool all_decode_ = false;
  int64_t num_asked_ = 0;
  Clock::time_point answered_;
  std::unique_ptr<EngineCore> core_;
  std::thread poller_;
};

}  // namespace
}  // namespace ts

extern "C" {

void *plane_open(int32_t num_seqs, int32_t context, int32_t num_pages) {
  return new ts::Plane(num_seqs, context, num_pages);
}
void plane_close(void *plane) { delete static_cast<ts::Plane *>(plane); }
void plane_decode(void *plane, int32_t num_seqs) { static_cast<ts::Plane *>(plane)->decode(num_seqs); }
void plane_fill(void *plane) { static_cast<ts::Plane *>(plane)->fill(); }
double plane_step(void *plane) { return static_cast<ts::Plane *>(plane)->timed_step(); }
double plane_request(void *plane) { return static_cast<ts::Plane *>(plane)->timed_request(); }
void plane_admit(void *plane, int32_t num_new, double *seconds) {
  static_cast<ts::Plane *>(plane)->admit(num_new, seconds);
}

void *engine_open(int32_t num_seqs, int32_t context, int32_t num_pages) {
  return new ts::Engine(num_seqs, context, num_pages);
}
void engine_close(void *engine) { delete static_cast<ts::Engine *>(engine); }
double engine_turn(void *engine) { return static_cast<ts::Engine *>(engine)->one_turn(); }
}
