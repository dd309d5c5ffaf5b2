#include <algorithm>
#include <utility>

#include "check.h"
#include "scheduler.h"

/// What two batches in flight take: the younger one is scheduled while the older one runs.
namespace ts {

// ---- schedule -------------------------------------------------------------------------------------------------------

std::optional<Batch> Scheduler::schedule_ahead(Batch &older) {
  TS_ASSERT(options_.ahead, "the engine was not made for two batches in flight");
  TS_ASSERT(older.arrays_ == in_flight_[0] && in_flight_[1] == nullptr, "this is not the only batch in flight");
  if (!may_go_ahead(older)) return std::nullopt;
  take_over(older);
  int32_t left = options_.token_budget - num_running();
  weigh_decodes();
  grow_taken_over();
  if (grow_prefill(left)) admit(left);
  for (int32_t r = 0; r < num_running(); ++r) {
    const int32_t before = running(r).row_before;
    if (before >= 0) older.passed_[static_cast<size_t>(before)].row = r;
  }
  return make_batch();
}

/// Whether the sequence has more to compute once the batch in flight is committed, unless its next token ends it.
bool Scheduler::goes_on(const Running &seq) {
  if (seq.num_tokens == 0 || seq.leaving != Leaving::no) return false;
  return !seq.wants_logits() || seq.sequence().num_outputs() + 1 < seq.sequence().max_tokens;
}

/// Whether somebody goes on, and nothing that the batch in flight decides must be known first: who may guess its next tokens looks
/// for them behind the last; a state that a step leaves at the end of a page is kept there, and goes on in another; who waits for what
/// comes back from the second tier is admitted with it; and when pages run out, somebody is preempted, which must not be in flight.
bool Scheduler::may_go_ahead(const Batch &older) {
  if (any_recurrent(options_.groups) || older.fetch_) return false;
  const Running *prefill = nullptr;
  bool any = false;
  std::ranges::fill(missing_of_, 0);
  for (const Running &seq : older.running_) {
    if (!goes_on(seq)) continue;
    any = true;
    const Sequence &sequence = seq.sequence();
    if (sequence.drafts != nullptr) return false;
    if (!seq.wants_logits()) {
      prefill = &seq;
      continue;
    }
    missing_of_[static_cast<size_t>(sequence.owner)] +=
        seq.context().num_missing(options_.groups, sequence.num_tokens() + 1, options_.page_size);
  }
  for (int32_t owner = 0; owner < cache_.num_owners(); ++owner) {
    if (!make_room(owner, missing_of_[static_cast<size_t>(owner)])) return false;
  }
  if (prefill == nullptr) return any;
  const auto owner = static_cast<size_t>(prefill->sequence().owner);
  make_room(static_cast<int32_t>(owner), missing_of_[owner] + num_groups());
  return may_go_ahead(*prefill, pool(static_cast<int32_t>(owner)).num_available() - missing_of_[owner]);
}

/// Of who is in the middle of its prefill: whether a token more has room, and nobody else has computed its next page meanwhile,
/// which it would rather take.
bool Scheduler::may_go_ahead(const Running &prefill, int32_t num_available) {
  const Sequence &sequence = prefill.sequence();
  const int32_t end = prefill.num_computed() + prefill.num_tokens;
  if (prefill.context().room(options_.groups, num_available, options_.page_size) <= end) return false;
  const auto page = static_cast<size_t>(end / options_.page_size);
  return page >= sequence.hashes.size() || !cache_.of(sequence.owner).holds(sequence.hashes[page]);
}

/// Takes the sequences that go on out of the batch in flight, which keeps what it has to know of them.
void Scheduler::take_over(Batch &older) {
  running_ = std::exchange(spare_running_, {});
  older.passed_ = std::exchange(spare_passed_, {});
  older.passed_.resize(older.running_.size());
  for (size_t i = 0; i < older.running_.size(); ++i) {
    Running &seq = running_.emplace_back(std::move(older.running_[i]));
    seq.row_before = static_cast<int32_t>(i);
  }
  for (int32_t r = num_running() - 1; r >= 0; --r) {
    Running &seq = running(r);
    const auto before = static_cast<size_t>(seq.row_before);
    if (goes_on(seq)) {
      const bool gives_token = seq.wants_logits();
      older.passed_[before].sequence = &seq.sequence();
      seq.awaits = gives_token;
      seq.num_ahead = seq.num_tokens;
      continue;
    }
    older.running_[before] = std::move(seq);
    remove(r);
  }
}

/// Gives every decode the slot of the token that is still to come.
void Scheduler::grow_taken_over() {
  for (int32_t r = 0; r < num_running(); ++r) {
    Running &seq = running(r);
    seq.num_tokens = 1;
    seq.draft.size = 0;
    if (!seq.decodes()) continue;
    seq.context().reserve(cache_.of(seq.sequence().owner), seq.num_known(), arrays_.row(r));
  }
}

// ---- commit ---------------------------------------------------------------------------------------------------------

/// Of the older of two: what the younger one has not, ends here; what it has, moves on there.
void Scheduler::commit_behind(Batch &batch, std::span<Outcome> outcomes, Batch &younger) {
  land(batch);
  end_copies(batch);
  running_.swap(younger.running_);  // whose rows are those of the page table
  size_t next = 0;
  for (size_t i = 0; i < batch.running_.size(); ++i) {
    const Batch::Passed &passed = batch.passed_[i];
    if (passed.sequence != nullptr) {
      Running &seq = running(passed.row);
      const std::span<int32_t> row = arrays_.row(passed.row);
      const bool gives_token = std::exchange(seq.awaits, false);
      const int32_t num_tokens = std::exchange(seq.num_ahead, 0);
      gives_token ? append(seq, row, outcomes.subspan(next, 1), &younger) : compute(seq, row, num_tokens, &younger);
      next += gives_token ? 1 : 0;
      continue;
    }
    Running &seq = batch.running_[i];
    if (seq.num_tokens == 0) {  // it ended after it was scheduled: its row of logits is nobody's
      next += next < batch.logit_rows_.size() && batch.logit_rows_[next].running == static_cast<int32_t>(i) ? 1 : 0;
      continue;
    }
    if (seq.wants_logits()) {
      const size_t num_rows = static_cast<size_t>(seq.draft.size) + 1;
      append(seq, spare_row_, outcomes.subspan(next, num_rows), nullptr);
      next += num_rows;
    } else {
      compute(seq, spare_row_, seq.num_tokens, nullptr);
    }
    leave(seq);
    TS_ASSERT(seq.num_tokens == 0, "who is in no batch in flight has ended");
    short_of_pages_.reset();
  }
  TS_ASSERT(next == outcomes.size(), "every outcome has a sequence");
  running_.swap(younger.running_);
  recycle(batch);
}

/// Ends a sequence that was to end with this commit, if it has not.
void Scheduler::leave(Running &seq) {
  if (seq.num_tokens == 0) return;
  TS_ASSERT(seq.leaving != Leaving::no, "somebody wanted it to end");
  if (seq.leaving == Leaving::cancelled) {
    remember(seq.sequence());  // who found a stop string in it cancels it too
    finish(next(std::move(seq.state), Cancel{}));
  } else {
    finish(next(std::move(seq.state), time_out_of(seq.sequence())));
  }
  seq.num_tokens = 0;
}

void Scheduler::finish(Drained &&drained, Batch &younger) {
  younger.draining_.push_back(std::move(drained.draining));
  finish(std::move(drained.finished));
}

/// No batch in flight reads any more what waited for this one.
void Scheduler::land(Batch &batch) {
  for (Draining &draining : batch.draining_) Transition::apply(std::move(draining), Land{});
  if (!batch.draining_.empty() || !batch.duplicates_.empty()) short_of_pages_.reset();
  batch.draining_.clear();
  batch.duplicates_.clear();
}

/// The batch is no more; its memory is the next one's.
void Scheduler::recycle(Batch &batch) {
  if (!options_.ahead) return;
  if (batch.running_.capacity() > 0) {
    batch.running_.clear();
    spare_running_ = std::exchange(batch.running_, {});
  }
  if (batch.passed_.capacity() > 0) {
    batch.passed_.clear();
    spare_passed_ = std::exchange(batch.passed_, {});
  }
}

void Scheduler::fail(Batch &&batch, Batch &&younger, const std::string &message) {
  TS_ASSERT(batch.arrays_ == in_flight_[0] && younger.arrays_ == in_flight_[1], "these are not the batches in flight");
  in_flight_ = {};
  land(batch);
  land(younger);
  give_up_copies(batch);
  give_up_copies(younger);
  const auto end = [&](Running &seq) {
    finish(next(std::move(seq.state), Fail{cache_, message}));
    seq.num_tokens = 0;
  };
  for (size_t i = 0; i < batch.running_.size(); ++i) {
    if (batch.passed_[i].sequence == nullptr && batch.running_[i].num_tokens > 0) end(batch.running_[i]);
  }
  recycle(batch);
  running_ = std::exchange(younger.running_, {});
  for (Running &seq : running_) {
    if (seq.row_before >= 0) end(seq);
  }
  remove_ended();
  while (!running_.empty()) preempt(youngest());  // several may be at the beginning of their prefill
}

// ---- check ----------------------------------------------------------------------------------------------------------

/// What a batch in flight reads somebody has, and what it writes nobody else has.
void Scheduler::check_in_flight(const Batch &batch) const {
  const ts_batch &b = batch.arrays();
  const auto pool_of = [&](int32_t page) -> const PagePool & { return pool(page / options_.num_pages); };
  const auto id_of = [&](int32_t page) { return page % options_.num_pages; };
  const int32_t each = b.page_table_stride / num_groups();
  for (int32_t s = 0; s < b.num_seqs; ++s) {
    for (int32_t g = 0; g < num_groups(); ++g) {
      const bool recurrent = options_.groups[static_cast<size_t>(g)].recurrent();
      const int32_t num_pages = recurrent ? 2 : num_pages_for(b.context_len[s], options_.page_size);
      const int32_t *row = b.page_table + ptrdiff_t{s} * b.page_table_stride + ptrdiff_t{g} * each;
      for (int32_t i = 0; i < num_pages; ++i) {
        TS_ASSERT(row[i] == CacheGroup::kNoPage || pool_of(row[i]).in_use(id_of(row[i])),
                  "a page that a batch in flight reads is somebody's");
      }
    }
  }
  for (int32_t i = 0; i < b.num_tokens * num_groups(); ++i) {
    const int32_t page = b.slots[i] / options_.page_size;
    TS_ASSERT(pool_of(page).writable(id_of(page)), "a page that a batch in flight writes is one that may be written");
  }
}

}  // namespace ts
