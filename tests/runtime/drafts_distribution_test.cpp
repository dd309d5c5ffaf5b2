#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "toy.h"

/// Speculation does not change what is sampled: each output position has a random number of its own, so a request's tokens are those
/// that it gets without drafts, for every seed (toy::solo; tests/runtime/test_same_bits.py with kernels; the simulator). Two
/// random variables that are equal are equal in distribution, which is all that rejection sampling has. This test looks at the
/// distribution itself, without that argument: tokens that a draft led to against the model's own probabilities.
namespace ts {
namespace {

constexpr int32_t kVocab = 64, kOften = 6;  // tokens that are said often, so that drafts come true and fail

toy::Request request(uint64_t id) {
  toy::Request r;
  r.id = id;
  r.prompt = {9, 8, 7, 6, 5};
  r.max_tokens = 12;
  r.temperature = 1;
  r.seed = id;
  r.ignore_eos = 1;
  for (int32_t token = 10; token < 10 + kOften; ++token) r.logit_bias.push_back({token, 6});
  return r;
}

/// What the model says comes behind what it has read: `sum` of toy::value_of.
std::vector<double> probabilities(uint64_t sum) {
  std::vector<float> logits(kVocab);
  toy::logits_of(sum, false, logits);
  std::vector<double> p(kVocab);
  double total = 0;
  for (size_t v = 0; v < p.size(); ++v) {
    const double bias = v >= 10 && v < 10 + kOften ? 6 : 0;
    total += p[v] = std::exp(double{logits[v]} + bias);
  }
  for (double &each : p) each /= total;
  return p;
}

/// By token: how often it came, how often it should have, and the variance of that.
struct Tally {
  std::vector<double> came = std::vector<double>(kVocab), expected = came, variance = came;
  int64_t num_tokens = 0;

  void add(const std::vector<double> &p, int32_t token) {
    ++num_tokens;
    ++came[static_cast<size_t>(token)];
    for (size_t v = 0; v < p.size(); ++v) {
      expected[v] += p[v];
      variance[v] += p[v] * (1 - p[v]);
    }
  }

  /// The largest of the tokens that are expected at all, in standard deviations. Given what came before, each token's count less what
  /// was expected is 0 on average, so the sum over all positions is about normal.
  double farthest() const {
    double most = 0;
    for (size_t v = 0; v < came.size(); ++v) {
      if (expected[v] < 20) continue;
      most = std::max(most, std::abs(came[v] - expected[v]) / std::sqrt(variance[v]));
    }
    return most;
  }
};

TEST(Drafts, LeaveTheDistributionAsItIs) {
  EngineOptions o = toy::small();
  o.scheduler.max_draft = 8;
  o.scheduler.drafts_at_any_cost = true;
  toy::Harness h(o);
  std::vector<bool> ahead;  // by output of the running request: whether a draft led to it
  bool first = true;
  h.on_batch = [&](const Batch &) { first = true; };
  h.on_token = [&](uint64_t) {
    ahead.push_back(!first);
    first = false;
  };
  Tally drafted, all, as_if_even;
  for (uint64_t id = 1; id <= 3000; ++id) {
    const toy::Request r = request(id);
    ahead.clear();
    h.submit(r);
    while (h.step(false)) {
    }
    std::vector<int32_t> tokens = r.prompt;
    const std::vector<int32_t> &said = h.results.at(id).tokens;
    tokens.insert(tokens.end(), said.begin(), said.end());
    uint64_t sum = 0;
    for (size_t p = 0; p + 1 < tokens.size(); ++p) {
      sum += toy::value_of(tokens[p], static_cast<int32_t>(p), sum);
      if (p + 1 < r.prompt.size()) continue;
      const std::vector<double> expected = probabilities(sum);
      all.add(expected, tokens[p + 1]);
      if (ahead[p + 1 - r.prompt.size()]) drafted.add(expected, tokens[p + 1]);
      as_if_even.add(std::vector<double>(kVocab, 1.0 / kVocab), tokens[p + 1]);
    }
  }
  const SchedulerCounters &sums = h.scheduler.counters();
  EXPECT_GT(drafted.num_tokens, 3000);
  EXPECT_GT(sums.num_drafted_tokens, sums.num_accepted_tokens * 2) << "most drafts fail, which must not show";
  EXPECT_LT(all.farthest(), 4);
  EXPECT_LT(drafted.farthest(), 4);
  EXPECT_GT(as_if_even.farthest(), 20) << "a wrong distribution is seen";
}

}  // namespace
}  // namespace ts
