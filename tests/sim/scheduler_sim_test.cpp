#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../runtime/toy.h"

/// Worlds of random size, driven by a seed: the real scheduler and pool, a toy model whose output depends on every
/// token that it reads through the page tables, and after each step every invariant. TS_SIM_SEED=n runs world n alone;
/// TS_SIM_STEPS=n sets how many steps all worlds take.
namespace ts {
namespace {

uint64_t environment(const char *name, uint64_t otherwise) {
  const char *value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtoull(value, nullptr, 10);
}

class World {
 public:
  explicit World(uint64_t seed)
      : random_(seed), options_(make_options()), harness_(options_), arrivals_(below(100) + 1) {}

  /// Random arrivals, cancels and failing steps for a while; then everything that lives must end.
  void run(int num_steps) {
    for (int i = 0; i < num_steps && !testing::Test::HasFailure(); ++i) {
      if (below(100) < arrivals_) arrive();
      if (one_in(20)) cancel();
      if (one_in(400)) fail_a_step();
      step();
    }
    int patience = 100000;
    while (harness_.step() && !testing::Test::HasFailure()) ASSERT_GT(--patience, 0) << "requests starve";
    ASSERT_TRUE(harness_.scheduler.idle());
    ASSERT_EQ(harness_.scheduler.pool().num_available(), options_.scheduler.num_pages) << "a page is lost";
    for (const toy::Request &request : requests_) compare(request);
  }

  uint64_t num_steps() const { return num_steps_; }
  const SchedulerCounters &counters() const { return harness_.scheduler.counters(); }

 private:
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(random_() % n); }
  bool one_in(uint32_t n) { return below(n) == 0; }
  int32_t between(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(below(static_cast<uint32_t>(high - low + 1)));
  }

  EngineOptions make_options() {
    EngineOptions o;
    o.vocab_size = 24;
    o.eos_token_ids = {1};
    o.scheduler.page_size = 1 << between(0, 3);
    o.scheduler.num_pages = between(2, 60 / o.scheduler.page_size + 4);
    o.scheduler.max_context = std::min(48, o.scheduler.num_pages * o.scheduler.page_size + 1);
    o.scheduler.token_budget = one_in(4) ? between(1, 3) : between(1, 24);
    o.scheduler.max_seqs = between(1, 8);
    o.scheduler.prefix_cache = !one_in(4);
    return o;
  }

  void arrive() {
    toy::Request r;
    r.id = requests_.size() + 1;
    const int32_t num_tokens_max = options_.scheduler.max_context;
    const int32_t num_prompt = between(1, one_in(3) ? num_tokens_max - 1 : std::min(12, num_tokens_max - 1));
    r.prompt = toy::tokens(num_prompt, between(1, 3), options_.vocab_size);  // few families: prefixes are shared
    if (one_in(2)) r.prompt[below(static_cast<uint32_t>(num_prompt))] = between(4, 23);
    if (one_in(25)) r.prompt[static_cast<size_t>(num_prompt) / 2] = toy::kPoison;  // often the same prompt again
    r.max_tokens = between(1, num_tokens_max - num_prompt);
    r.seed = below(4);
    r.temperature = one_in(2) ? 0.0F : 0.7F;
    r.top_k = one_in(2) ? 0 : 5;
    r.top_p = one_in(2) ? 1.0F : 0.8F;
    r.repetition_penalty = one_in(4) ? 1.3F : 1.0F;
    r.frequency_penalty = one_in(4) ? 0.5F : 0.0F;
    r.ignore_eos = one_in(2) ? 1 : 0;
    if (one_in(4)) r.stop = {between(4, 23)};
    requests_.push_back(r);
    cancelled_.push_back(false);
    harness_.submit(r);
  }

  void cancel() {
    if (requests_.empty()) return;
    const size_t recent = std::min<size_t>(requests_.size(), 12);
    const size_t at = requests_.size() - 1 - below(static_cast<uint32_t>(recent));
    harness_.scheduler.cancel(requests_[at].id);
    cancelled_[at] = true;
  }

  void fail_a_step() {
    auto batch = harness_.scheduler.schedule();
    if (batch) harness_.scheduler.fail(std::move(*batch), "failed");
  }

  void step() {
    harness_.step();
    ++num_steps_;
    const SchedulerOptions &o = options_.scheduler;
    EXPECT_LE(harness_.last_num_tokens, o.token_budget);
    EXPECT_LE(harness_.last_num_seqs, o.max_seqs);
  }

  /// The output is what the request gives alone; if it was ended early, the beginning of that.
  void compare(const toy::Request &request) {
    const toy::Result &got = harness_.results.at(request.id);
    const toy::Result expected = toy::solo(request, options_);
    ASSERT_TRUE(got.finish.has_value()) << "request " << request.id << " never ended";
    const auto poison = std::find(request.prompt.begin(), request.prompt.end(), toy::kPoison);
    ASSERT_LE(got.num_cached, poison - request.prompt.begin())
        << "request " << request.id << " found poison in the cache";
    const bool failed = got.finish == TS_FINISH_ERROR && got.message == "failed";
    const bool cancelled = got.finish == TS_FINISH_CANCELLED;
    if (!failed && !cancelled) {
      ASSERT_EQ(got.finish, expected.finish) << "request " << request.id;
      ASSERT_EQ(got.tokens, expected.tokens) << "request " << request.id;
      return;
    }
    ASSERT_TRUE(failed || cancelled_[request.id - 1]) << "request " << request.id << " was not cancelled by us";
    ASSERT_LE(got.tokens.size(), expected.tokens.size());
    ASSERT_TRUE(std::equal(got.tokens.begin(), got.tokens.end(), expected.tokens.begin())) << "request " << request.id;
  }

  std::mt19937_64 random_;
  EngineOptions options_;
  toy::Harness harness_;
  uint32_t arrivals_;  // in percent of the steps
  uint64_t num_steps_ = 0;
  std::vector<toy::Request> requests_;
  std::vector<bool> cancelled_;
};

std::array<char, 64> seed_line;  // what a broken invariant, which aborts, says last

void say_seed(int) {
  (void)!write(STDERR_FILENO, seed_line.data(), std::strlen(seed_line.data()));
  std::signal(SIGABRT, SIG_DFL);
}

TEST(SchedulerSim, RandomWorldsKeepEveryInvariant) {
  std::signal(SIGABRT, say_seed);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr uint64_t kSteps = 20'000;
#else
  constexpr uint64_t kSteps = 300'000;
#endif
  const bool one = std::getenv("TS_SIM_SEED") != nullptr;
  const uint64_t wanted = environment("TS_SIM_STEPS", kSteps);
  uint64_t steps = 0;
  SchedulerCounters sums;
  for (uint64_t seed = environment("TS_SIM_SEED", 1); steps < wanted; ++seed) {
    std::snprintf(seed_line.data(), seed_line.size(), "TS_SIM_SEED=%llu runs this world alone\n",
                  static_cast<unsigned long long>(seed));
    World world(seed);
    world.run(400);
    if (HasFailure()) {
      ADD_FAILURE() << seed_line.data();
      return;
    }
    steps += world.num_steps();
    sums.num_preemptions += world.counters().num_preemptions;
    sums.num_cached_tokens += world.counters().num_cached_tokens;
    sums.num_finished += world.counters().num_finished;
    if (one) return;
  }
  EXPECT_GT(sums.num_preemptions, wanted / 100) << "the worlds are too roomy to test preemption";
  EXPECT_GT(sums.num_cached_tokens, wanted / 10) << "the worlds share too little to test the prefix cache";
  RecordProperty("preemptions", std::to_string(sums.num_preemptions));
  RecordProperty("cached_tokens", std::to_string(sums.num_cached_tokens));
  RecordProperty("finished", std::to_string(sums.num_finished));
}

}  // namespace
}  // namespace ts
