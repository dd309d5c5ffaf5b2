#pragma once

#include <cstdint>
#include <vector>

#include "check.h"
#include "huge_vector.h"
#include "page.h"

namespace ts {

/// Who owns which page of the KV cache. Every page is in exactly one of four states:
///
///     blank     free, holds nothing anyone can find                       -> writable
///     writable  one WritablePage                                          -> shared (sealed), blank (dropped)
///     shared    SharedPages, as many as it has references                 -> idle or blank, after the last reference
///     idle      no reference, but the prefix cache can find its content   -> shared (found), writable (evicted)
///
/// Idle pages wait in two lists, each in order of last use (a segmented LRU): those that were found again since they were
/// written, and those that were not, which are evicted first. So a scan of prompts that come once does not drive out what is
/// used again and again. The found again hold at most three quarters of the pages: the oldest of more join the others, as
/// their newest. Everything costs O(1).
/// Not thread-safe: the step thread owns it. It outlives every page.
class PagePool {
 public:
  /// `first_page`: the number of page 0 among those of all pools.
  PagePool(int32_t num_pages, int32_t page_size, int32_t first_page = 0);
  ~PagePool();
  PagePool(const PagePool &) = delete;
  PagePool &operator=(const PagePool &) = delete;

  int32_t num_pages() const { return static_cast<int32_t>(frames_.size()); }
  int32_t page_size() const { return page_size_; }
  int32_t first_page() const { return first_page_; }
  int32_t num_blank() const { return num_blank_; }
  int32_t num_idle() const { return once_.count + again_.count; }
  int32_t num_available() const { return num_blank_ + num_idle(); }  ///< what PrefixCache::allocate can give

  /// Whether somebody has the page, and whether it may be written.
  bool in_use(int32_t page) const { return state(page) == State::writable || state(page) == State::shared; }
  bool writable(int32_t page) const { return state(page) == State::writable; }

  void check() const;  ///< asserts that pages are conserved and lists are whole; O(num_pages), for tests

 private:
  friend class WritablePage;
  friend class SharedPage;
  friend class PrefixCache;

  enum class State : uint8_t { blank, writable, shared, idle };
  static constexpr int32_t kNone = -1;

  struct Frame {
    int32_t num_refs = 0;   // of a shared page
    int32_t older = kNone;  // idle: towards the next to be evicted
    int32_t newer = kNone;  // idle: towards the most recently used; blank: the next blank page
    State state = State::blank;
    bool findable = false;  // the prefix cache indexes it
    bool again = false;     // it was found since it was written: idle, it is in again_
  };

  struct List {
    int32_t oldest = kNone;
    int32_t newest = kNone;
    int32_t count = 0;
  };

  // For PrefixCache.
  WritablePage take_blank();                                                                // num_blank() > 0
  int32_t next_to_evict() const { return once_.count > 0 ? once_.oldest : again_.oldest; }  // kNone if there is none
  WritablePage take_idle(int32_t page);  // evicts: the caller has removed it from its index
  SharedPage take_shared(int32_t page);  // another reference to a findable page
  SharedPage seal(WritablePage &&page, bool findable, bool again = false);
  void set_unfindable(int32_t page);

  // For WritablePage and SharedPage.
  void give_back(int32_t page);
  void add_ref(int32_t page);
  void drop_ref(int32_t page);

  Frame &frame(int32_t page);
  State state(int32_t page) const { return frames_.at(static_cast<size_t>(page)).state; }
  void push_blank(int32_t page);
  void push_idle(int32_t page);
  void unlink_idle(int32_t page);
  List &list_of(const Frame &f) { return f.again ? again_ : once_; }
  int32_t check_idle(const List &list, bool again) const;

  HugeVector<Frame> frames_;  // [num_pages]
  int32_t page_size_;
  int32_t first_page_;
  int32_t first_blank_ = kNone;
  List once_;
  List again_;
  int32_t num_blank_ = 0;
};

inline PagePool::Frame &PagePool::frame(int32_t page) {
  TS_ASSERT(page >= 0 && page < num_pages(), "there is no such page");
  return frames_[static_cast<size_t>(page)];
}

inline int32_t WritablePage::id() const {
  TS_ASSERT(pool_ != nullptr, "a writable page was used after it was moved from");
  return id_;
}

inline int32_t WritablePage::number() const { return pool_->first_page() + id(); }

inline Slot WritablePage::slot(int32_t offset) const {
  TS_ASSERT(pool_ != nullptr, "a writable page was used after it was moved from");
  TS_ASSERT(offset >= 0 && offset < pool_->page_size(), "a slot lies outside its page");
  return Slot(number() * pool_->page_size() + offset);
}

}  // namespace ts
