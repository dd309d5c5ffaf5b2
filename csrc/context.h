#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "cache_groups.h"
#include "page.h"
#include "prefix_cache.h"
#include "request.h"

namespace ts {

/// What the cache has found of a text: of its first `num_pages` pages, what each group needs to go on behind them.
struct Prefix {
  /// A page that a group needs, by its place in the text.
  struct Away {
    int32_t page = 0;
    int32_t group = 0;
  };

  int32_t num_pages = 0;
  std::vector<std::vector<SharedPage>> of_group;  ///< the last of the text's found pages; empty if none were found
  std::vector<Away>
      away;  ///< what is not here, but in the second tier, in the order of the text; else each group has all it needs

  int32_t num_held(size_t group) const { return of_group.empty() ? 0 : static_cast<int32_t>(of_group[group].size()); }
};

/// One cache group's pages of a running sequence, in order: those given back, then sealed ones, then those still written. Of a
/// recurrent group the last checkpoint, if there is one, and then the page of its state. `row` is the group's row of the page
/// table, which is kept in step with the pages, an entry at a time.
class GroupPages {
 public:
  explicit GroupPages(int32_t num_pages_max) { sealed_.reserve(static_cast<size_t>(num_pages_max)); }
  GroupPages(GroupPages &&) noexcept = default;
  GroupPages &operator=(GroupPages &&) = delete;
  GroupPages(const GroupPages &) = delete;
  GroupPages &operator=(const GroupPages &) = delete;
  ~GroupPages() { release(); }
  void swap(GroupPages &other) noexcept;

  int32_t num_sealed() const { return base_ + static_cast<int32_t>(sealed_.size()); }  ///< pages of the text
  int32_t num_pages() const { return num_sealed() + static_cast<int32_t>(open_.size()); }
  int32_t num_held() const { return num_pages() - given_back_; }
  int32_t num_kept() const { return num_sealed() - given_back_; }  ///< without what is still written
  int32_t num_entries(const CacheGroup &group) const { return group.recurrent() ? 2 : num_pages(); }
  GroupPages share() const;  ///< other references to what is kept

  /// How many pages reserve() will take.
  int32_t num_missing(const CacheGroup &group, int32_t wanted) const {
    if (group.recurrent()) return open_.empty() ? 1 : 0;
    return std::max(0, wanted - num_pages());
  }

  void adopt(const CacheGroup &group, std::vector<SharedPage> &&pages, int32_t num_pages, int32_t page_size,
             std::span<int32_t> row);
  void reserve(const CacheGroup &group, PrefixCache &cache, int32_t wanted, std::span<int32_t> row);
  void seal(int32_t group, PrefixCache &cache, const Sequence &sequence, int32_t num_computed, std::span<int32_t> row,
            std::vector<WritablePage> *duplicates);
  void drop_open() { open_.clear(); }
  void release();  ///< the deepest page first, so that it is evicted before what it depends on

  const WritablePage &open_page(const CacheGroup &group, int32_t position, int32_t page_size) const;
  void check(const CacheGroup &group, int32_t num_computed, int32_t page_size) const;

 private:
  void give_back(int32_t first, std::span<int32_t> row);
  void checkpoint(int32_t group, PrefixCache &cache, const Sequence &sequence, int32_t num_computed,
                  std::span<int32_t> row, std::vector<WritablePage> *duplicates);

  std::vector<SharedPage> sealed_;  // of the text's pages from base_ on; those given back are moved from
  std::vector<WritablePage> open_;
  int32_t base_ = 0;
  int32_t given_back_ = 0;  // of the text's pages: no more of them is here
};

/// The pages of one running sequence, of every cache group. `row` is always the sequence's row of the page table: an equal part
/// for each group.
class Context {
 public:
  /// Room for so many pages of the text, of each group.
  Context(std::span<const CacheGroup> groups, int32_t num_pages_max);
  Context(Context &&) noexcept = default;
  Context &operator=(Context &&other) noexcept;
  Context(const Context &) = delete;
  Context &operator=(const Context &) = delete;
  ~Context() = default;

  int32_t num_pages() const { return first_.num_pages(); }    ///< of the text, in the first group
  int32_t num_sealed() const { return first_.num_sealed(); }  ///< likewise
  int32_t num_sealed(size_t group) const { return of(group).num_sealed(); }
  int32_t num_entries(std::span<const CacheGroup> groups) const;  ///< of each group's row that are in use, at most
  int32_t num_entries(std::span<const CacheGroup> groups, size_t group) const {
    return of(group).num_entries(groups[group]);
  }
  int32_t num_kept() const;  ///< sealed pages of all groups that are held

  /// Appends pages that the cache has found. What was being written behind the sealed pages is dropped.
  void adopt(PrefixCache &cache, Prefix &&prefix, std::span<int32_t> row);

  /// How many pages reserve() will take of the pool.
  int32_t num_missing(std::span<const CacheGroup> groups, int32_t num_tokens, int32_t page_size) const;

  /// For how many tokens there is room with so many pages more.
  int32_t room(std::span<const CacheGroup> groups, int32_t num_available, int32_t page_size) const;

  /// Makes room for `num_tokens` tokens. Demands that the pool has as many pages as are missing.
  void reserve(PrefixCache &cache, int32_t num_tokens, std::span<int32_t> row);

  /// The first `num_computed` tokens are computed for good, and no more: what they fill is sealed, what no token behind the full
  /// pages reads is given back. A page whose content was here already goes to `duplicates`, if there are any.
  void seal(PrefixCache &cache, const Sequence &sequence, int32_t num_computed, std::span<int32_t> row,
            std::vector<WritablePage> *duplicates = nullptr);

  Context share() const;  ///< other references to the sealed pages that are held

  /// Gives up what is not sealed.
  void drop_open();

  /// Nobody finds anything from now on that was computed or found for this sequence, here still or given back.
  void forget(PrefixCache &cache, const Sequence &sequence) const;

  /// The page that the token at `position` is written to: it must not be sealed yet.
  const WritablePage &open_page(std::span<const CacheGroup> groups, size_t group, int32_t position,
                                int32_t page_size) const;

  void check(std::span<const CacheGroup> groups, int32_t num_computed, int32_t page_size) const;

 private:
  const GroupPages &of(size_t group) const { return group == 0 ? first_ : more_[group - 1]; }
  GroupPages &of(size_t group) { return group == 0 ? first_ : more_[group - 1]; }
  size_t num_groups() const { return 1 + more_.size(); }

  explicit Context(GroupPages &&first) : first_(std::move(first)) {}

  GroupPages first_;
  std::vector<GroupPages> more_;
};

/// The longest text behind page `first` of `sequence`, at most `most` pages of it, that every group can go on behind; never all
/// of its tokens, because the last one's logits must be computed. The sequence has all that it needs behind page `first`. Each
/// page is looked for once for each group, and again where groups disagree.
Prefix match_prefix(PrefixCache &cache, const Sequence &sequence, int32_t first, int32_t most = INT32_MAX);

/// The same from the sequence's first page on, of the cache and its second tier together.
Prefix match_both_tiers(PrefixCache &cache, const Sequence &sequence);

/// Why no more than the first `num_found` pages of `sequence` were found.
Miss explain_miss(const PrefixCache &cache, const Sequence &sequence, int32_t num_found);

}  // namespace ts
