#include "drafts.h"

#include <algorithm>
#include <bit>

#include "check.h"

namespace ts {

Drafts::Drafts(size_t num_tokens_max)
    : latest_(std::bit_ceil(num_tokens_max + 1), -1), before_(num_tokens_max + 1, -1), num_indexed_(kLeast) {}

size_t Drafts::bucket(std::span<const int32_t> tokens, size_t end) const {
  uint64_t hash = 0;
  for (const int32_t token : tokens.subspan(end - kLeast, kLeast)) {
    hash = (hash ^ static_cast<uint32_t>(token)) * 0x9E3779B97F4A7C15;
    hash ^= hash >> 29;
  }
  return static_cast<size_t>(hash) & (latest_.size() - 1);
}

/// Positions before the end: the end itself is what matches are sought for.
void Drafts::index(std::span<const int32_t> tokens) {
  TS_ASSERT(tokens.size() < before_.size(), "more tokens than room was made for");
  for (; num_indexed_ < tokens.size(); ++num_indexed_) {
    int32_t &latest = latest_[bucket(tokens, num_indexed_)];
    before_[num_indexed_] = latest;
    latest = static_cast<int32_t>(num_indexed_);
  }
}

Draft Drafts::propose(std::span<const int32_t> tokens, int32_t most) {
  Draft draft;
  if (tokens.size() < kLeast) return draft;
  index(tokens);
  size_t best = 0, best_length = 0;
  int32_t place = latest_[bucket(tokens, tokens.size())];
  for (int i = 0; i < kMostPlaces && place >= 0; ++i) {
    const auto end = static_cast<size_t>(place);
    size_t length = 0;
    while (length < std::min(end, kEnough) && tokens[end - 1 - length] == tokens[tokens.size() - 1 - length]) ++length;
    if (length > best_length) {
      best = end;
      best_length = length;
    }
    if (length == kEnough) break;
    place = before_[end];
  }
  if (best_length < least_) return draft;
  if (rest_ > 0) {
    --rest_;
    return draft;
  }
  draft.size = std::min({most, length_, Draft::kMost});
  for (int32_t i = 0; i < draft.size; ++i) {  // what follows may run into the draft itself: the text repeats
    const size_t from = best + static_cast<size_t>(i);
    draft.tokens[static_cast<size_t>(i)] = from < tokens.size() ? tokens[from] : draft.tokens[from - tokens.size()];
  }
  return draft;
}

void Drafts::learn(int32_t num_drafted, int32_t num_accepted) {
  if (num_accepted > 0) next_rest_ = 1;
  if (num_accepted == num_drafted) {
    length_ = std::min(2 * length_, Draft::kMost);
    least_ = kLeast;
  } else if (2 * num_accepted < num_drafted) {
    length_ = std::max(length_ / 2, 1);
    if (num_accepted == 0) {
      least_ = std::min(least_ + 1, kEnough / 2);
      rest_ = next_rest_;
      next_rest_ = std::min(2 * next_rest_, kMostRest);
    }
  }
}

}  // namespace ts
