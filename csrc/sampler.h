#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "request.h"

namespace ts {

struct TopLogprob {
  int32_t token;
  float logprob;
};

struct Sampled {
  int32_t token = -1;
  float logprob = 0;            ///< of `token`, if logprobs were asked for
  std::vector<TopLogprob> top;  ///< [num_logprobs] most likely first, equal logits by lower id
  std::string error;            ///< not empty: the logits were not finite, and there is no token
};

/// Chooses the next token of one request from its logits. In this order, which is vLLM's up to the temperature and
/// transformers' after it:
///
///     logit bias           added
///     repetition penalty   tokens of prompt and output: logit / r if positive, else logit * r
///     frequency penalty    subtracted, times the token's count in the output
///     presence penalty     subtracted, for each token of the output
///     temperature          0: the most likely token, and nothing below applies; else logits are divided by it
///     top-k                the k most likely
///     top-p                of these, the fewest whose probabilities sum to at least p of theirs
///     min-p                of these, the ones at least min_p times as likely as the most likely
///
/// Equally likely tokens rank by lower id, so top_k 1 is greedy. Probabilities are kept as weights: over that of the
/// most likely token, as fixed-point numbers of 42 bits, so that every sum is exact in any order; below 2^-43 they are
/// zero. The choice is the inverse of the cumulative weights, in order of ids, at a random number that depends on
/// (seed, position) only. Logprobs are of the logits as they came. All arithmetic is in double, by csrc/detmath.h. Not
/// thread-safe: it owns scratch memory.
class Sampler {
 public:
  static constexpr int32_t kMaxVocab = 1 << 20;  ///< with more, sums of weights could overflow

  explicit Sampler(int32_t vocab_size);

  /// logits: [vocab_size]. counts: of the sequence so far, if it has penalties. position: number of outputs so far.
  Sampled sample(std::span<const float> logits, const SamplingParams &params,
                 std::span<const TokenCounts::Count> counts, uint64_t position);

 private:
  template <class T>
  struct Ranked {
    T logit;
    int32_t token;

    friend bool operator<(const Ranked &a, const Ranked &b) {  // a is likelier; equal logits by lower id
      return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
    }
  };

  void adjust(std::span<const float> logits, const SamplingParams &params, std::span<const TokenCounts::Count> counts);
  template <class T>
  int32_t draw(std::span<const T> logits, double max, const SamplingParams &params, uint64_t position);
  template <class Exponent>
  void weigh(size_t size, Exponent exponent);
  void add_logprobs(std::span<const float> logits, double max, int32_t num_top, Sampled &sampled);
  template <class T>
  std::vector<Ranked<T>> &ranked();

  std::vector<double> adjusted_;                 // [vocab_size] logits after bias and penalties
  std::vector<uint64_t> weights_;                // [vocab_size]
  std::vector<Ranked<float>> ranked_;            // of logits; their memory is kept for the next row
  std::vector<Ranked<double>> ranked_adjusted_;  // of adjusted_
};

}  // namespace ts
