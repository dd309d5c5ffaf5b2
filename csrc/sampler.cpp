#include "sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <sstream>
#include <type_traits>

#include "check.h"
#include "detmath.h"
#include "philox.h"

namespace ts {
namespace {

constexpr int kWeightBits = 42;  // with at most 2^20 tokens, sums fit 63 bits
constexpr uint64_t kOne = uint64_t{1} << kWeightBits;

struct Best {
  int32_t token = 0;  // of the largest logit; the lowest of equals
  bool finite = true;
};

/// One pass in lanes, a block at a time; then the best block once more.
Best find_best(std::span<const float> x) {
  constexpr size_t kLanes = 16;
  constexpr size_t kBlock = 1024;
  Best best;
  float best_value = x[0];
  size_t best_block = 0;
  for (size_t begin = 0; begin < x.size(); begin += kBlock) {
    const std::span<const float> block = x.subspan(begin, std::min(kBlock, x.size() - begin));
    std::array<float, kLanes> max;
    std::array<float, kLanes> zero{};  // x * 0 is NaN for infinities and NaN
    max.fill(block[0]);
    size_t i = 0;
    for (; i + kLanes <= block.size(); i += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const float value = block[i + lane];
        max[lane] = value > max[lane] ? value : max[lane];
        zero[lane] += value * 0.0F;
      }
    }
    for (; i < block.size(); ++i) {
      max[0] = std::max(max[0], block[i]);
      zero[0] += block[i] * 0.0F;
    }
    for (size_t lane = 0; lane < kLanes; ++lane) {
      best.finite = best.finite && zero[lane] == 0.0F;
      if (max[lane] > best_value) {
        best_value = max[lane];
        best_block = begin;
      }
    }
  }
  const auto from = x.begin() + static_cast<ptrdiff_t>(best_block);
  best.token = static_cast<int32_t>(std::find(from, x.end(), best_value) - x.begin());
  return best;
}

std::string not_finite(std::span<const float> logits, uint64_t position) {
  const auto bad = std::find_if(logits.begin(), logits.end(), [](float x) { return !std::isfinite(x); });
  std::ostringstream message;
  message << "the model's logits for output token " << position << " are not finite: that of token "
          << bad - logits.begin() << " is " << *bad;
  return message.str();
}

/// sum of exp(x - max), in a fixed order: lane i takes elements i, i + 8, ...; then lanes are added in a tree.
double sum_exp(std::span<const float> x, double max) {
  constexpr size_t kPairs = 4;
  std::array<detmath::Pair, kPairs> sums{};
  size_t i = 0;
  const auto add = [&](size_t pair, float a, float b) { sums[pair] += detmath::exp(detmath::Pair{a, b} - max); };
  for (; i + 2 * kPairs <= x.size(); i += 2 * kPairs) {
    for (size_t pair = 0; pair < kPairs; ++pair) add(pair, x[i + 2 * pair], x[i + 2 * pair + 1]);
  }
  for (size_t pair = 0; i < x.size(); i += 2, ++pair) add(pair, x[i], i + 1 < x.size() ? x[i + 1] : -INFINITY);
  const detmath::Pair total = (sums[0] + sums[2]) + (sums[1] + sums[3]);
  return total[0] + total[1];
}

/// The k likeliest tokens, in no order, into `best`. One pass; what cannot be among them any more is thrown out whenever 2 k have
/// gathered.
template <class T, class Ranked>
void likeliest(std::span<const T> logits, size_t k, std::vector<Ranked> &best) {
  const size_t capacity = std::min(logits.size(), std::max<size_t>(2 * k, 256));
  best.clear();
  best.reserve(capacity);
  const auto keep_k = [&] {
    if (best.size() <= k) return;
    std::nth_element(best.begin(), best.begin() + static_cast<ptrdiff_t>(k) - 1, best.end());
    best.resize(k, {});
  };
  T floor = -std::numeric_limits<T>::infinity();  // a later token must lie above: an equal one has a higher id
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!(logits[i] > floor)) continue;
    if (best.size() == capacity) {
      keep_k();
      floor = best[k - 1].logit;
      if (!(logits[i] > floor)) continue;
    }
    best.push_back({logits[i], static_cast<int32_t>(i)});
  }
  keep_k();
}

/// The first tokens by descending weight: all with a larger weight than `weight`, and the first `num_ties` with just
/// this weight.
struct Cut {
  uint64_t weight = 0;
  uint64_t num_ties = UINT64_MAX;

  bool keeps(uint64_t w, uint64_t &ties_left) const { return w > weight || (w == weight && ties_left-- > 0); }
};

uint64_t sum_of(std::span<const uint64_t> weights, const Cut &cut) {
  uint64_t sum = 0;
  uint64_t ties_left = cut.num_ties;
  for (const uint64_t w : weights) sum += cut.keeps(w, ties_left) ? w : 0;
  return sum;
}

/// The fewest tokens whose weights sum to at least `target`, which is at least 1 and at most the sum of all. By radix,
/// in O(tokens).
Cut nucleus(std::span<const uint64_t> weights, uint64_t target) {
  constexpr int kDigitBits = 9;
  constexpr int kDigits = (kWeightBits + 1 + kDigitBits - 1) / kDigitBits;
  std::array<uint64_t, size_t{1} << kDigitBits> sums;
  uint64_t last = 0;   // the smallest weight that is kept; its digits become known from the highest on
  uint64_t above = 0;  // sum of the larger ones
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    const int shift = digit * kDigitBits;
    sums.fill(0);
    for (const uint64_t w : weights) {
      const uint64_t high = w >> shift;
      if (high >> kDigitBits == last) sums[high & (sums.size() - 1)] += w;
    }
    size_t at = sums.size() - 1;
    while (above + sums[at] < target) {
      above += sums[at];
      TS_ASSERT(at > 0, "the target is at most the sum of all");
      --at;
    }
    last = last << kDigitBits | at;
  }
  return {last, (target - above + last - 1) / last};
}

Cut cut_of(std::span<const uint64_t> weights, const SamplingParams &params) {
  Cut cut;
  if (params.top_p < 1) {
    const uint64_t sum = sum_of(weights, cut);
    const auto share = static_cast<uint64_t>(std::ceil(params.top_p * static_cast<double>(sum)));
    cut = nucleus(weights, std::clamp(share, uint64_t{1}, sum));
  }
  const auto least = static_cast<uint64_t>(std::ceil(params.min_p * static_cast<double>(kOne)));
  if (least > cut.weight) cut = {least, UINT64_MAX};
  return cut;
}

/// Index of a weight, chosen in proportion to the kept weights.
size_t pick(std::span<const uint64_t> weights, const Cut &cut, uint64_t random) {
  __extension__ using Wide = unsigned __int128;
  auto left = static_cast<uint64_t>(Wide{random} * sum_of(weights, cut) >> 64);  // uniform below the sum
  uint64_t ties_left = cut.num_ties;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!cut.keeps(weights[i], ties_left)) continue;
    if (left < weights[i]) return i;
    left -= weights[i];
  }
  check_failed("left < sum", "the random number lies below the sum of the weights", __FILE_NAME__, __LINE__);
}

}  // namespace

Sampler::Sampler(int32_t vocab_size)
    : adjusted_(static_cast<size_t>(vocab_size)), weights_(static_cast<size_t>(vocab_size)) {
  TS_ASSERT(vocab_size >= 1 && vocab_size <= kMaxVocab, "sums of weights would overflow");
}

Sampled Sampler::sample(std::span<const float> logits, const SamplingParams &params,
                        std::span<const TokenCounts::Count> counts, uint64_t position) {
  TS_ASSERT(logits.size() == weights_.size(), "a row of logits has an element a token");
  Sampled sampled;
  const Best best = find_best(logits);
  if (!best.finite) {
    sampled.error = not_finite(logits, position);
    return sampled;
  }
  const double max = logits[static_cast<size_t>(best.token)];
  if (!params.logit_bias.empty() || params.has_penalties()) {
    adjust(logits, params, counts);
    const auto it = std::max_element(adjusted_.begin(), adjusted_.end());
    sampled.token = params.temperature == 0 ? static_cast<int32_t>(it - adjusted_.begin())
                                            : draw(std::span<const double>(adjusted_), *it, params, position);
  } else {
    sampled.token = params.temperature == 0 ? best.token : draw(logits, max, params, position);
  }
  if (params.num_logprobs >= 0) add_logprobs(logits, max, params.num_logprobs, sampled);
  return sampled;
}

void Sampler::adjust(std::span<const float> logits, const SamplingParams &params,
                     std::span<const TokenCounts::Count> counts) {
  std::copy(logits.begin(), logits.end(), adjusted_.begin());
  for (const auto &[token, bias] : params.logit_bias)
    adjusted_[static_cast<size_t>(token)] += static_cast<double>(bias);
  if (!params.has_penalties()) return;
  for (const auto &[token, num_output] : counts) {
    double &z = adjusted_[static_cast<size_t>(token)];
    z = z > 0 ? z / params.repetition_penalty : z * params.repetition_penalty;
    if (num_output == 0) continue;
    z -= params.frequency_penalty * num_output;
    z -= params.presence_penalty;
  }
}

template <class T>
std::vector<Sampler::Ranked<T>> &Sampler::ranked() {
  if constexpr (std::is_same_v<T, float>) {
    return ranked_;
  } else {
    return ranked_adjusted_;
  }
}

template <class T>
int32_t Sampler::draw(std::span<const T> logits, double max, const SamplingParams &params, uint64_t position) {
  const double inverse = 1.0 / params.temperature;
  const uint64_t random = random_bits(params.seed, position);
  if (params.top_k == 0 || static_cast<size_t>(params.top_k) >= logits.size()) {
    const std::span<uint64_t> weights(weights_);
    weigh(logits.size(), [&](size_t i) { return (static_cast<double>(logits[i]) - max) * inverse; });
    return static_cast<int32_t>(pick(weights, cut_of(weights, params), random));
  }
  std::vector<Ranked<T>> &best = ranked<T>();
  likeliest(logits, static_cast<size_t>(params.top_k), best);
  std::sort(best.begin(), best.end(), [](const auto &a, const auto &b) { return a.token < b.token; });
  const std::span<uint64_t> weights = std::span(weights_).first(best.size());
  weigh(best.size(), [&](size_t i) { return (static_cast<double>(best[i].logit) - max) * inverse; });
  return best[pick(weights, cut_of(weights, params), random)].token;
}

/// weights_[i] = exp(exponent(i)) * 2^42 for i < size, rounded to nearest.
template <class Exponent>
void Sampler::weigh(size_t size, Exponent exponent) {
  const auto two = [&](double a, double b) {
    const detmath::Pair shifted = detmath::exp(detmath::Pair{a, b}) * static_cast<double>(kOne) + 0x1p+52;
    return std::bit_cast<detmath::PairBits>(shifted) & 0x000fffffffffffff;  // the low bits of the sum hold the integer
  };
  size_t i = 0;
  for (; i + 2 <= size; i += 2) {
    const detmath::PairBits w = two(exponent(i), exponent(i + 1));
    weights_[i] = w[0];
    weights_[i + 1] = w[1];
  }
  if (i < size) weights_[i] = two(exponent(i), 0)[0];
}

void Sampler::add_logprobs(std::span<const float> logits, double max, int32_t num_top, Sampled &sampled) {
  const double log_sum = detmath::log(sum_exp(logits, max));
  const auto logprob = [&](float logit) { return static_cast<float>((static_cast<double>(logit) - max) - log_sum); };
  sampled.logprob = logprob(logits[static_cast<size_t>(sampled.token)]);
  if (num_top == 0) return;
  std::vector<Ranked<float>> &best = ranked<float>();
  likeliest(logits, static_cast<size_t>(num_top), best);
  std::sort(best.begin(), best.end());
  sampled.top.reserve(best.size());
  for (const auto &[logit, token] : best) sampled.top.push_back({token, logprob(logit)});
}

}  // namespace ts
