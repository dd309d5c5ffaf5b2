#include "tier.h"

#include <algorithm>
#include <utility>

#include "check.h"

namespace ts {

Tier::Tier(const TierOptions &options, int32_t first_slot, std::vector<PageCopy> &orders)
    : options_(options), first_slot_(first_slot), orders_(orders), pages_(options.num_slots) {
  TS_ASSERT(options.num_slots >= 1 && options.max_stores >= 1 && options.max_loads >= 1, "a tier holds pages");
  TS_ASSERT(int64_t{first_slot} + options.num_slots <= INT32_MAX, "slots are int32");
  slots_.resize(static_cast<size_t>(options.num_slots));
  for (int32_t number = options.num_slots - 1; number >= 0; --number) push_free(number);
}

void Tier::keep(const PageHash &hash, int32_t page) {
  if (pages_.find(hash) != kNone) return touch(hash);
  if (orders_.size() >= static_cast<size_t>(options_.max_stores)) return;
  const int32_t number = take();
  if (number == kNone) return;
  pages_.insert(number, hash);
  set_state(number, State::filling);
  slot(number).num_copies = 1;
  orders_.push_back({page, first_slot_ + number, PageCopy::To::slot});
}

void Tier::touch(const PageHash &hash) {
  const int32_t number = pages_.find(hash);
  if (number == kNone || !resting(slot(number))) return;
  unlink(number);
  push_newest(number);
}

int32_t Tier::pin(const PageHash &hash) {
  const int32_t number = pages_.find(hash);
  TS_ASSERT(number != kNone && slot(number).state == State::held, "only what is held is brought back");
  if (slot(number).num_copies++ == 0) unlink(number);
  return first_slot_ + number;
}

void Tier::load(int32_t slot_number, int32_t page) {
  TS_ASSERT(slot(slot_number - first_slot_).num_copies > 0, "a slot is pinned before it is read");
  TS_ASSERT(orders_.size() < static_cast<size_t>(options_.max_copies()), "a step has room for so many copies");
  orders_.push_back({page, slot_number, PageCopy::To::page});
}

void Tier::forget(const PageHash &hash) {
  const int32_t number = pages_.find(hash);
  if (number == kNone) return;
  pages_.erase(number);
  if (resting(slot(number))) {
    unlink(number);
    set_state(number, State::free);
    push_free(number);
  } else {
    set_state(number, State::forgotten);
  }
}

void Tier::end(const PageCopy &copy) {
  const int32_t number = copy.slot - first_slot_;
  Slot &s = slot(number);
  TS_ASSERT(s.num_copies > 0, "a copy ends once");
  --s.num_copies;
  if (copy.state == PageCopy::State::failed) {
    if (pages_.holds(number)) pages_.erase(number);
    set_state(number, State::broken);
  } else if (s.state == State::filling) {
    const bool done = copy.state == PageCopy::State::done;
    if (!done) pages_.erase(number);
    set_state(number, done ? State::held : State::forgotten);
  }
  if (s.num_copies > 0) return;
  if (s.state == State::held) push_newest(number);
  if (s.state != State::forgotten) return;
  set_state(number, State::free);
  push_free(number);
}

/// A slot for another page: a free one, else the one whose last use is the longest ago. kNone if there is none.
int32_t Tier::take() {
  if (first_free_ != kNone) return std::exchange(first_free_, slot(first_free_).newer);
  const int32_t number = oldest_;
  if (number == kNone) return kNone;
  unlink(number);
  pages_.erase(number);
  set_state(number, State::free);
  return number;
}

void Tier::push_free(int32_t number) {
  slot(number) = {0, kNone, first_free_, State::free};
  first_free_ = number;
}

void Tier::push_newest(int32_t number) {
  Slot &s = slot(number);
  TS_ASSERT(resting(s), "a slot that is copied from or to is not given away");
  s.older = newest_;
  s.newer = kNone;
  (newest_ == kNone ? oldest_ : slot(newest_).newer) = number;
  newest_ = number;
}

void Tier::unlink(int32_t number) {
  const Slot &s = slot(number);
  (s.older == kNone ? oldest_ : slot(s.older).newer) = s.newer;
  (s.newer == kNone ? newest_ : slot(s.newer).older) = s.older;
}

void Tier::set_state(int32_t number, State state) {
  const auto count = [](State counted) { return counted == State::held ? 1 : 0; };
  num_held_ += count(state) - count(slot(number).state);
  num_broken_ += state == State::broken && slot(number).state != State::broken ? 1 : 0;
  slot(number).state = state;
}

void Tier::check() const {
  pages_.check();
  int32_t num_resting = 0, num_free = 0, num_held = 0, num_broken = 0;
  for (int32_t number = 0; number < num_slots(); ++number) {
    const Slot &s = slots_[static_cast<size_t>(number)];
    const bool found = s.state == State::held || s.state == State::filling;
    TS_ASSERT(pages_.holds(number) == found, "the tier's index has what is held or on its way");
    TS_ASSERT(s.num_copies >= 0 && (s.num_copies > 0 || (s.state != State::filling && s.state != State::forgotten)),
              "what is filling or forgotten has a copy under way");
    TS_ASSERT(s.state != State::free || s.num_copies == 0, "nobody copies to or from a free slot");
    num_resting += resting(s) ? 1 : 0;
    num_free += s.state == State::free ? 1 : 0;
    num_held += s.state == State::held ? 1 : 0;
    num_broken += s.state == State::broken ? 1 : 0;
  }
  TS_ASSERT(num_held == num_held_ && num_broken == num_broken_, "the counts of slots are right");
  for (int32_t number = first_free_; number != kNone; number = slots_[static_cast<size_t>(number)].newer) {
    TS_ASSERT(slots_[static_cast<size_t>(number)].state == State::free && --num_free >= 0, "the free list is whole");
  }
  int32_t older = kNone;
  for (int32_t number = oldest_; number != kNone; number = slots_[static_cast<size_t>(number)].newer) {
    const Slot &s = slots_[static_cast<size_t>(number)];
    TS_ASSERT(resting(s) && s.older == older && --num_resting >= 0, "the list of what may be given away is whole");
    older = number;
  }
  TS_ASSERT(older == newest_ && num_resting == 0 && num_free == 0, "every slot is on its list");
}

}  // namespace ts
