#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "hash_index.h"
#include "page_hash.h"

namespace ts {

/// The bytes of one page, from the KV cache to a slot of the second tier or back. Pages and slots are numbered over all owners.
struct PageCopy {
  enum class To : int32_t { slot, page };
  enum class State : int32_t { ordered, done, failed };

  int32_t page = 0;
  int32_t slot = 0;
  To to = To::slot;
  State state = State::ordered;  ///< what makes the copy says what became of it
};

static_assert(sizeof(PageCopy) == 4 * sizeof(int32_t));  // ranks are told of copies as int32

constexpr size_t ints_of(int32_t num_copies) { return 4 * static_cast<size_t>(num_copies); }

struct TierOptions {
  int32_t num_slots = 0;   ///< pages that it holds, of each owner; 0: there is no second tier
  int32_t max_stores = 0;  ///< copies of one step: what is evicted beyond them is lost
  int32_t max_loads = 0;

  int32_t max_copies() const { return max_stores + max_loads; }
};

/// What lies where in the second tier (host memory or a file): pages that the prefix cache has evicted, by hash. It orders copies,
/// which the step makes, in order, before all else; and learns what became of them. A slot is in one of these states:
///
///     free       holds nothing                                         -> filling
///     filling    a page is copied into it: nobody finds it yet         -> held, broken; forgotten
///     held       can be found. Who was used last goes last (LRU);
///                while it is copied to a page it is not given away     -> filling (another's), broken; free, forgotten
///     forgotten  nobody finds it any more, but a copy is under way     -> free, broken
///     broken     a copy failed: never used again
///
/// A page that was brought back stays here too, so that evicting it again costs no copy. Everything costs O(1) expected.
/// Not thread-safe: the step thread owns it.
class Tier {
 public:
  /// `orders`: of the next step, of all owners, with room for options.max_copies().
  Tier(const TierOptions &options, int32_t first_slot, std::vector<PageCopy> &orders);
  Tier(const Tier &) = delete;
  Tier &operator=(const Tier &) = delete;

  /// The page of that hash leaves the KV cache: orders that it is kept, unless it is here. `page`: its number.
  void keep(const PageHash &hash, int32_t page);

  /// Whether the page of that hash can be brought back.
  bool holds(const PageHash &hash) const {
    const int32_t number = pages_.find(hash);
    return number != kNone && slots_[static_cast<size_t>(number)].state == State::held;
  }

  /// It is about to be brought back: others are given away before it.
  void touch(const PageHash &hash);

  /// The slot of a hash that can be brought back, which is not given away until the copy that load orders has ended.
  int32_t pin(const PageHash &hash);
  void load(int32_t slot, int32_t page);

  /// Nobody finds it any more.
  void forget(const PageHash &hash);

  /// A copy that was ordered here has ended. One that is still `ordered` was maybe made, maybe not.
  void end(const PageCopy &copy);

  int32_t num_slots() const { return static_cast<int32_t>(slots_.size()); }
  int32_t num_held() const { return num_held_; }      ///< that can be found
  int32_t num_broken() const { return num_broken_; }  ///< given up

  void check() const;  ///< asserts that slots are conserved and the list is whole; O(num_slots), for tests

 private:
  static constexpr int32_t kNone = HashIndex::kNone;

  enum class State : uint8_t { free, filling, held, forgotten, broken };

  struct Slot {
    int32_t num_copies = 0;  // under way
    int32_t older = kNone;   // held, without copies: towards the next to be given away
    int32_t newer = kNone;   // the same: towards the last used; free: the next free one
    State state = State::free;
  };

  Slot &slot(int32_t number) { return slots_[static_cast<size_t>(number)]; }
  bool resting(const Slot &s) const { return s.state == State::held && s.num_copies == 0; }
  int32_t take();
  void push_free(int32_t number);
  void push_newest(int32_t number);
  void unlink(int32_t number);
  void set_state(int32_t number, State state);

  const TierOptions options_;
  const int32_t first_slot_;
  std::vector<PageCopy> &orders_;
  HashIndex pages_;          // [num_slots]
  std::vector<Slot> slots_;  // [num_slots]
  int32_t first_free_ = kNone, oldest_ = kNone, newest_ = kNone;
  int32_t num_held_ = 0, num_broken_ = 0;
};

}  // namespace ts
