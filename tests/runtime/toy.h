#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine_core.h"
#include "request.h"
#include "sampler.h"
#include "scheduler.h"
#include "toy_model.h"

/// What it takes to drive a scheduler with the toy's model: the control plane's tests.
namespace toy {

/// A request as a test writes it, and the ts_request that points into it.
struct Request {
  uint64_t id = 0;
  std::vector<int32_t> prompt;
  int32_t max_tokens = 8;
  float temperature = 0;
  int32_t top_k = 0;
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  uint64_t seed = 0;
  std::vector<ts_logit_bias> logit_bias;
  std::vector<int32_t> stop;
  int32_t ignore_eos = 0;
  int32_t num_logprobs = -1;
  std::string cache_salt;
  int32_t lease_ms = 0;
  uint64_t session = 0;
  int32_t priority = 0;
  uint64_t tenant = 0;
  int32_t timeout_ms = 0;

  ts_request abi() const {
    ts_request r{};
    r.size = sizeof(r);
    r.id = id;
    r.prompt = prompt.data();
    r.num_prompt = static_cast<int32_t>(prompt.size());
    r.max_tokens = max_tokens;
    r.temperature = temperature;
    r.top_k = top_k;
    r.top_p = top_p;
    r.min_p = min_p;
    r.repetition_penalty = repetition_penalty;
    r.presence_penalty = presence_penalty;
    r.frequency_penalty = frequency_penalty;
    r.seed = seed;
    r.logit_bias = logit_bias.data();
    r.num_logit_bias = static_cast<int32_t>(logit_bias.size());
    r.stop_tokens = stop.data();
    r.num_stop_tokens = static_cast<int32_t>(stop.size());
    r.ignore_eos = ignore_eos;
    r.num_logprobs = num_logprobs;
    r.cache_salt = cache_salt.data();
    r.num_cache_salt = static_cast<int32_t>(cache_salt.size());
    r.lease_ms = lease_ms;
    r.session = session;
    r.priority = priority;
    r.tenant = tenant;
    r.timeout_ms = timeout_ms;
    return r;
  }
};

/// What a request has come to.
struct Result {
  std::vector<int32_t> tokens;
  std::optional<ts_finish> finish;
  int64_t ended_ms = 0;
  std::string message;
  int32_t num_cached = 0;
  int32_t num_restored = 0;
  ts::Miss miss;
};

inline std::vector<int32_t> tokens(int32_t n, uint64_t seed, int32_t vocab_size) {
  std::vector<int32_t> out;
  for (int32_t i = 0; i < n; ++i) {
    out.push_back(4 +
                  static_cast<int32_t>(mix(seed, static_cast<uint64_t>(i)) % static_cast<uint64_t>(vocab_size - 4)));
  }
  return out;
}

/// The same model without pages, batches or scheduler: what every run must give.
inline Result solo(const Request &request, const ts::EngineOptions &options) {
  const auto sequence = ts::make_sequence(request.abi(), ts::limits_of(options));
  ts::Sampler sampler(options.vocab_size);
  std::vector<float> logits(static_cast<size_t>(options.vocab_size));
  Result result;
  Layers layers(options.scheduler.groups);
  std::vector<std::vector<uint64_t>> values(options.scheduler.groups.size());  // [group][position]
  for (size_t p = 0;; ++p) {
    const uint64_t out = layers.step(
        sequence->tokens[p], static_cast<int32_t>(p),
        [&](size_t g, int32_t at) { return values[g][static_cast<size_t>(at)]; },
        [&](size_t g, uint64_t value) { values[g].push_back(value); });
    if (p + 1 < sequence->tokens.size()) continue;
    logits_of(out, layers.poisoned(), logits);
    const ts::Sampled sampled = sampler.sample(logits, sequence->sampling, sequence->counts.counts(),
                                               static_cast<uint64_t>(sequence->num_outputs()));
    if (!sampled.error.empty()) {
      result.finish = TS_FINISH_ERROR;
      return result;
    }
    result.tokens.push_back(sampled.token);
    sequence->append(sampled.token);
    if (sequence->finish()) {
      result.finish = sequence->finish();
      return result;
    }
  }
}

/// Scheduler, toy model and sampler in one thread. With SchedulerOptions::ahead each step is scheduled before the one that is in
/// flight runs, where the scheduler does that.
class Harness {
 public:
  explicit Harness(const ts::EngineOptions &options)
      : options_(options), scheduler(options.scheduler), model_(options), sampler_(options.vocab_size) {}

  ~Harness() {
    if (flight_) scheduler.fail(std::move(flight_->batch), "the test is over");
  }
  Harness(const Harness &) = delete;
  Harness &operator=(const Harness &) = delete;

  void submit(const Request &request) {
    results[request.id] = {};
    scheduler.submit(ts::make_sequence(request.abi(), ts::limits_of(options_)));
  }

  void cancel(uint64_t id) { scheduler.cancel(id, in_flight()); }

  void set_time(int64_t now) {
    now_ms = std::max(now_ms, now);
    scheduler.set_time(now, in_flight());
  }

  /// False if there was nothing to do. `check`: assert the scheduler's invariants after the step.
  bool step(bool check = true) {
    const bool any = schedule();
    if (any) {
      Flight older = std::move(*flight_);
      schedule_ahead(older);
      last_num_tokens = older.batch.arrays().num_tokens;
      last_num_seqs = older.batch.arrays().num_seqs;
      last_num_copies = older.batch.copies().size();
      copy(older.batch);
      sample(older.batch, last_num_tokens > 0 ? model_.run(older.batch.arrays()) : ts::Logits{});
      if (flight_) flight_->batch.fill(older.batch, outcomes_);
      if (on_commit) on_commit(older.batch);
      scheduler.commit(std::move(older.batch), outcomes_, older.took_ns, in_flight());
    }
    take_finished();
    if (check) scheduler.check(in_flight());
    return any;
  }

  /// The step that is next, or in flight, cannot be run.
  void fail(const std::string &message) {
    if (!schedule()) return;
    Flight older = std::move(*flight_);
    schedule_ahead(older);
    if (flight_) {
      scheduler.fail(std::move(older.batch), std::move(flight_->batch), message);
    } else {
      scheduler.fail(std::move(older.batch), message);
    }
    flight_.reset();
  }

  void run() {
    while (step()) {
    }
  }

  bool is_in_flight() const { return flight_.has_value(); }
  ts::Batch *in_flight() { return flight_ ? &flight_->batch : nullptr; }

 private:
  struct Flight {
    ts::Batch batch;
    int64_t took_ns;
  };

  /// The next step, unless it is in flight already. False if there is nothing to do.
  bool schedule() {
    if (!flight_) fly(scheduler.schedule());
    return flight_.has_value();
  }

  /// And the one behind it, which is in flight from then on.
  void schedule_ahead(Flight &older) {
    flight_.reset();
    if (options_.scheduler.ahead) fly(scheduler.schedule_ahead(older.batch));
    num_ahead += flight_ ? 1 : 0;
  }

  void fly(std::optional<ts::Batch> &&batch) {
    if (!batch) return;
    if (on_batch) on_batch(*batch);
    flight_.emplace(Flight{std::move(*batch), took_ns});
  }

  void sample(const ts::Batch &batch, const ts::Logits &logits) {
    outcomes_.clear();
    bool counts = true;
    for (int32_t i = 0; i < batch.num_logits(); ++i) {
      counts = batch.wants(i) && (counts || batch.ahead(i) == 0);
      if (!counts) {
        outcomes_.emplace_back();
        continue;
      }
      const ts::Sequence &s = batch.sequence(i);
      ts::Sampled sampled =
          sampler_.sample({logits.data + i * logits.stride, static_cast<size_t>(options_.vocab_size)}, s.sampling,
                          s.counts.counts(), static_cast<uint64_t>(s.num_outputs() + batch.ahead(i)));
      counts = sampled.error.empty() && batch.goes_on(i, sampled.token);
      if (sampled.error.empty()) {
        results.at(s.id).tokens.push_back(sampled.token);
        if (on_token) on_token(s.id);
      }
      outcomes_.push_back({sampled.token, std::move(sampled.error)});
    }
  }

  void take_finished() {
    scheduler.take_finished(finished_);
    for (const ts::Finished &f : finished_) {
      Result &result = results.at(f.id());
      EXPECT_FALSE(result.finish.has_value()) << "request " << f.id() << " finished twice";
      result.finish = f.finish();
      result.ended_ms = now_ms;
      result.message = f.message();
      result.num_cached = f.num_cached();
      result.num_restored = f.num_restored();
      result.miss = f.miss();
    }
  }

  ts::EngineOptions options_;

 public:
  ts::Scheduler scheduler;
  std::map<uint64_t, Result> results;
  int32_t last_num_tokens = 0;
  int32_t last_num_seqs = 0;
  size_t last_num_copies = 0;
  int64_t num_ahead = 0;  ///< steps that were scheduled while another was in flight
  int64_t now_ms = 0;
  int64_t took_ns = 0;  ///< what the scheduler is told that the step took: as it is once scheduled
  std::function<void(const ts::Batch &)> on_batch;   ///< once it is scheduled
  std::function<void(const ts::Batch &)> on_commit;  ///< of the oldest batch in flight
  std::function<void(uint64_t id)> on_token;
  std::function<bool(const ts::PageCopy &)> copy_fails;  ///< whether a copy to or from the second tier does

 private:
  void copy(ts::Batch &batch) {
    for (ts::PageCopy &copy : batch.copies()) model_.copy(copy, copy_fails && copy_fails(copy));
    for (int32_t row = 0; row < last_num_seqs; ++row) {
      if (!batch.has(row)) continue;
      const ts::Sequence &sequence = batch.running(row);
      if (sequence.num_restored == 0 || batch.decodes(row)) continue;
      model_.expect_content(batch.arrays(), row, sequence.tokens);
    }
  }

  Model model_;
  ts::Sampler sampler_;
  std::optional<Flight> flight_;
  std::vector<ts::Outcome> outcomes_;
  std::vector<ts::Finished> finished_;
};

/// A small engine: vocabulary 64, pages of 4 tokens.
inline ts::EngineOptions small() {
  ts::EngineOptions o;
  o.scheduler = {
      .token_budget = 32, .max_seqs = 16, .max_context = 128, .page_size = 4, .num_pages = 256, .prefix_cache = true};
  o.scheduler.cost = ts::StepCost({{1, 1000}, {32, 1010}}, 1, 1);  // so drafts are worth it
  o.vocab_size = 64;
  o.eos_token_ids = {1};
  return o;
}

/// Prompts of the same seed are alike; every other one samples.
inline Request request(uint64_t id, int32_t num_prompt, int32_t max_tokens, uint64_t prompt_seed = 0) {
  Request r;
  r.id = id;
  r.prompt = tokens(num_prompt, prompt_seed == 0 ? id + 100 : prompt_seed, 64);
  r.max_tokens = max_tokens;
  r.temperature = id % 2 == 0 ? 0.0F : 0.8F;
  r.seed = id;
  r.ignore_eos = 1;
  return r;
}

/// Whatever else ran, its output is what it gives alone.
inline void expect_solo(const Harness &h, const Request &r, const ts::EngineOptions &options) {
  const Result expected = solo(r, options);
  const Result &got = h.results.at(r.id);
  EXPECT_EQ(got.tokens, expected.tokens) << "request " << r.id;
  EXPECT_EQ(got.finish, expected.finish) << "request " << r.id;
}

}  // namespace toy
