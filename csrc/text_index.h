#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace ts {

/// Where in a text its last tokens, or those of another text, stood before. Positions are chained by the hash of the kLeast tokens
/// before them, as LZ77 coders find their matches (RFC 1951, section 4): a token costs O(1), a search at most kMostPlaces * kEnough.
/// (A suffix automaton finds matches of any length; but what follows 32 tokens alike says no more than what follows 33.)
class TextIndex {
 public:
  static constexpr size_t kLeast = 3;    // tokens that must be alike
  static constexpr size_t kEnough = 32;  // beyond which a longer match says no more
  static constexpr int kMostPlaces = 8;  // looked at, the latest first

  /// What stands before `end` in the text is alike in so many tokens, kEnough at most. 0: there is no such place.
  struct Match {
    size_t end = 0;
    size_t length = 0;
  };

  /// Room for a text of so many tokens: nothing is allocated later.
  explicit TextIndex(size_t num_tokens_max);

  /// Takes in the positions before the end of a text that only ever grows: behind each stands a token.
  void add(std::span<const int32_t> text);

  /// The place in `text`, which was added, where most of the last tokens of `tail` stand; of equals the latest. Places before a
  /// negative token, where a text within the text ends, do not count.
  Match longest(std::span<const int32_t> text, std::span<const int32_t> tail) const;

  void clear();  ///< for another text

 private:
  size_t bucket(std::span<const int32_t> text, size_t end) const;

  size_t num_tokens_max_;
  std::vector<int32_t> latest_;  // [buckets] the latest position whose kLeast tokens before it have this hash, or -1
  std::unique_ptr<int32_t[]>
      before_;                 // [num_tokens_max] by position, where added: the one before with the same hash, or -1
  size_t num_added_ = kLeast;  // positions
};

}  // namespace ts
