#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

namespace ts {

constexpr int32_t num_pages_for(int32_t num_tokens, int32_t page_size) {
  return (num_tokens + page_size - 1) / page_size;
}

/// Layers of a model whose caches live by one rule. A sequence has a page table for each group; pages of all groups are of
/// one size, come from one pool, and are named in one prefix index, by the hash of their tokens and the number of the group.
///
///   full       each token reads all tokens before it: every page is kept as long as the sequence
///   window     a token reads the last `window` tokens, itself included: pages that no token behind the last full page can read
///              are given back as soon as a step is committed. (So what a sequence holds is always enough to go on behind its
///              full pages: a session's lease keeps all that the next turn needs.) The page table has kNoPage in their place
///   recurrent  a token reads a state, which it changes. The page table's first entry is the page that a step writes the
///              state to, behind its last token; the second the one that it reads it from, the same but where that one is
///              shared (a checkpoint): so a state is copied on write. With position 0 there is nothing to read. A state that
///              a step leaves at the end of a page of tokens is sealed, as that page's: a checkpoint. One sequence holds its
///              last checkpoint and its state
///
/// A prefix of whole pages is found only as far as every group can go on behind it: full attention needs all its pages, a
/// window those that the next token reads, a recurrent state the checkpoint right there.
struct CacheGroup {
  enum class Kind : uint8_t { full, window, recurrent };
  static constexpr int32_t kNoPage = -1;

  Kind kind = Kind::full;
  int32_t window = 0;  ///< tokens; of Kind::window at least 1

  bool recurrent() const { return kind == Kind::recurrent; }

  /// The first of a text's pages that a token at `position`, or any behind it, reads or writes. Not of a recurrent group.
  int32_t first_page(int32_t position, int32_t page_size) const {
    return kind == Kind::full ? 0 : std::max(0, position - window + 1) / page_size;
  }

  /// The most pages that a sequence of so many tokens ever holds, if a step computes at most `chunk` of them.
  int32_t most_pages(int32_t num_tokens, int32_t chunk, int32_t page_size) const {
    if (recurrent()) return 2;
    const int32_t all = num_pages_for(num_tokens, page_size);
    if (kind == Kind::full) return all;
    const int64_t behind = (int64_t{window} + page_size - 2) / page_size;  // the last full page
    const int64_t ahead = (int64_t{std::min(chunk, num_tokens)} + 2 * int64_t{page_size} - 2) / page_size;
    return static_cast<int32_t>(std::min(behind + ahead, int64_t{all}));
  }
};

/// Of all groups together.
inline int32_t most_pages(std::span<const CacheGroup> groups, int32_t num_tokens, int32_t chunk, int32_t page_size) {
  int64_t sum = 0;
  for (const CacheGroup &group : groups) sum += group.most_pages(num_tokens, chunk, page_size);
  return static_cast<int32_t>(std::min<int64_t>(sum, INT32_MAX));
}

inline bool any_recurrent(std::span<const CacheGroup> groups) {
  return std::ranges::any_of(groups, &CacheGroup::recurrent);
}

/// Entries of one group's row of the page table.
inline int32_t page_table_width(std::span<const CacheGroup> groups, int32_t max_context, int32_t page_size) {
  return std::max(num_pages_for(max_context, page_size), any_recurrent(groups) ? 2 : 1);
}

}  // namespace ts
