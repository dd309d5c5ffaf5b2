#include <utility>

#include "check.h"
#include "scheduler.h"

namespace ts {

/// Has the second tier bring back what `prefix` lacks, as much as a step may.
void Scheduler::fetch(const Sequence &sequence, int32_t owner, Prefix &&prefix) {
  if (fetched_.arrival != sequence.arrival) fetched_ = {sequence.arrival};
  fetch_.emplace(cache_.of(owner), sequence, owner, std::move(prefix), options_.tier.max_loads);
}

/// Why no more than `num_found` pages were found, now that nothing more comes back. Where groups must agree, the page that did not
/// come back may lie behind them.
Miss Scheduler::why_missed(const Sequence &sequence, int32_t owner, int32_t num_found) {
  Miss miss = explain_miss(cache_.of(owner), sequence, num_found);
  const bool broken = fetched_.arrival == sequence.arrival && fetched_.broken >= num_found;
  if (miss.why != TS_MISS_NONE && broken) miss.why = TS_MISS_BROKEN;
  return miss;
}

/// The step's copies have been made: what came back can be found from now on.
void Scheduler::end_copies(Batch &batch) {
  for (const PageCopy &copy : batch.copies_) {
    TS_ASSERT(copy.state != PageCopy::State::ordered, "a step is committed when its copies were made");
    const bool done = copy.state == PageCopy::State::done;
    ++(!done                           ? counters_.num_pages_broken
       : copy.to == PageCopy::To::slot ? counters_.num_pages_kept
                                       : counters_.num_pages_restored);
  }
  if (batch.fetch_) {
    const uint64_t arrival = batch.fetch_->arrival();
    const Fetch::Landed landed = std::move(*batch.fetch_).land(cache_.of(batch.fetch_->owner()), batch.copies_);
    if (fetched_.arrival == arrival) {
      fetched_.num_tokens += landed.num_pages * options_.page_size;
      if (landed.broken >= 0) fetched_.broken = landed.broken;
    }
    batch.fetch_.reset();
    short_of_pages_.reset();
  }
  cache_.end_copies(std::move(batch.copies_));
}

/// The step could not be run: nobody knows how far its copies came.
void Scheduler::give_up_copies(Batch &batch) {
  for (PageCopy &copy : batch.copies_) copy.state = PageCopy::State::ordered;
  batch.fetch_.reset();
  cache_.end_copies(std::move(batch.copies_));
}

}  // namespace ts
