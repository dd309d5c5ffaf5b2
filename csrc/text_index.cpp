#include "text_index.h"

#include <algorithm>
#include <bit>

#include "check.h"

namespace ts {

TextIndex::TextIndex(size_t num_tokens_max)
    : num_tokens_max_(num_tokens_max),
      latest_(std::bit_ceil(num_tokens_max), -1),
      before_(std::make_unique_for_overwrite<int32_t[]>(num_tokens_max)) {}

size_t TextIndex::bucket(std::span<const int32_t> text, size_t end) const {
  uint64_t hash = 0;
  for (const int32_t token : text.subspan(end - kLeast, kLeast)) {
    hash = (hash ^ static_cast<uint32_t>(token)) * 0x9E3779B97F4A7C15;
    hash ^= hash >> 29;
  }
  return static_cast<size_t>(hash) & (latest_.size() - 1);
}

void TextIndex::add(std::span<const int32_t> text) {
  TS_ASSERT(text.size() <= num_tokens_max_, "more tokens than room was made for");
  for (; num_added_ < text.size(); ++num_added_) {
    int32_t &latest = latest_[bucket(text, num_added_)];
    before_[num_added_] = latest;
    latest = static_cast<int32_t>(num_added_);
  }
}

TextIndex::Match TextIndex::longest(std::span<const int32_t> text, std::span<const int32_t> tail) const {
  Match best;
  if (tail.size() < kLeast) return best;
  int32_t place = latest_[bucket(tail, tail.size())];
  for (int i = 0; i < kMostPlaces && place >= 0 && best.length < kEnough; ++i) {
    const auto end = static_cast<size_t>(place);
    const size_t most = std::min({end, tail.size(), kEnough});
    size_t length = 0;
    while (length < most && text[end - 1 - length] == tail[tail.size() - 1 - length]) ++length;
    if (length >= kLeast && length > best.length && text[end] >= 0) best = {end, length};
    place = before_[end];
  }
  return best;
}

void TextIndex::clear() {
  std::ranges::fill(latest_, -1);
  num_added_ = kLeast;
}

}  // namespace ts
