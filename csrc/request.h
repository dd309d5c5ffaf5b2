#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "cache_groups.h"
#include "drafts.h"
#include "engine.h"
#include "prefix_cache.h"

namespace ts {

struct Flow;

constexpr int32_t kPriorityMin = -8, kPriorityMax = 7;
constexpr int64_t kNever = INT64_MAX;

/// What a request is checked against.
struct RequestLimits {
  int32_t vocab_size = 0;
  int32_t max_context = 0;
  int32_t page_size = 0;
  int32_t num_pages = 0;
  int32_t token_budget = 0;  ///< tokens of a step
  bool prefix_cache = false;
  std::vector<int32_t> eos_token_ids;
  int32_t max_draft = 0;
  std::vector<CacheGroup> groups = {CacheGroup{}};

  /// The most that a sequence of so many tokens ever holds.
  int32_t pages_for(int32_t num_tokens) const { return most_pages(groups, num_tokens, token_budget, page_size); }
};

/// How tokens are chosen from logits; the fields mean what ts_request says. csrc/sampler.h has the order in which they
/// apply.
struct SamplingParams {
  double temperature = 0;
  int32_t top_k = 0;
  double top_p = 1;
  double min_p = 0;
  double repetition_penalty = 1;
  double presence_penalty = 0;
  double frequency_penalty = 0;
  uint64_t seed = 0;
  std::vector<ts_logit_bias> logit_bias;  ///< one an id, ascending
  int32_t num_logprobs = -1;

  bool has_penalties() const { return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0; }
};

/// The distinct tokens of a sequence and how often each was an output: what penalties need, in O(distinct tokens).
class TokenCounts {
 public:
  struct Count {
    int32_t token;
    int32_t num_output;  ///< 0: only in the prompt
  };

  void reserve(size_t num_distinct_max);  ///< add() does not allocate up to there
  void add(int32_t token, bool output);
  std::span<const Count> counts() const { return counts_; }

 private:
  std::vector<Count> counts_;
  std::vector<int32_t> index_;  // open addressing over counts_; -1: empty; a power of two
};

/// A request and what has become of it: the part that outlives every state. The prompt's tokens are followed by the
/// outputs.
struct Sequence {
  Sequence() = default;
  Sequence(const Sequence &) = delete;
  Sequence &operator=(const Sequence &) = delete;
  ~Sequence();  ///< keeps the memory of long `tokens` for the next request

  uint64_t id = 0;
  uint64_t arrival = 0;          ///< order of submission; smaller is older
  uint64_t turn = 0;             ///< order of admission
  int32_t priority = 0;          ///< its class: of two, the lower one is admitted first
  uint64_t tenant = 0;           ///< whose share of the engine it uses
  std::shared_ptr<Flow> flow;    ///< what it is charged to (FairQueue)
  int32_t timeout_ms = 0;        ///< how long it may take; 0: as long as it takes
  int64_t deadline_ms = kNever;  ///< when that is over
  SamplingParams sampling;
  int32_t num_prompt = 0;
  int32_t max_tokens = 0;
  int32_t page_size = 0;
  std::vector<int32_t> tokens;       ///< [num_prompt + num_outputs]; room for all that may come
  std::vector<int32_t> stop_tokens;  ///< ascending; the end tokens among them, unless they are to be ignored
  bool hashed = false;               ///< whether pages get hashes: there is a prefix cache
  PageHash root;        ///< of the salt: what the first page's hash continues, and whose earlier generations it may see
  bool salted = false;  ///< its tenant has a salt
  uint64_t session = 0;            ///< 0: none
  int32_t lease_ms = 0;            ///< how long its pages are kept for the session's next request
  Miss miss;                       ///< why no more of the prompt was found when it was first admitted
  std::vector<PageHash> hashes;    ///< of every full page of `tokens`, if `hashed`
  TokenCounts counts;              ///< kept only if sampling.has_penalties()
  int32_t owner = 0;               ///< whose part of the KV cache it uses: decided when it is admitted
  std::unique_ptr<Drafts> drafts;  ///< if its next tokens may be guessed
  int32_t num_cached = 0;          ///< prompt tokens that came from the prefix cache
  int32_t num_restored = 0;        ///< of these, brought back from the second tier for this request
  int32_t num_reached = 0;         ///< tokens that have ever been in the KV cache, computed or found

  int32_t num_tokens() const { return static_cast<int32_t>(tokens.size()); }
  int32_t num_outputs() const { return num_tokens() - num_prompt; }

  /// What the hash of a full page continues, and its tokens.
  const PageHash &parent(size_t page) const { return page == 0 ? root : hashes[page - 1]; }
  std::span<const int32_t> page(size_t page) const {
    const auto size = static_cast<size_t>(page_size);
    return std::span(tokens).subspan(page * size, size);
  }

  /// Appends an output token, and the hash of the page that it fills.
  void append(int32_t token);

  void hash_full_pages();  ///< brings `hashes` up to `tokens`

  /// Why the output ends with its last token, if it does.
  std::optional<ts_finish> finish() const;
  bool stops_at(int32_t token) const;  ///< whether it is an end or stop token
};

/// Checks a request and takes a copy of all it needs. Throws Error(TS_BAD_REQUEST) naming the field, what was found
/// and what is wanted. Costs O(prompt): it runs on the caller's thread, hashing included.
std::unique_ptr<Sequence> make_sequence(const ts_request &request, const RequestLimits &limits);

}  // namespace ts
