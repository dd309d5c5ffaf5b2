#include "scheduler.h"

#include <algorithm>
#include <utility>

#include "check.h"
#include "text.h"

namespace ts {

Scheduler::Scheduler(const SchedulerOptions &options)
    : options_(options),
      cache_(options.num_owners, options.num_pages, options.page_size, options.prefix_cache, options.groups,
             options.tier),
      arrays_(options.token_budget, options.max_seqs,
              page_table_width(options.groups, options.max_context, options.page_size),
              static_cast<int32_t>(options.groups.size()), options.ahead ? std::span<int32_t>() : options.batch_memory),
      queue_(options.patience_ms),
      earlier_(options.earlier),
      cost_(options.cost),
      checkpoints_(options.prefix_cache && any_recurrent(options.groups)) {
  TS_ASSERT(options.token_budget >= 1 && options.max_seqs >= 1, "a step holds at least one token of one sequence");
  TS_ASSERT(options.max_draft >= 0 && options.max_draft <= Draft::kMost, "a draft has room for so many tokens");
  TS_ASSERT(options.target_step_ns == 0 || options.cost.known(), "a target needs to know what steps take");
  TS_ASSERT(options.max_draft == 0 || options.drafts_at_any_cost || options.cost.known(), "so do drafts");
  if (any_recurrent(options.groups)) options_.max_draft = 0;
  const auto max_seqs = static_cast<size_t>(options.max_seqs);
  running_.reserve(max_seqs);
  logit_rows_.reserve(max_seqs);
  finished_.reserve(max_seqs);
  num_running_of_.resize(static_cast<size_t>(options.num_owners));
  reserved_of_.resize(static_cast<size_t>(options.num_owners));
  leases_of_.resize(static_cast<size_t>(options.num_owners));
  if (options.ahead) make_batch_copies();
}

/// What a second batch in flight takes.
void Scheduler::make_batch_copies() {
  const int32_t max_pages = page_table_width(options_.groups, options_.max_context, options_.page_size);
  const size_t num_ints = BatchArrays::num_ints(options_.token_budget, options_.max_seqs, max_pages, num_groups());
  std::span<int32_t> memory = options_.batch_memory;
  TS_ASSERT(memory.empty() || memory.size() >= 2 * num_ints, "the memory is too small for two batches");
  for (auto &copy : batch_copies_) {
    copy = std::make_unique<BatchCopy>(options_.token_budget, options_.max_seqs, max_pages, num_groups(),
                                       memory.first(memory.empty() ? 0 : num_ints));
    memory = memory.subspan(memory.empty() ? 0 : num_ints);
  }
  const auto max_seqs = static_cast<size_t>(options_.max_seqs);
  spare_running_.reserve(max_seqs);
  spare_passed_.reserve(max_seqs);
  spare_row_.resize(static_cast<size_t>(num_groups()) * static_cast<size_t>(max_pages));
  missing_of_.resize(static_cast<size_t>(options_.num_owners));
}

void Scheduler::submit(std::unique_ptr<Sequence> sequence, int64_t waited_ms) {
  TS_ASSERT(sequence->page_size == options_.page_size, "a sequence is made for this scheduler's pages");
  TS_ASSERT(sequence->hashed == options_.prefix_cache, "a sequence has hashes if there is a prefix cache");
  TS_ASSERT(most_pages(options_.groups, sequence->num_prompt + sequence->max_tokens - 1, options_.token_budget,
                       options_.page_size) <= options_.num_pages,
            "a request that can never fit is refused before it comes here");
  sequence->arrival = next_arrival_++;
  if (sequence->timeout_ms > 0) sequence->deadline_ms = now_ms_ - waited_ms + sequence->timeout_ms;
  next_deadline_ms_ = std::min(next_deadline_ms_, sequence->deadline_ms);
  queue_.push(std::move(sequence), now_ms_ - waited_ms);
}

void Scheduler::cancel(uint64_t id, Batch *in_flight) {
  TS_ASSERT(num_in_flight() == (in_flight == nullptr ? 0 : 1), "the batch in flight must be told");
  if (in_flight != nullptr) {
    for (Running &seq : in_flight->running_) {
      if (seq.num_tokens == 0 || seq.sequence().id != id) continue;
      if (seq.leaving == Leaving::no) seq.leaving = Leaving::cancelled;
      return;
    }
  }
  for (int32_t r = 0; r < num_running(); ++r) {
    if (running(r).sequence().id != id) continue;
    remember(running(r).sequence());  // who found a stop string in it cancels it too
    finish(next(std::move(running(r).state), Cancel{}));
    remove(r);
    return;
  }
  end_waiting([id](const Sequence &s) { return s.id == id; }, [](const Sequence &) { return Cancel{}; });
}

void Scheduler::cancel_all(Batch *in_flight) {
  if (in_flight != nullptr) {
    for (Running &seq : in_flight->running_) {
      if (seq.leaving == Leaving::no) seq.leaving = Leaving::cancelled;
    }
  }
  while (!running_.empty()) cancel(running_.back().sequence().id);
  end_waiting([](const Sequence &) { return true; }, [](const Sequence &) { return Cancel{}; });
}

/// Ends those that wait and are `wanted`, with the event that `why` gives for each.
template <class Wanted, class Why>
void Scheduler::end_waiting(const Wanted &wanted, const Why &why) {
  std::deque<Preempted> kept;
  for (Preempted &preempted : preempted_) {
    if (wanted(preempted.sequence())) {
      auto event = why(preempted.sequence());
      finish(Transition::apply(std::move(preempted), std::move(event)));
    } else {
      kept.push_back(std::move(preempted));
    }
  }
  preempted_ = std::move(kept);
  for (Queued &queued : queue_.take_all(wanted)) {
    auto event = why(queued.sequence());
    finish(Transition::apply(std::move(queued), std::move(event)));
  }
  short_of_pages_.reset();
}

void Scheduler::set_time(int64_t now_ms, Batch *in_flight) {
  TS_ASSERT(num_in_flight() == (in_flight == nullptr ? 0 : 1), "the batch in flight must be told");
  now_ms_ = std::max(now_ms_, now_ms);
  for (Leases &leases : leases_of_) {
    if (leases.end_due(now_ms_)) short_of_pages_.reset();
  }
  if (now_ms_ >= next_deadline_ms_) time_out(in_flight);
}

TimeOut Scheduler::time_out_of(const Sequence &s) {
  const std::string after = "the request's timeout of " + seconds(s.timeout_ms) + " is over";
  if (s.num_reached == 0) return TimeOut{after + ": it was still waiting to be run"};
  return TimeOut{after + ": " + std::to_string(s.num_outputs()) + " of at most " + std::to_string(s.max_tokens) +
                 " tokens were made"};
}

/// Ends every request whose deadline has come. O(live requests), but only when one may have, or may have been ended since.
void Scheduler::time_out(Batch *in_flight) {
  next_deadline_ms_ = kNever;
  const auto due = [this](const Sequence &s) {
    if (s.deadline_ms > now_ms_) next_deadline_ms_ = std::min(next_deadline_ms_, s.deadline_ms);
    return s.deadline_ms <= now_ms_;
  };
  if (in_flight != nullptr) {
    for (Running &seq : in_flight->running_) {
      if (seq.num_tokens == 0 || seq.leaving != Leaving::no || !due(seq.sequence())) continue;
      seq.leaving = Leaving::timed_out;
    }
  }
  for (int32_t r = num_running() - 1; r >= 0; --r) {
    if (!due(running(r).sequence())) continue;
    TimeOut event = time_out_of(running(r).sequence());
    finish(next(std::move(running(r).state), std::move(event)));
    remove(r);
  }
  end_waiting(due, time_out_of);
}

void Scheduler::end_leases() {
  while (end_soonest_leases()) {
  }
  short_of_pages_.reset();
}

/// One of each owner that has any. False if none has.
bool Scheduler::end_soonest_leases() {
  bool any = false;
  for (Leases &leases : leases_of_) {
    if (leases.empty()) continue;
    leases.end_soonest();
    any = true;
  }
  return any;
}

int32_t Scheduler::num_leases() const {
  int32_t num_leases = 0;
  for (const Leases &leases : leases_of_) num_leases += leases.size();
  return num_leases;
}

void Scheduler::finish(Finished &&finished) {
  finished_.push_back(std::move(finished));
  ++counters_.num_finished;
}

void Scheduler::take_finished(std::vector<Finished> &into) {
  into.clear();
  into.swap(finished_);
}

void Scheduler::check(const Batch *in_flight) const {
  cache_.check();
  TS_ASSERT(num_in_flight() == (in_flight == nullptr ? 0 : 1), "invariants are checked between steps");
  if (in_flight != nullptr) check_in_flight(*in_flight);
  queue_.check();
  const auto in_order = [](const Preempted &a, const Preempted &b) { return a.sequence().turn < b.sequence().turn; };
  TS_ASSERT(std::is_sorted(preempted_.begin(), preempted_.end(), in_order), "who was admitted first resumes first");
  int32_t num_prefilling = 0, last_owner = 0;
  for (const Running &seq : in_flight == nullptr ? running_ : in_flight->running_) {
    if (seq.num_tokens == 0) continue;  // ended while it was in flight
    num_prefilling += seq.decodes() || (in_flight != nullptr && seq.wants_logits()) ? 0 : 1;
    TS_ASSERT(preempted_.empty() || seq.sequence().turn < preempted_.front().sequence().turn, "the oldest run");
    TS_ASSERT(seq.sequence().deadline_ms > now_ms_, "nothing runs past its deadline");
    TS_ASSERT(seq.num_ahead == 0 && !seq.awaits, "what a step waited for has come");
    seq.context().check(options_.groups, seq.num_computed(), options_.page_size);
    TS_ASSERT(seq.sequence().owner >= std::exchange(last_owner, seq.sequence().owner),
              "those of an owner are together");
  }
  for (const Leases &leases : leases_of_) {
    TS_ASSERT(leases.num_pages() <= options_.num_pages / 2, "leases hold at most half of the pages");
  }
  TS_ASSERT(num_prefilling <= 1, "at most one sequence is in the middle of its prefill");
}

}  // namespace ts
