#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "generations.h"
#include "step_cost.h"
#include "text_index.h"

namespace ts {

/// Tokens that may come next. A step computes them beside the last token, and those that sampling gives too are kept: so what comes
/// out is the same whoever guessed them, and however well. All that the scheduler asks of a draft is `tokens` and `size`, and of its
/// `kind` how often such drafts have come true.
///
/// A new way to guess is a kind more, which Drafts::guess weighs against the others by what it was worth so far. Text that was seen
/// before is looked up when a step is scheduled. Guesses that must be computed are made by the engine between a commit and the next
/// schedule, for all running sequences at once, and wait with their sequence until `guess` takes them or the next commit makes them
/// stale: those of a draft model's plan by running it on the tokens that were accepted (it has pages of its own for each
/// sequence), those of heads within the model (MTP; EAGLE-3, which also reads hidden states) as outputs of the step itself. What
/// that costs beside the step is a price of the kind, to be added to what its tokens cost.
struct Draft {
  static constexpr int32_t kMost = 16;

  /// How it was guessed: by the shortest and longest match that it followed, in the sequence's own text and in the tenant's earlier
  /// generations; kResumed goes on in the own text behind a token that came otherwise (an edit).
  enum Kind : uint8_t { kOwn3, kOwn5, kOwn9, kOwn17, kEarlier3, kEarlier5, kEarlier9, kEarlier17, kResumed, kNumKinds };

  std::array<int32_t, kMost> tokens{};
  int32_t size = 0;
  Kind kind = kOwn3;
};

/// What a step takes and gives, as drafts are added to it.
struct StepValue {
  const StepCost &cost;
  StepLoad load;          ///< all that is in the step so far
  double ns = 0;          ///< what it takes without its prompts, whose time is spent with drafts or without
  double num_tokens = 0;  ///< that it is expected to give

  /// What `num_drafted` tokens behind `position` add.
  StepLoad with(int32_t num_drafted, int64_t position) const;
};

/// A sequence's guesses: what they are, how often they come true, and whether they are worth their time.
///
/// They never cost more than kShare of what the sequence takes without them, by the prices that the scheduler knows: each token that
/// it decodes puts kShare of its time into a purse, each draft is paid from it, and each token that comes true puts in the time
/// that it has saved. Where text repeats, the purse is full; where it does not, now and then a token is tried.
class Drafts {
 public:
  /// Room for a sequence of so many tokens: nothing is allocated later.
  explicit Drafts(size_t num_tokens_max) : index_(num_tokens_max) {}

  /// Takes in what is known before the first guess, so that it need not be done in a step.
  void know(std::span<const int32_t> tokens) { index_.add(tokens); }

  /// The step goes on with this sequence, a token of which takes so long.
  void earn(double token_ns);

  /// The likeliest guess at what follows `tokens`, the sequence's, which only ever grow; of at most `most` tokens, and only as many as
  /// are worth it: those with which the step, to which they are added, gives most tokens per time. O(tokens that are new),
  /// amortised.
  Draft guess(std::span<const int32_t> tokens, const PageHash &tenant, Generations &earlier, int32_t most,
              StepValue &step);

  /// How many tokens of the last draft, which was computed, came true.
  void learn(const Draft &draft, int32_t num_accepted);

  /// How likely the next token of such a draft comes true, by what came of the last ones.
  double chance(Draft::Kind kind) const;

 private:
  static constexpr double kShare = 0.01;
  static constexpr double kFull = 4;     // tokens' times that the purse holds
  static constexpr double kMemory = 32;  // tokens

  struct Tried {
    double come_true = 0, failed = 0;
  };

  Draft likeliest(std::span<const int32_t> tokens, const PageHash &tenant, Generations &earlier, int32_t most,
                  size_t &distance);

  TextIndex index_;
  std::array<Tried, Draft::kNumKinds> tried_{};
  double purse_ns_ = 0, token_ns_ = 0;
  size_t distance_ = 0;  // between the last draft and where in the own text it was taken from
  size_t resume_before_ =
      0;  // with fewer tokens than that, what comes there next may come here: matches are not long enough yet
};

}  // namespace ts
