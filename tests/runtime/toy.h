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

/// A tiny deterministic model over a real paged cache, and what it takes to drive a scheduler with it: the control
/// plane's tests.
namespace toy {

constexpr uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t x = (a ^ (b + 0x9E3779B97F4A7C15 + (a << 6) + (a >> 2))) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 31)) * 0x94D049BB133111EB;
  return x ^ (x >> 29);
}

/// What a token leaves in the cache depends on the token, its position, and everything before it.
inline uint64_t value_of(int32_t token, int32_t position, uint64_t sum_before) {
  return mix(mix(static_cast<uint64_t>(token), static_cast<uint64_t>(position)), sum_before);
}

/// Writing this token makes the logits of its whole context NaN.
constexpr int32_t kPoison = 3;
constexpr uint64_t kPoisonValue = 0xDEAD;

inline void logits_of(uint64_t value, bool poisoned, std::span<float> logits) {
  for (size_t i = 0; i < logits.size(); ++i) {
    logits[i] = static_cast<float>(mix(value, i) % 10007) / 1250.0F - 4.0F;
  }
  logits[kPoison] = -40;  // never an output
  if (poisoned) logits[logits.size() / 2] = std::numeric_limits<float>::quiet_NaN();
}

/// The toy's layers, one a cache group, along one text. Of the tokens that it sees, a full or a window group adds up the values; a
/// recurrent one mixes them, one after the other. A token's value depends on what all groups give, so one wrong value spoils all
/// that follow, as a layer's does; so does the poison.
class Layers {
 public:
  explicit Layers(std::span<const ts::CacheGroup> groups) : groups_(groups), sums_(groups.size()) {}

  uint64_t state(size_t group) const { return sums_[group]; }
  void set_state(size_t group, uint64_t state) { sums_[group] = state; }
  bool poisoned() const { return poisoned_; }  ///< the last token

  /// What a full group has of the tokens before those that follow.
  void add(size_t group, uint64_t value) {
    sums_[group] += value;
    seen_ = seen_ || is_poison(group, value);
  }

  /// The next token: read(group, position) gives a value of a paged group, write(group, value) takes the token's. What all groups
  /// give of it.
  template <class Read, class Write>
  uint64_t step(int32_t token, int32_t position, const Read &read, const Write &write) {
    uint64_t before = 0;
    bool poisoned = token == kPoison || seen_;
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (groups_[g].kind == ts::CacheGroup::Kind::window) {
        sums_[g] = 0;
        for (int32_t p = std::max(0, position - groups_[g].window + 1); p < position; ++p) {
          const uint64_t value = read(g, p);
          sums_[g] += value;
          poisoned = poisoned || is_poison(g, value);
        }
      }
      poisoned = poisoned || (groups_[g].recurrent() && sums_[g] == kPoisonValue);
      before += sums_[g];
    }
    const uint64_t value = poisoned ? kPoisonValue : value_of(token, position, before);
    uint64_t out = 0;
    poisoned_ = poisoned;
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (groups_[g].recurrent()) {
        sums_[g] = poisoned ? kPoisonValue : mix(sums_[g], value);
      } else {
        sums_[g] += value + g;
        seen_ = seen_ || (poisoned && groups_[g].kind == ts::CacheGroup::Kind::full);
        write(g, value + g);
      }
      out += sums_[g];
    }
    return out;
  }

 private:
  static bool is_poison(size_t group, uint64_t value) { return value == kPoisonValue + group; }

  std::span<const ts::CacheGroup> groups_;
  std::vector<uint64_t> sums_;  // a recurrent group's state
  bool poisoned_ = false;
  bool seen_ = false;  // poison, by a full group
};

class Model {
 public:
  explicit Model(const ts::EngineOptions &options)
      : groups_(options.scheduler.groups),
        vocab_size_(options.vocab_size),
        page_size_(options.scheduler.page_size),
        pages_each_(options.scheduler.num_pages),
        cache_(static_cast<size_t>(options.scheduler.num_owners * pages_each_ * page_size_)),
        writer_(static_cast<size_t>(options.scheduler.num_owners * pages_each_)),
        reader_(writer_.size()) {}

  ts::Logits run(const ts_batch &b) {
    check(b);
    logits_.resize(static_cast<size_t>(b.num_logits * vocab_size_));
    int32_t next_logit = 0;
    for (int32_t s = 0; s < b.num_seqs; ++s) {
      const auto slot_of = [&](size_t g, int32_t p) {
        return static_cast<size_t>(row(b, s, g)[p / page_size_] * page_size_ + p % page_size_);
      };
      const auto state_at = [&](size_t g, int32_t entry) -> uint64_t & {
        return cache_.at(static_cast<size_t>(row(b, s, g)[entry] * page_size_));
      };
      Layers layers(groups_);
      const int32_t begin = b.positions[b.query_start[s]];
      for (size_t g = 0; g < groups_.size(); ++g) {
        if (groups_[g].recurrent() && begin > 0) layers.set_state(g, state_at(g, 1));
        if (groups_[g].kind != ts::CacheGroup::Kind::full) continue;
        for (int32_t p = 0; p < begin; ++p) layers.add(g, cache_.at(slot_of(g, p)));
      }
      for (int32_t t = b.query_start[s]; t < b.query_start[s + 1]; ++t) {
        const int32_t p = b.positions[t];
        const auto read = [&](size_t g, int32_t at) { return cache_.at(slot_of(g, at)); };
        const auto write = [&](size_t g, uint64_t value) {
          const auto slot = static_cast<size_t>(b.slots[static_cast<ptrdiff_t>(g) * b.num_tokens + t]);
          EXPECT_EQ(slot_of(g, p), slot) << "the page table leads to where the token is written";
          cache_.at(slot) = value;
        };
        const uint64_t out = layers.step(b.token_ids[t], p, read, write);
        if (next_logit == b.num_logits || b.logit_rows[next_logit] != t) continue;
        logits_of(out, layers.poisoned(),
                  std::span(logits_).subspan(static_cast<size_t>(next_logit++ * vocab_size_),
                                             static_cast<size_t>(vocab_size_)));
      }
      for (size_t g = 0; g < groups_.size(); ++g) {
        if (groups_[g].recurrent()) state_at(g, 0) = layers.state(g);
      }
    }
    EXPECT_EQ(next_logit, b.num_logits) << "every row of logits is the last token of a sequence or in its middle";
    return {logits_.data(), vocab_size_};
  }

 private:
  const int32_t *row(const ts_batch &b, int32_t s, size_t group) const {
    const auto each = b.page_table_stride / static_cast<int32_t>(groups_.size());
    return b.page_table + static_cast<ptrdiff_t>(s) * b.page_table_stride + static_cast<ptrdiff_t>(group) * each;
  }

  /// What launch_abi.h and cache_groups.h promise to kernels, and that no two write one page, and none reads what another writes:
  /// no two sequences, nor two groups.
  void check(const ts_batch &b) {
    ASSERT_GE(b.num_seqs, 1);
    ASSERT_EQ(b.query_start[0], 0);
    ASSERT_EQ(b.query_start[b.num_seqs], b.num_tokens);
    std::fill(writer_.begin(), writer_.end(), -1);
    std::fill(reader_.begin(), reader_.end(), -1);
    for (int32_t s = 0; s < b.num_seqs; ++s) {
      const int32_t begin = b.query_start[s];
      const int32_t end = b.query_start[s + 1];
      ASSERT_LT(begin, end) << "a sequence without tokens";
      for (int32_t t = begin; t < end; ++t) {
        ASSERT_EQ(b.positions[t], b.context_len[s] - (end - t));
        ASSERT_TRUE(b.token_ids[t] >= 0 && b.token_ids[t] < vocab_size_);
        for (size_t g = 0; g < groups_.size(); ++g) {
          const int32_t page = b.slots[static_cast<ptrdiff_t>(g) * b.num_tokens + t] / page_size_;
          int32_t &writer = writer_.at(static_cast<size_t>(page));
          ASSERT_TRUE(writer == -1 || writer == who(s, g)) << "two write a page";
          writer = who(s, g);
          if (!groups_[g].recurrent()) continue;
          ASSERT_EQ(page, row(b, s, g)[0]) << "a state is written elsewhere than its page";
        }
      }
    }
    int32_t last_owner = 0;
    for (int32_t s = 0; s < b.num_seqs; ++s) {
      const int32_t owner = b.slots[b.query_start[s]] / page_size_ / pages_each_;
      ASSERT_GE(owner, last_owner) << "sequences are not sorted by owner";
      last_owner = owner;
      for (size_t g = 0; g < groups_.size(); ++g) check_reads(b, s, g, owner);
    }
  }

  void check_reads(const ts_batch &b, int32_t s, size_t g, int32_t owner) {
    const int32_t *pages = row(b, s, g);
    const int32_t position = b.positions[b.query_start[s]];
    int32_t first = 1, end = position > 0 ? 2 : 1;  // a state's
    if (!groups_[g].recurrent()) {
      first = groups_[g].first_page(position, page_size_);
      end = ts::num_pages_for(b.context_len[s], page_size_);
      const int32_t full = position / page_size_ * page_size_;
      for (int32_t i = 0; i < groups_[g].first_page(full, page_size_); ++i) {
        ASSERT_EQ(pages[i], ts::CacheGroup::kNoPage) << "a page is kept too long";
      }
    }
    for (int32_t i = first; i < end; ++i) {
      ASSERT_GE(pages[i], 0) << "a page that is read was given back";
      const auto page = static_cast<size_t>(pages[i]);
      ASSERT_EQ(pages[i] / pages_each_, owner) << "a page is not its sequence's owner's";
      ASSERT_TRUE(reader_.at(page) / kMostGroups != s || reader_[page] < 0) << "a page is twice in a context";
      reader_[page] = who(s, g);
      ASSERT_TRUE(writer_[page] == -1 || writer_[page] == who(s, g)) << "a page is read while another writes it";
    }
  }

  static constexpr int32_t kMostGroups = 16;
  static int32_t who(int32_t sequence, size_t group) { return sequence * kMostGroups + static_cast<int32_t>(group); }

  std::vector<ts::CacheGroup> groups_;
  int32_t vocab_size_;
  int32_t page_size_;
  int32_t pages_each_;           // of each owner
  std::vector<uint64_t> cache_;  // [num_pages * page_size], of all owners and groups; a state is the first of its page
  std::vector<int32_t> writer_;  // [num_pages] who of this step, or -1
  std::vector<int32_t> reader_;  // [num_pages]
  std::vector<float> logits_;
};

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

/// Scheduler, toy model and sampler in one thread.
class Harness {
 public:
  explicit Harness(const ts::EngineOptions &options)
      : options_(options), scheduler(options.scheduler), model_(options), sampler_(options.vocab_size) {}

  void submit(const Request &request) {
    results[request.id] = {};
    scheduler.submit(ts::make_sequence(request.abi(), ts::limits_of(options_)));
  }

  void set_time(int64_t now) {
    now_ms = std::max(now_ms, now);
    scheduler.set_time(now);
  }

  /// False if there was nothing to do. `check`: assert the scheduler's invariants after the step.
  bool step(bool check = true) {
    auto batch = scheduler.schedule();
    if (batch) {
      if (on_batch) on_batch(*batch);
      last_num_tokens = batch->arrays().num_tokens;
      last_num_seqs = batch->arrays().num_seqs;
      const ts::Logits logits = model_.run(batch->arrays());
      outcomes_.clear();
      bool counts = true;
      for (int32_t i = 0; i < batch->num_logits(); ++i) {
        counts = counts || batch->ahead(i) == 0;
        if (!counts) {
          outcomes_.emplace_back();
          continue;
        }
        const ts::Sequence &s = batch->sequence(i);
        ts::Sampled sampled =
            sampler_.sample({logits.data + i * logits.stride, static_cast<size_t>(options_.vocab_size)}, s.sampling,
                            s.counts.counts(), static_cast<uint64_t>(s.num_outputs() + batch->ahead(i)));
        counts = sampled.error.empty() && batch->goes_on(i, sampled.token);
        if (sampled.error.empty()) {
          results.at(s.id).tokens.push_back(sampled.token);
          if (on_token) on_token(s.id);
        }
        outcomes_.push_back({sampled.token, std::move(sampled.error)});
      }
      scheduler.commit(std::move(*batch), outcomes_, took_ns);
    }
    scheduler.take_finished(finished_);
    for (const ts::Finished &f : finished_) {
      Result &result = results.at(f.id());
      EXPECT_FALSE(result.finish.has_value()) << "request " << f.id() << " finished twice";
      result.finish = f.finish();
      result.ended_ms = now_ms;
      result.message = f.message();
      result.num_cached = f.num_cached();
      result.miss = f.miss();
    }
    if (check) scheduler.check();
    return batch.has_value();
  }

  void run() {
    while (step()) {
    }
  }

 private:
  ts::EngineOptions options_;

 public:
  ts::Scheduler scheduler;
  std::map<uint64_t, Result> results;
  int32_t last_num_tokens = 0;
  int32_t last_num_seqs = 0;
  int64_t now_ms = 0;
  int64_t took_ns = 0;                              ///< what the scheduler is told that the step took
  std::function<void(const ts::Batch &)> on_batch;  ///< once it is scheduled
  std::function<void(uint64_t id)> on_token;

 private:
  Model model_;
  ts::Sampler sampler_;
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
