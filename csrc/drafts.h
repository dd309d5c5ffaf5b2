#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace ts {

/// Tokens that may come next. Who guessed them does not matter: a step computes them beside the last token, and those that
/// sampling gives too are kept.
struct Draft {
  static constexpr int32_t kMost = 16;
  std::array<int32_t, kMost> tokens{};
  int32_t size = 0;
};

/// Guesses from a sequence's own text: where its last tokens stood before, what followed then will follow again. Positions are
/// chained by the hash of the kLeast tokens before them, as LZ77 coders find their matches (RFC 1951, section 4).
class Drafts {
 public:
  /// Room for a sequence of so many tokens: nothing is allocated later.
  explicit Drafts(size_t num_tokens_max);

  /// What followed the longest of the earlier places that end like `tokens`, at most `most`; empty if there is none, or if
  /// guesses have not been worth it: each that fails whole doubles the steps until the next, so that of n steps over text that does
  /// not repeat log2(n) + n / kMostRest guess at most. `tokens`: the sequence's; they only ever grow. O(tokens that are new),
  /// amortised.
  Draft propose(std::span<const int32_t> tokens, int32_t most);

  /// How many of the last draft's tokens came true.
  void learn(int32_t num_drafted, int32_t num_accepted);

 private:
  static constexpr size_t kLeast = 3;    // tokens that must be alike
  static constexpr size_t kEnough = 32;  // beyond which a longer match says no more
  static constexpr int kMostPlaces = 8;  // looked at, the latest first
  static constexpr int kMostRest = 64;   // steps without a guess

  size_t bucket(std::span<const int32_t> tokens, size_t end) const;
  void index(std::span<const int32_t> tokens);

  std::vector<int32_t> latest_;  // [buckets] the latest position whose kLeast tokens before it have this hash, or -1
  std::vector<int32_t> before_;  // [num_tokens_max] by position: the one before with the same hash, or -1
  size_t num_indexed_ = 0;       // positions
  int32_t length_ = 4;           // of the next draft, at most
  size_t least_ = kLeast;        // tokens that must be alike for it: more, where guesses fail
  int rest_ = 0;                 // steps until the next draft
  int next_rest_ = 1;            // after one that fails
};

}  // namespace ts
