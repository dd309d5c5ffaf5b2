#include "drafts.h"

#include <algorithm>

#include "check.h"

namespace ts {

namespace {

constexpr std::array<double, Draft::kNumKinds> kFirstChance = {0.3, 0.5, 0.7, 0.9, 0.3, 0.5, 0.7, 0.9, 0.5};
constexpr double kFirstWeight = 1;  // token

Draft::Kind kind_of(size_t length, Draft::Kind shortest) {
  const int longer = length < 5 ? 0 : length < 9 ? 1 : length < 17 ? 2 : 3;
  return static_cast<Draft::Kind>(shortest + longer);
}

}  // namespace

StepLoad StepValue::with(int32_t num_drafted, int64_t position) const {
  const int64_t keys = num_drafted * position + int64_t{num_drafted} * (num_drafted + 1) / 2;
  return {load.num_tokens + num_drafted, load.decode_keys, load.prefill_keys + keys};
}

void Drafts::earn(double token_ns) {
  token_ns_ = token_ns;
  purse_ns_ = std::min(purse_ns_ + kShare * token_ns, kFull * token_ns);
}

double Drafts::chance(Draft::Kind kind) const {
  const Tried &tried = tried_[kind];
  return (tried.come_true + kFirstWeight * kFirstChance[kind]) / (tried.come_true + tried.failed + kFirstWeight);
}

Draft Drafts::guess(std::span<const int32_t> tokens, const PageHash &tenant, Generations &earlier, int32_t most,
                    StepValue &step) {
  const auto position = static_cast<int64_t>(tokens.size());
  const double before_ns = step.cost.ns(step.load);
  if (step.cost.ns(step.with(1, position)) - before_ns > purse_ns_) return {};
  size_t distance = 0;
  Draft draft = likeliest(tokens, tenant, earlier, most, distance);
  const double one = chance(draft.kind);
  double all = 1, expected = 0, best_rate = step.num_tokens / step.ns, best_expected = 0, best_ns = 0;
  int32_t best = 0;
  for (int32_t size = 1; size <= draft.size; ++size) {
    const double extra_ns = step.cost.ns(step.with(size, position)) - before_ns;
    if (extra_ns > purse_ns_) break;
    expected += all *= one;
    const double rate = (step.num_tokens + expected) / (step.ns + extra_ns);
    if (rate <= best_rate) continue;
    best = size, best_rate = rate, best_expected = expected, best_ns = extra_ns;
  }
  draft.size = best;
  if (best == 0) return draft;
  distance_ = distance;
  resume_before_ = distance == 0 ? 0 : tokens.size() + TextIndex::kLeast + 1;
  purse_ns_ -= best_ns;
  step.load = step.with(best, position);
  step.ns += best_ns;
  step.num_tokens += best_expected;
  return draft;
}

Draft Drafts::likeliest(std::span<const int32_t> tokens, const PageHash &tenant, Generations &earlier, int32_t most,
                        size_t &distance) {
  Draft draft;
  double best = 0;
  const auto weigh = [&](std::span<const int32_t> next, Draft::Kind kind) {
    if (chance(kind) <= best) return false;
    best = chance(kind);
    draft.kind = kind;
    draft.size = 0;
    // The own text may run into the draft itself: it repeats.
    for (; draft.size < std::min(most, Draft::kMost); ++draft.size) {
      const auto at = static_cast<size_t>(draft.size);
      const int32_t token = at < next.size() ? next[at] : draft.tokens[at - next.size()];
      if (token < 0) break;
      draft.tokens[at] = token;
    }
    return true;
  };
  index_.add(tokens);
  if (const auto [end, length] = index_.longest(tokens, tokens); length > 0) {
    if (weigh(tokens.subspan(end), kind_of(length, Draft::kOwn3))) distance = tokens.size() - end;
  }
  if (tokens.size() < resume_before_) {
    if (weigh(tokens.subspan(tokens.size() - distance_), Draft::kResumed)) distance = distance_;
  }
  if (const auto [next, length] = earlier.longest(tenant, tokens); length > 0) {
    if (weigh(next, kind_of(length, Draft::kEarlier3))) distance = 0;
  }
  return draft;
}

void Drafts::learn(const Draft &draft, int32_t num_accepted) {
  purse_ns_ += num_accepted * token_ns_;
  Tried &tried = tried_[draft.kind];
  tried.come_true += num_accepted;
  tried.failed += num_accepted < draft.size ? 1 : 0;
  if (tried.come_true + tried.failed > kMemory) tried.come_true /= 2, tried.failed /= 2;
  if (resume_before_ > 0) resume_before_ += static_cast<size_t>(num_accepted);
}

}  // namespace ts
