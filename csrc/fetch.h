#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "context.h"
#include "page.h"
#include "prefix_cache.h"

namespace ts {

/// Pages that a prefix lacks and that come back from the second tier, for a sequence that waits to be admitted. It belongs to the batch
/// in flight that brings them: until that is committed nobody reads them, and what the prefix has already is not evicted. Move-only; it
/// ends in land(), or its pages are given back.
class Fetch {
 public:
  /// Orders the first of `prefix.away`, at most `most`: of a page of the text what all groups lack, or nothing. Demands that as many
  /// pages are available in `cache`, the owner's.
  Fetch(PrefixCache &cache, const Sequence &sequence, int32_t owner, Prefix &&prefix, int32_t most);
  Fetch(Fetch &&) noexcept = default;
  Fetch &operator=(Fetch &&) = delete;
  Fetch(const Fetch &) = delete;
  Fetch &operator=(const Fetch &) = delete;
  ~Fetch() = default;

  uint64_t arrival() const { return arrival_; }  ///< of the sequence that waits for it
  int32_t owner() const { return owner_; }

  struct Landed {
    int32_t num_pages = 0;  ///< of the text, of which something came back, up to the first of which something did not
    int32_t broken = -1;    ///< that page's place in the text; -1: all came back
  };

  /// `copies` have been made: what came back as it was can be found by everybody, the rest is nobody's.
  Landed land(PrefixCache &cache, std::span<const PageCopy> copies) &&;

 private:
  struct Page {
    WritablePage page;
    Prefix::Away place;
    PageHash hash, parent;
    std::span<const int32_t> tokens;  // in tokens_
  };

  uint64_t arrival_;
  int32_t owner_;
  Prefix prefix_;
  std::vector<int32_t> tokens_;  // of the first group's pages: they explain misses
  std::vector<Page> pages_;
};

}  // namespace ts
