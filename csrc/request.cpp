#include "request.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <mutex>

#include "check.h"
#include "text.h"

namespace ts {

// ---- token counts ---------------------------------------------------------------------------------------------------

void TokenCounts::reserve(size_t num_distinct_max) {
  TS_ASSERT(counts_.empty(), "room is made before the first token");
  counts_.reserve(num_distinct_max);
  index_.assign(std::bit_ceil(2 * num_distinct_max + 1), -1);  // at most half full
}

void TokenCounts::add(int32_t token, bool output) {
  const size_t mask = index_.size() - 1;
  size_t at = (static_cast<uint32_t>(token) * uint64_t{0x9E3779B97F4A7C15} >> 32) & mask;
  while (index_[at] >= 0 && counts_[static_cast<size_t>(index_[at])].token != token) at = (at + 1) & mask;
  if (index_[at] < 0) {
    TS_ASSERT(counts_.size() < counts_.capacity(), "more distinct tokens than room was made for");
    index_[at] = static_cast<int32_t>(counts_.size());
    counts_.push_back({token, 0});
  }
  if (output) ++counts_[static_cast<size_t>(index_[at])].num_output;
}

// ---- memory of tokens -----------------------------------------------------------------------------------------------

namespace {

/// Token arrays of requests that have ended. malloc gives memory of this size back to the kernel, and taking it anew costs
/// a page fault for every 4 KiB: more than all else that becoming a request takes.
class SpareTokens {
 public:
  SpareTokens() { spare_.reserve(kMost); }

  /// Empty, with room for so many tokens.
  std::vector<int32_t> take(size_t num_tokens) {
    std::vector<int32_t> taken;
    {
      const std::lock_guard lock(mutex_);
      const auto fits = [&](const auto &tokens) { return tokens.capacity() >= num_tokens; };
      const auto found = std::find_if(spare_.begin(), spare_.end(), fits);
      if (num_tokens >= kLeast && found != spare_.end()) {
        taken = std::move(*found);
        std::swap(*found, spare_.back());
        spare_.pop_back();
      }
    }
    taken.reserve(num_tokens);
    return taken;
  }

  void give(std::vector<int32_t> &&tokens) {
    if (tokens.capacity() < kLeast || tokens.capacity() > kLongest) return;
    tokens.clear();
    const std::lock_guard lock(mutex_);
    if (spare_.size() < kMost) spare_.push_back(std::move(tokens));
  }

 private:
  static constexpr size_t kLeast = 1 << 13, kLongest = 1 << 20;  // tokens
  static constexpr size_t kMost = 16;                            // arrays: 64 MiB together at most

  std::mutex mutex_;
  std::vector<std::vector<int32_t>> spare_;
};

SpareTokens &spare_tokens() {
  static SpareTokens spare;
  return spare;
}

}  // namespace

Sequence::~Sequence() { spare_tokens().give(std::move(tokens)); }

// ---- sequence -------------------------------------------------------------------------------------------------------

void Sequence::append(int32_t token) {
  tokens.push_back(token);
  if (sampling.has_penalties()) counts.add(token, true);
  if (hashed) hash_full_pages();
}

void Sequence::hash_full_pages() {
  const size_t before = hashes.size(), size = static_cast<size_t>(page_size), full = tokens.size() / size;
  if (full == before) return;
  const PageHash parent = before == 0 ? root : hashes.back();
  hashes.resize(full);
  page_hasher().pages(parent, std::span(tokens).subspan(before * size, (full - before) * size), page_size,
                      std::span(hashes).subspan(before));
}

bool Sequence::stops_at(int32_t token) const {
  return std::binary_search(stop_tokens.begin(), stop_tokens.end(), token);
}

std::optional<ts_finish> Sequence::finish() const {
  TS_ASSERT(num_outputs() > 0, "an output ends after its first token");
  if (stops_at(tokens.back())) return TS_FINISH_STOP;
  if (num_outputs() == max_tokens) return TS_FINISH_LENGTH;
  return std::nullopt;
}

// ---- checks ---------------------------------------------------------------------------------------------------------

namespace {

template <class... Parts>
void demand(bool condition, const Parts &...parts) {
  if (!condition) fail(TS_BAD_REQUEST, parts...);
}

template <class T>
std::span<const T> span_of(const T *data, int32_t count, const char *data_name, const char *count_name) {
  demand(count >= 0, count_name, " is ", count, ", wanted 0 or more");
  demand(count == 0 || data != nullptr, data_name, " is NULL but ", count_name, " is ", count);
  return {data, static_cast<size_t>(count)};
}

/// `first`: the place of ids[0] in what is called `name`.
void check_ids(std::span<const int32_t> ids, int32_t vocab_size, const char *name, size_t first = 0) {
  const auto last = static_cast<uint32_t>(vocab_size) - 1;
  uint32_t wrong = 0;  // its highest bit is set if an id is negative, or above the last: without a branch for each
  for (const int32_t id : ids) wrong |= static_cast<uint32_t>(id) | (last - static_cast<uint32_t>(id));
  if (wrong >> 31 == 0) return;
  for (size_t i = 0; i < ids.size(); ++i) {
    demand(ids[i] >= 0 && ids[i] < vocab_size, name, '[', first + i, "] is ", ids[i], ", wanted a token id in [0, ",
           vocab_size, ')');
  }
}

/// lowest <= value <= highest, or lowest < value with `open`. NaN fails.
double checked(double value, const char *name, double lowest, double highest, bool open = false) {
  const bool above = open ? value > lowest : value >= lowest;
  demand(above && value <= highest, name, " is ", value, ", wanted a number in ", open ? '(' : '[', lowest, ", ",
         highest, std::isinf(highest) ? ")" : "]");
  demand(std::isfinite(value), name, " is ", value, ", wanted a finite number");
  return value;
}

SamplingParams sampling_of(const ts_request &request, int32_t vocab_size) {
  SamplingParams s;
  s.temperature = checked(request.temperature, "temperature", 0, INFINITY);
  demand(request.top_k >= 0, "top_k is ", request.top_k, ", wanted 0 (off) or more");
  s.top_k = request.top_k;
  s.top_p = checked(request.top_p, "top_p", 0, 1, true);
  s.min_p = checked(request.min_p, "min_p", 0, 1);
  s.repetition_penalty = checked(request.repetition_penalty, "repetition_penalty", 0, INFINITY, true);
  s.presence_penalty = checked(request.presence_penalty, "presence_penalty", -2, 2);
  s.frequency_penalty = checked(request.frequency_penalty, "frequency_penalty", -2, 2);
  s.seed = request.seed;
  demand(request.num_logprobs >= -1 && request.num_logprobs <= vocab_size, "num_logprobs is ", request.num_logprobs,
         ", wanted -1 (none) to the vocabulary's ", vocab_size);
  s.num_logprobs = request.num_logprobs;

  demand(request.num_logit_bias <= vocab_size, "num_logit_bias is ", request.num_logit_bias,
         ", but the vocabulary has ", vocab_size, " tokens");
  const auto bias = span_of(request.logit_bias, request.num_logit_bias, "logit_bias", "num_logit_bias");
  s.logit_bias.assign(bias.begin(), bias.end());
  std::sort(s.logit_bias.begin(), s.logit_bias.end(), [](const auto &a, const auto &b) { return a.token < b.token; });
  for (size_t i = 0; i < s.logit_bias.size(); ++i) {
    const auto &[token, value] = s.logit_bias[i];
    demand(token >= 0 && token < vocab_size, "logit_bias names token ", token, ", wanted an id in [0, ", vocab_size,
           ')');
    demand(std::isfinite(value), "logit_bias of token ", token, " is ", value, ", wanted a finite number");
    demand(i == 0 || s.logit_bias[i - 1].token != token, "logit_bias names token ", token, " twice");
  }
  return s;
}

constexpr size_t kMostSalt = 1024;  // bytes
constexpr int32_t kLongestLeaseMs = 3'600'000;
constexpr int32_t kLongestTimeoutMs = 86'400'000;

void check_lengths(const ts_request &request, const RequestLimits &limits) {
  demand(request.num_prompt >= 1, "num_prompt is ", request.num_prompt, ", wanted at least 1 token");
  demand(request.max_tokens >= 1, "max_tokens is ", request.max_tokens, ", wanted at least 1");
  const int64_t total = int64_t{request.num_prompt} + request.max_tokens;
  demand(total <= limits.max_context, "the prompt has ", request.num_prompt, " tokens and max_tokens is ",
         request.max_tokens, ", together ", total, ", but the model's context holds ", limits.max_context,
         ": shorten the prompt or lower max_tokens");
  // The last output is never an input, so it needs no slot.
  const int32_t num_pages = limits.pages_for(static_cast<int32_t>(total) - 1);
  demand(num_pages <= limits.num_pages, "the prompt's ", request.num_prompt, " tokens and max_tokens ",
         request.max_tokens, " need ", num_pages, " KV pages of ", limits.page_size, " tokens, but the engine has ",
         limits.num_pages, ": give it more (num_pages or kv_bytes), or ask for less");
}

/// Copies, checks and hashes a piece at a time, so that each is read from memory once.
void take_prompt(Sequence &s, std::span<const int32_t> prompt, int32_t vocab_size) {
  constexpr size_t kPiece = 2048;  // tokens: 8 KiB, read and written
  for (size_t first = 0; first < prompt.size(); first += kPiece) {
    const auto piece = prompt.subspan(first, std::min(kPiece, prompt.size() - first));
    s.tokens.insert(s.tokens.end(), piece.begin(), piece.end());
    check_ids(std::span(s.tokens).subspan(first), vocab_size, "prompt", first);
    if (s.hashed) s.hash_full_pages();
  }
}

}  // namespace

std::unique_ptr<Sequence> make_sequence(const ts_request &request, const RequestLimits &limits) {
  demand(request.size == sizeof(ts_request), "ts_request.size is ", request.size, ", this engine's is ",
         sizeof(ts_request));
  check_lengths(request, limits);
  const auto prompt = span_of(request.prompt, request.num_prompt, "prompt", "num_prompt");
  demand(request.ignore_eos == 0 || request.ignore_eos == 1, "ignore_eos is ", request.ignore_eos, ", wanted 0 or 1");
  const auto stop = span_of(request.stop_tokens, request.num_stop_tokens, "stop_tokens", "num_stop_tokens");
  check_ids(stop, limits.vocab_size, "stop_tokens");

  const auto salt = span_of(request.cache_salt, request.num_cache_salt, "cache_salt", "num_cache_salt");
  demand(salt.size() <= kMostSalt, "num_cache_salt is ", salt.size(), ", wanted at most ", kMostSalt, " bytes");

  demand(request.lease_ms >= 0 && request.lease_ms <= kLongestLeaseMs, "lease_ms is ", request.lease_ms,
         ", wanted 0 (none) to ", kLongestLeaseMs);
  demand(request.lease_ms == 0 || request.session != 0, "lease_ms is ", request.lease_ms,
         " but session is 0: only a session has a lease");

  demand(request.priority >= kPriorityMin && request.priority <= kPriorityMax, "priority is ", request.priority,
         ", wanted ", kPriorityMin, " (first) to ", kPriorityMax);
  demand(request.timeout_ms >= 0 && request.timeout_ms <= kLongestTimeoutMs, "timeout_ms is ", request.timeout_ms,
         ", wanted 0 (none) to ", kLongestTimeoutMs);

  auto s = std::make_unique<Sequence>();
  s->id = request.id;
  s->sampling = sampling_of(request, limits.vocab_size);
  s->num_prompt = request.num_prompt;
  s->max_tokens = request.max_tokens;
  s->session = request.session;
  s->lease_ms = request.lease_ms;
  s->priority = request.priority;
  s->tenant = request.tenant;
  s->timeout_ms = request.timeout_ms;
  s->page_size = limits.page_size;
  const auto num_tokens_max = static_cast<size_t>(request.num_prompt) + static_cast<size_t>(request.max_tokens);
  s->tokens = spare_tokens().take(num_tokens_max);
  s->root = page_hasher().root({salt.data(), salt.size()});
  s->hashed = limits.prefix_cache;
  if (s->hashed) {
    s->hashes.reserve(num_tokens_max / static_cast<size_t>(limits.page_size));
    s->salted = !salt.empty();
  }
  take_prompt(*s, prompt, limits.vocab_size);

  s->stop_tokens.assign(stop.begin(), stop.end());
  if (request.ignore_eos == 0) {
    s->stop_tokens.insert(s->stop_tokens.end(), limits.eos_token_ids.begin(), limits.eos_token_ids.end());
  }
  std::sort(s->stop_tokens.begin(), s->stop_tokens.end());
  s->stop_tokens.erase(std::unique(s->stop_tokens.begin(), s->stop_tokens.end()), s->stop_tokens.end());

  if (s->sampling.has_penalties()) {
    s->counts.reserve(std::min(num_tokens_max, static_cast<size_t>(limits.vocab_size)));
    for (const int32_t token : prompt) s->counts.add(token, false);
  }
  // Penalties change with every token, so rows ahead of the last token could not be sampled on their own.
  if (limits.max_draft > 0 && !s->sampling.has_penalties()) {
    s->drafts = std::make_unique<Drafts>(num_tokens_max);
    s->drafts->know(s->tokens);
  }
  return s;
}

}  // namespace ts
