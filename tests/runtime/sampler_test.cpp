#include "sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "detmath.h"
#include "philox.h"

namespace ts {
namespace {

using Counts = std::vector<TokenCounts::Count>;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kScale = 1;
#else
constexpr int kScale = 5;
#endif

// ---- arithmetic -----------------------------------------------------------------------------------------------------

TEST(Detmath, ExpAndLogAreWithinAFewUlpsOfLibm) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> exponents(-700, 700);
  for (int i = 0; i < 40000 * kScale; ++i) {
    const double x = i % 2 == 0 ? exponents(random) : exponents(random) / 700;
    EXPECT_NEAR(detmath::exp(x) / std::exp(x), 1, 1e-15) << x;
    const double y = std::exp(x);
    EXPECT_NEAR(detmath::log(y), std::log(y), 4e-16 * std::max(1.0, std::abs(std::log(y)))) << y;
  }
  EXPECT_EQ(detmath::exp(0.0), 1.0);
  EXPECT_EQ(detmath::log(1.0), 0.0);
  EXPECT_EQ(detmath::exp(-709.0), 0.0);
  EXPECT_EQ(detmath::exp(-std::numeric_limits<double>::infinity()), 0.0);
}

/// Pins the bits: they must not change with compiler, flags or host.
TEST(Detmath, BitsArePinned) {
  uint64_t hash = 0;
  for (int i = 0; i < 10000; ++i) {
    hash = hash * 31 + std::bit_cast<uint64_t>(detmath::exp(-0.0713 * i));
    hash = hash * 31 + std::bit_cast<uint64_t>(detmath::log(1.0 + 0.137 * i));
  }
  EXPECT_EQ(hash, 0xdd45174dea46e3f4U) << std::hex << hash;
}

TEST(Philox, KnownAnswers) {  // the paper's own: kat_vectors of Random123
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const uint32_t ones = 0xffffffff;
  EXPECT_EQ(philox4x32({ones, ones, ones, ones}, {ones, ones}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// ---- a plain reference: sort everything, in long double -------------------------------------------------------------

struct Reference {
  std::vector<int32_t> kept;             // ascending
  std::vector<long double> probability;  // [vocab], 0 where not kept
};

std::vector<double> adjusted(const std::vector<float> &logits, const SamplingParams &p, const Counts &counts) {
  std::vector<double> z(logits.begin(), logits.end());
  for (const auto &[token, bias] : p.logit_bias) z[static_cast<size_t>(token)] += bias;
  for (const auto &[token, num_output] : counts) {
    double &x = z[static_cast<size_t>(token)];
    x = x > 0 ? x / p.repetition_penalty : x * p.repetition_penalty;
    if (num_output > 0) x -= p.frequency_penalty * num_output + p.presence_penalty;
  }
  return z;
}

Reference reference(const std::vector<float> &logits, const SamplingParams &p, const Counts &counts) {
  const std::vector<double> z = adjusted(logits, p, counts);
  std::vector<int32_t> order(z.size());
  std::iota(order.begin(), order.end(), 0);
  const auto at = [&](int32_t i) { return z[static_cast<size_t>(i)]; };
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return at(a) > at(b); });
  if (p.top_k > 0 && static_cast<size_t>(p.top_k) < order.size()) order.resize(static_cast<size_t>(p.top_k));
  std::vector<long double> w;
  w.reserve(order.size());
  for (const int32_t i : order) w.push_back(std::exp((static_cast<long double>(at(i)) - at(order[0])) / p.temperature));
  const long double sum = std::accumulate(w.begin(), w.end(), 0.0L);
  long double before = 0;
  size_t keep = 0;
  while (keep < order.size() && (p.top_p >= 1 || before < p.top_p * sum)) before += w[keep++];
  while (keep > 1 && w[keep - 1] < p.min_p) --keep;
  Reference r;
  r.probability.resize(z.size());
  const long double total = std::accumulate(w.begin(), w.begin() + static_cast<ptrdiff_t>(keep), 0.0L);
  for (size_t i = 0; i < keep; ++i) {
    r.probability[static_cast<size_t>(order[i])] = w[i] / total;
    r.kept.push_back(order[i]);
  }
  std::sort(r.kept.begin(), r.kept.end());
  return r;
}

/// The inverse of the cumulative probabilities, in order of ids.
int32_t reference_choice(const Reference &r, uint64_t seed, uint64_t position) {
  const long double u = static_cast<long double>(random_bits(seed, position)) / 0x1p64L;
  long double sum = 0;
  for (const int32_t i : r.kept) {
    sum += r.probability[static_cast<size_t>(i)];
    if (u < sum) return i;
  }
  return r.kept.back();
}

std::vector<float> random_logits(std::mt19937_64 &random, size_t size, float deviation) {
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> logits(size);
  for (float &x : logits) x = normal(random);
  return logits;
}

SamplingParams random_params(std::mt19937_64 &random, int32_t vocab_size) {
  const auto pick = [&](auto... values) {
    const std::array all{static_cast<double>(values)...};
    return all[random() % all.size()];
  };
  SamplingParams p;
  p.temperature = pick(0.2, 0.7, 1, 1.5);
  p.top_k = static_cast<int32_t>(pick(0, 0, 1, 2, 7, 50, vocab_size - 1, vocab_size, vocab_size + 5));
  p.top_p = static_cast<float>(pick(1, 1, 0.99, 0.9, 0.5, 0.01));
  p.min_p = static_cast<float>(pick(0, 0, 0.01, 0.2, 1));
  p.repetition_penalty = pick(1, 1, 1.2, 0.8);
  p.presence_penalty = pick(0, 0, 0.7, -0.4);
  p.frequency_penalty = pick(0, 0, 0.3, -0.2);
  p.seed = random();
  for (int32_t t = 0; t < vocab_size && p.temperature == 0.7; t += 5)
    p.logit_bias.push_back({t, static_cast<float>(pick(-100, -1, 2))});
  return p;
}

Counts random_counts(std::mt19937_64 &random, int32_t vocab_size) {
  Counts counts;
  for (int32_t t = 0; t < vocab_size; ++t) {
    if (random() % 3 == 0) counts.push_back({t, static_cast<int32_t>(random() % 4)});
  }
  return counts;
}

TEST(Sampler, ChoosesAsThePlainReference) {
  std::mt19937_64 random(3);
  int num_different = 0;
  for (int i = 0; i < 4000 * kScale; ++i) {
    const auto vocab_size = static_cast<int32_t>(1 + random() % 90);
    Sampler sampler(vocab_size);
    const std::vector<float> logits = random_logits(random, static_cast<size_t>(vocab_size), i % 2 == 0 ? 1.0F : 4.0F);
    const SamplingParams p = random_params(random, vocab_size);
    const Counts counts = p.has_penalties() ? random_counts(random, vocab_size) : Counts{};
    const Reference expected = reference(logits, p, counts);
    const int32_t token = sampler.sample(logits, p, counts, static_cast<uint64_t>(i)).token;
    EXPECT_TRUE(std::binary_search(expected.kept.begin(), expected.kept.end(), token))
        << "case " << i << " chose " << token << ", which the filters remove";
    num_different += token == reference_choice(expected, p.seed, static_cast<uint64_t>(i)) ? 0 : 1;
  }
  EXPECT_LE(num_different, 1) << "only a random number within 2^-40 of a boundary may fall to the other side";
}

TEST(Sampler, FrequenciesAreTheProbabilities) {
  std::mt19937_64 random(5);
  constexpr int32_t kVocab = 40;
  constexpr int kDraws = 20000 * kScale;
  Sampler sampler(kVocab);
  const std::vector<float> logits = random_logits(random, kVocab, 1.5F);
  for (const auto &[top_k, top_p, min_p] :
       {std::tuple{0, 1.0, 0.0}, {12, 1.0, 0.0}, {0, 0.8, 0.0}, {0, 1.0, 0.1}, {20, 0.9, 0.05}}) {
    SamplingParams p;
    p.temperature = 0.9;
    p.top_k = top_k;
    p.top_p = top_p;
    p.min_p = min_p;
    p.seed = 11;
    const Reference expected = reference(logits, p, {});
    std::vector<int> count(kVocab);
    for (int i = 0; i < kDraws; ++i)
      ++count[static_cast<size_t>(sampler.sample(logits, p, {}, static_cast<uint64_t>(i)).token)];
    double chi_squared = 0;
    for (const int32_t t : expected.kept) {
      const auto mean = static_cast<double>(expected.probability[static_cast<size_t>(t)]) * kDraws;
      const double off = count[static_cast<size_t>(t)] - mean;
      chi_squared += off * off / mean;
    }
    const auto freedom = static_cast<double>(expected.kept.size()) - 1;
    EXPECT_LT(chi_squared, freedom + 5 * std::sqrt(2 * freedom))
        << "top_k " << top_k << ", top_p " << top_p << ", min_p " << min_p;
  }
}

// ---- the parts ------------------------------------------------------------------------------------------------------

TEST(Sampler, GreedyTakesTheLowestOfEqualIds) {
  for (const size_t size : {1, 15, 16, 17, 1023, 1024, 1025, 5000}) {
    Sampler sampler(static_cast<int32_t>(size));
    std::vector<float> logits(size, -1.0F);
    EXPECT_EQ(sampler.sample(logits, {}, {}, 0).token, 0);
    for (const size_t best : {size / 3, size / 2, size - 1}) {
      std::fill(logits.begin(), logits.end(), -2.0F);
      for (size_t i = best; i < size; i += 7) logits[i] = 3.0F;
      EXPECT_EQ(sampler.sample(logits, {}, {}, 0).token, static_cast<int32_t>(best));
      SamplingParams top_1;
      top_1.temperature = 2;
      top_1.top_k = 1;
      EXPECT_EQ(sampler.sample(logits, top_1, {}, 0).token, static_cast<int32_t>(best)) << "top_k 1 is greedy";
    }
  }
}

TEST(Sampler, LowTemperatureAndExtremeLogitsStayFinite) {
  Sampler sampler(4);
  SamplingParams p;
  p.num_logprobs = 4;
  const float huge = std::numeric_limits<float>::max();
  for (const double temperature : {0.0, 1e-45, 1e-6, 1.0, 3e38}) {
    p.temperature = temperature;
    const Sampled sampled = sampler.sample(std::vector<float>{-huge, 1.0F, huge, 0.5F}, p, {}, 0);
    EXPECT_TRUE(sampled.error.empty());
    if (temperature <= 1.0) {
      EXPECT_EQ(sampled.token, 2);
    }
    EXPECT_EQ(sampled.top[0].logprob, 0.0F);
    EXPECT_TRUE(std::isfinite(sampled.top[1].logprob));
  }
}

TEST(Sampler, PenaltiesChangeTheGreedyChoice) {
  Sampler sampler(3);
  const std::vector<float> logits = {2.0F, 1.9F, -1.0F};
  const auto greedy = [&](auto set, const Counts &counts) {
    SamplingParams p;
    set(p);
    return sampler.sample(logits, p, counts, 0).token;
  };
  EXPECT_EQ(greedy([](auto &p) { p.repetition_penalty = 1.1; }, {{0, 0}}), 1) << "the prompt counts";
  EXPECT_EQ(greedy([](auto &p) { p.presence_penalty = 0.2; }, {{0, 0}}), 0) << "the prompt does not count";
  EXPECT_EQ(greedy([](auto &p) { p.presence_penalty = 0.2; }, {{0, 1}}), 1);
  EXPECT_EQ(greedy([](auto &p) { p.frequency_penalty = 0.04; }, {{0, 2}}), 0);
  EXPECT_EQ(greedy([](auto &p) { p.frequency_penalty = 0.04; }, {{0, 3}}), 1);
  EXPECT_EQ(greedy([](auto &p) { p.logit_bias = {{2, 3.5F}}; }, {}), 2);
}

TEST(Sampler, LogprobsAreTheModelsOwn) {
  std::mt19937_64 random(9);
  constexpr int32_t kVocab = 3001;
  Sampler sampler(kVocab);
  std::vector<float> logits = random_logits(random, kVocab, 3.0F);
  logits[17] = logits[2000] = 20.0F;
  logits[18] = -0.0F;
  logits[19] = 0.0F;
  long double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<long double>(x) - 20);
  SamplingParams p;
  p.temperature = 0.5;
  p.repetition_penalty = 1.5;
  p.logit_bias = {{5, 100.0F}};
  for (const int32_t num : {0, 1, 5, 300, kVocab}) {
    p.num_logprobs = num;
    const Sampled sampled = sampler.sample(logits, p, Counts{{17, 1}}, 0);
    EXPECT_EQ(sampled.token, 5);
    EXPECT_NEAR(sampled.logprob, static_cast<double>(logits[5] - 20 - std::log(sum)), 1e-6);
    ASSERT_EQ(sampled.top.size(), static_cast<size_t>(num));
    for (size_t i = 0; i < sampled.top.size(); ++i) {
      const auto &[token, logprob] = sampled.top[i];
      const float logit = logits[static_cast<size_t>(token)];
      EXPECT_NEAR(logprob, static_cast<double>(logit - 20 - std::log(sum)), 2e-6);
      if (i == 0) continue;
      const float before = logits[static_cast<size_t>(sampled.top[i - 1].token)];
      EXPECT_TRUE(before > logit || (before == logit && sampled.top[i - 1].token < token));
    }
    if (num >= 2) {
      EXPECT_EQ(sampled.top[0].token, 17);
      EXPECT_EQ(sampled.top[1].token, 2000);
    }
  }
}

TEST(Sampler, LogitsThatAreNotFiniteAreAnError) {
  Sampler sampler(40);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    for (const size_t at : {0, 16, 39}) {
      std::vector<float> logits(40, 1.0F);
      logits[at] = bad;
      const Sampled sampled = sampler.sample(logits, {}, {}, 7);
      EXPECT_EQ(sampled.token, -1);
      EXPECT_NE(sampled.error.find("output token 7"), std::string::npos);
      EXPECT_NE(sampled.error.find("token " + std::to_string(at) + " is"), std::string::npos) << sampled.error;
    }
  }
}

TEST(Sampler, DependsOnSeedAndPositionOnly) {
  std::mt19937_64 random(2);
  const std::vector<float> logits = random_logits(random, 500, 1.0F);
  const std::vector<float> others = random_logits(random, 500, 1.0F);
  SamplingParams p;
  p.temperature = 1;
  Sampler a(500);
  Sampler b(500);
  std::set<int32_t> seen;
  for (uint64_t position = 0; position < 50; ++position) {
    b.sample(others, p, {}, position);  // a different history
    const int32_t token = a.sample(logits, p, {}, position).token;
    EXPECT_EQ(token, b.sample(logits, p, {}, position).token);
    seen.insert(token);
  }
  EXPECT_GT(seen.size(), 30);
}

TEST(TokenCounts, CountsPromptAndOutputApart) {
  std::mt19937_64 random(4);
  TokenCounts counts;
  counts.reserve(1000);
  std::vector<int> expected(1000, -1);
  for (int i = 0; i < 5000; ++i) {
    const auto token = static_cast<int32_t>(random() % 1000);
    const bool output = random() % 2 == 0;
    counts.add(token, output);
    expected[static_cast<size_t>(token)] = std::max(expected[static_cast<size_t>(token)], 0) + (output ? 1 : 0);
  }
  for (const auto &[token, num_output] : counts.counts()) {
    EXPECT_EQ(num_output, expected[static_cast<size_t>(token)]);
    expected[static_cast<size_t>(token)] = -1;
  }
  EXPECT_EQ(std::count(expected.begin(), expected.end(), -1), 1000);
}

}  // namespace
}  // namespace ts
