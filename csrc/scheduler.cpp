#include "scheduler.h"

#include <algorithm>
#include <utility>

#include "check.h"

namespace ts {

// ---- schedule -------------------------------------------------------------------------------------------------------

std::optional<Batch> Scheduler::schedule() {
  TS_ASSERT(num_in_flight() == 0, "one batch at a time, unless it is scheduled behind the other");
  const bool had_pages = grow_decodes();
  int32_t left = options_.token_budget - num_running();
  TS_ASSERT(left >= 0, "more sequences run than a step has tokens for");
  weigh_decodes();
  if (grow_prefill(left) && had_pages) admit(left);
  if (running_.empty() && !fetch_) {
    TS_ASSERT(num_waiting() == 0, "with nothing running, every page is available to the next request");
    return std::nullopt;
  }
  if (options_.max_draft > 0) draft(left);
  return make_batch();
}

/// Of all that run, as they are.
Batch Scheduler::make_batch() {
  BatchArrays *arrays = &arrays_;
  std::vector<LogitRow> *logit_rows = &logit_rows_;
  if (options_.ahead) {
    BatchCopy &copy = *batch_copies_[std::exchange(next_copy_, 1 - next_copy_)];
    for (int32_t r = 0; r < num_running(); ++r) {
      const Running &seq = running(r);
      copy.copy_row(r, arrays_.row(r), seq.admission, seq.context(), options_.groups, seq.begin(), options_.page_size);
    }
    arrays = &copy.arrays;
    logit_rows = &copy.logit_rows;
  }
  fill_arrays(*arrays, *logit_rows);
  (in_flight_[0] == nullptr ? in_flight_[0] : in_flight_[1]) = arrays;
  return Batch(std::exchange(running_, {}), *arrays, *logit_rows, load_, cache_.take_copies(),
               std::exchange(fetch_, std::nullopt));
}

/// Ends leases of an owner until it has so many pages available. False if it has not even so.
bool Scheduler::make_room(int32_t owner, int32_t num_pages) {
  Leases &leases = leases_of_[static_cast<size_t>(owner)];
  while (pool(owner).num_available() < num_pages && !leases.empty()) leases.end_soonest();
  return pool(owner).num_available() >= num_pages;
}

/// Gives every decode the slot of its next token. False if sequences had to be preempted for that.
bool Scheduler::grow_decodes() {
  bool enough = true;
  for (int32_t r = 0; r < num_running();) {
    auto *decoding = std::get_if<Decoding>(&running(r).state);
    running(r).num_tokens = 1;
    running(r).draft.size = 0;
    if (decoding == nullptr) {
      ++r;
      continue;
    }
    const int32_t num_tokens = decoding->sequence().num_tokens();
    const int32_t missing = decoding->context().num_missing(options_.groups, num_tokens, options_.page_size);
    const int32_t owner = decoding->sequence().owner;
    if (missing > 0 && !make_room(owner, missing)) {
      preempt(youngest());
      enough = false;
      r = 0;  // rows have moved; those that have their slot keep it
      continue;
    }
    if (missing > 0) decoding->context().reserve(cache_.of(owner), num_tokens, arrays_.row(r));
    ++r;
  }
  return enough;
}

/// The step's load so far: a token of each decode. A prefill's tokens are added when they are granted.
void Scheduler::weigh_decodes() {
  load_ = {};
  num_decodes_ = num_prompt_tokens_ = 0;
  for (const Running &seq : running_) {
    if (!seq.decodes()) continue;
    ++num_decodes_;
    ++load_.num_tokens;
    load_.decode_keys += seq.num_known();
  }
}

/// How many of `most` tokens from `position` on fit into the step, in the target time: a prediction that grows with every token.
int32_t Scheduler::fitting(int32_t most, int64_t position) const {
  if (options_.target_step_ns == 0 || num_decodes_ == 0) return most;
  int32_t fits = 0;
  for (int32_t no = most + 1; no - fits > 1;) {
    const int32_t half = fits + (no - fits) / 2;
    const StepLoad load = {load_.num_tokens + half, load_.decode_keys,
                           load_.prefill_keys + half * position + int64_t{half} * (half + 1) / 2};
    (cost_.ns(load) <= static_cast<double>(options_.target_step_ns) ? fits : no) = half;
  }
  return fits;
}

/// Of a chunk of tokens from `position` on, those up to the last end of a page in it, if it has one and checkpoints are kept.
int32_t Scheduler::to_checkpoint(int32_t chunk, int64_t position) const {
  if (!checkpoints_) return chunk;
  const int64_t end = (position + chunk) / options_.page_size * options_.page_size;
  return end > position ? static_cast<int32_t>(end - position) : chunk;
}

/// How many of the next `most` tokens of a prompt, from `position` on, the step takes. It is charged with them.
int32_t Scheduler::prompt_chunk(int32_t most, int64_t position) {
  const int32_t least = std::min(most, kLeastChunk - num_prompt_tokens_);
  const int32_t chunk = to_checkpoint(std::max(fitting(most, position), least), position);
  if (chunk <= 0) return 0;
  num_prompt_tokens_ += chunk;
  load_.num_tokens += chunk;
  load_.prefill_keys += chunk * position + int64_t{chunk} * (chunk + 1) / 2;
  return chunk;
}

/// Gives the sequence that is still prefilling, if there is one, its next chunk out of the `left` tokens. (It holds
/// one of the tokens of the budget already.) False if it got less than it could use.
bool Scheduler::grow_prefill(int32_t &left) {
  for (int32_t r = 0; r < num_running(); ++r) {
    Running &seq = running(r);
    if (seq.decodes()) continue;
    auto &prefilling = std::get<Prefilling>(seq.state);
    PrefixCache &cache = cache_.of(prefilling.sequence().owner);
    if (seq.num_ahead == 0) {
      prefilling.adopt(cache, options_.token_budget / options_.page_size + 1, arrays_.row(r));
    }
    const int32_t begin = seq.begin(), remaining = prefilling.num_remaining() - seq.num_ahead;
    const int32_t wanted = std::min(left + 1, remaining);
    make_room(prefilling.sequence().owner, num_groups());
    const int32_t room = prefilling.context().room(options_.groups, cache.pool().num_available(), options_.page_size);
    const int32_t most = std::min(wanted, room - begin);
    const int32_t chunk = most <= 0 ? 0 : prompt_chunk(most, begin);
    if (chunk <= 0) {
      TS_ASSERT(r == youngest(), "the youngest sequence is the one that is still prefilling");
      preempt(r);
      return false;
    }
    prefilling.context().reserve(cache, begin + chunk, arrays_.row(r));
    seq.num_tokens = chunk;
    left -= chunk - 1;
    return chunk == remaining;  // at most one sequence is in the middle of its prefill
  }
  return true;
}

void Scheduler::admit(int32_t &left) {
  const int32_t max_running = std::min(options_.max_seqs, options_.token_budget);
  bool reserved = false;
  while (left > 0 && num_running() < max_running && num_waiting() > 0) {
    const uint64_t arrival = next_waiting().arrival;
    if (short_of_pages_ == arrival) return;
    if (num_prompt_tokens_ >= kLeastChunk && fitting(1, 0) == 0) return;
    if (!reserved) {
      std::ranges::fill(reserved_of_, 0);
      for (const Running &seq : running_) reserve_one(seq);
      reserved = true;
    }
    if (!admit_one(left)) short_of_pages_ = arrival;
  }
}

/// Whose turn it is: those that were preempted resume before anyone new is admitted.
const Sequence &Scheduler::next_waiting() {
  return preempted_.empty() ? queue_.first(now_ms_) : preempted_.front().sequence();
}

void Scheduler::reserve_one(const Running &seq) {
  const auto owner = static_cast<size_t>(seq.sequence().owner);
  reserved_of_[owner] += seq.wants_pages(options_.page_size) ? num_groups() : 0;
}

/// Admits the sequence whose turn it is, if an owner has room for all that it knows.
bool Scheduler::admit_one(int32_t &left) {
  const Sequence &sequence = next_waiting();
  Prefix prefix;
  int32_t owner = choose_owner(sequence, prefix);
  const bool alone = running_.empty() && num_in_flight() == 0;
  while (owner < 0 && alone && end_soonest_leases()) owner = choose_owner(sequence, prefix);
  if (owner < 0) return false;
  if (!prefix.away.empty()) {
    fetch(sequence, owner, std::move(prefix));
    left = 0;  // not in this step
    return true;
  }
  const int32_t num_found = prefix.num_pages * options_.page_size;
  if (num_prompt_tokens_ >= kLeastChunk && fitting(1, num_found) == 0) {
    left = 0;  // not in this step
    return true;
  }
  for (Leases &leases : leases_of_) leases.end(sequence.session);  // what it left is `prefix` now, or of no use

  const Miss miss = why_missed(sequence, owner, prefix.num_pages);
  const int32_t num_restored = fetched_.arrival == sequence.arrival ? std::exchange(fetched_, {}).num_tokens : 0;
  const int32_t r = make_row(owner);
  const std::span<int32_t> row = arrays_.row(r);
  const int32_t missing = sequence.num_tokens() - num_found;
  Prefilling state = take_turn(Admit{cache_.of(owner), std::move(prefix), row, owner, miss, num_restored}, missing);

  const int32_t chunk = prompt_chunk(std::min(left, state.num_remaining()), state.num_computed());
  state.context().reserve(cache_.of(owner), state.num_computed() + chunk, row);
  left = chunk < state.num_remaining() ? 0 : left - chunk;  // at most one is in the middle of its prefill
  Running seq{std::move(state), chunk, {}, ++num_admissions_};
  reserve_one(seq);
  if (r == num_running()) {
    running_.push_back(std::move(seq));
  } else {
    running(r) = std::move(seq);
  }
  return true;
}

/// Admits the sequence whose turn it is, `missing` of whose tokens are to be computed.
Prefilling Scheduler::take_turn(Admit &&admit, int32_t missing) {
  if (!preempted_.empty()) {
    Preempted preempted = std::move(preempted_.front());
    preempted_.pop_front();
    return Transition::apply(std::move(preempted), std::move(admit));
  }
  Queued queued = queue_.pop(now_ms_, missing);
  admit.turn = counters_.num_admitted++;
  counters_.num_prompt_tokens += static_cast<uint64_t>(queued.sequence().num_prompt);
  return Transition::apply(std::move(queued), std::move(admit));
}

/// The owner that has most of the sequence's prefix, in both tiers, which comes with it, else most pages left; of those with room for all that the
/// sequence knows beside the reserved pages, or else it would soon be preempted again. -1 if there is none.
int32_t Scheduler::choose_owner(const Sequence &sequence, Prefix &prefix) {
  int32_t best = -1, most_left = 0;
  for (int32_t owner = 0; owner < cache_.num_owners(); ++owner) {
    Prefix found = match_both_tiers(cache_.of(owner), sequence);
    int32_t missing = 0;
    for (size_t g = 0; g < options_.groups.size(); ++g) {
      const CacheGroup &group = options_.groups[g];
      const int32_t most = group.most_pages(sequence.num_tokens(), options_.token_budget, options_.page_size);
      missing += std::max(0, most - found.num_held(g));
    }
    const int32_t left = pool(owner).num_available() - reserved_of_[static_cast<size_t>(owner)] - missing;
    if (left < 0) continue;
    const bool better = found.num_pages > prefix.num_pages || (found.num_pages == prefix.num_pages && left > most_left);
    if (best >= 0 && !better) continue;
    best = owner;
    most_left = left;
    prefix = std::move(found);
  }
  return best;
}

/// The r-th sequence waits to resume, as the next: it is younger than all that run, and older than all that were preempted.
void Scheduler::preempt(int32_t r) {
  TS_ASSERT(num_in_flight() == 0, "what a batch in flight reads is not preempted");
  Preempted preempted = next(std::move(running(r).state), Preempt{});
  TS_ASSERT(preempted_.empty() || preempted_.front().sequence().turn > preempted.sequence().turn,
            "a running sequence was admitted before those that were preempted");
  preempted_.push_front(std::move(preempted));
  ++counters_.num_preemptions;
  remove(r);
}

// ---- commit ---------------------------------------------------------------------------------------------------------

void Scheduler::commit(Batch &&batch, std::span<Outcome> outcomes, int64_t took_ns, Batch *younger) {
  begin_commit(batch, outcomes, took_ns, younger);
  if (younger != nullptr) return commit_behind(batch, outcomes, *younger);
  land(batch);
  running_ = std::exchange(batch.running_, {});
  end_copies(batch);  // first: who fails makes others forget what has just come back
  size_t next = 0;
  for (int32_t r = 0; r < num_running(); ++r) {
    Running &seq = running(r);
    if (seq.num_tokens == 0) [[unlikely]] {  // it ended after it was scheduled: its row of logits is nobody's
      next += next < batch.logit_rows_.size() && batch.logit_rows_[next].running == r ? 1 : 0;
    } else if (seq.wants_logits()) {
      const size_t num_rows = static_cast<size_t>(seq.draft.size) + 1;
      append(seq, arrays_.row(r), outcomes.subspan(next, num_rows), nullptr);
      next += num_rows;
    } else {
      compute(seq, arrays_.row(r), seq.num_tokens, nullptr);
    }
    if (seq.leaving != Leaving::no) [[unlikely]]
      leave(seq);
  }
  TS_ASSERT(next == outcomes.size(), "every outcome has a sequence");
  recycle(batch);
  remove_ended();
}

/// The older of the batches in flight is in flight no more.
void Scheduler::begin_commit(const Batch &batch, std::span<const Outcome> outcomes, int64_t took_ns,
                             const Batch *younger) {
  TS_ASSERT(batch.arrays_ == in_flight_[0] && (younger == nullptr ? nullptr : younger->arrays_) == in_flight_[1],
            "these are not the batches in flight, the older first");
  TS_ASSERT(static_cast<int32_t>(outcomes.size()) == batch.num_logits(), "every row of logits has an outcome");
  in_flight_ = {in_flight_[1], nullptr};
  if (batch.copies_.empty()) cost_.learn(batch.load_, took_ns);
}

/// Moves one sequence on by what a step has computed of its prompt, but its last token.
void Scheduler::compute(Running &seq, std::span<int32_t> row, int32_t num_tokens, Batch *younger) {
  auto &prefilling = std::get<Prefilling>(seq.state);
  PrefixCache &cache = cache_.of(prefilling.sequence().owner);
  seq.state = Transition::apply(std::move(prefilling),
                                Chunk{cache, row, num_tokens, younger == nullptr ? nullptr : &younger->duplicates_});
}

/// Appends what sampling gave: the next token, and those behind it that were drafted.
void Scheduler::append(Running &seq, std::span<int32_t> row, std::span<Outcome> outcomes, Batch *younger) {
  counters_.num_drafted_tokens += outcomes.size() - 1;
  for (size_t i = 0; i < outcomes.size(); ++i) {
    if (!outcomes[i].error.empty()) {
      Fail event{cache_, std::move(outcomes[i].error)};
      if (younger == nullptr) {
        finish(next(std::move(seq.state), std::move(event)));
      } else {
        finish(next(std::move(seq.state), Early<Fail>{std::move(event)}), *younger);
      }
      seq.num_tokens = 0;
      return;
    }
    const int32_t token = outcomes[i].token;
    const bool goes_on = seq.goes_on(static_cast<int32_t>(i), token);
    std::vector<WritablePage> *const twins = younger == nullptr ? nullptr : &younger->duplicates_;
    Decoding decoding = next(std::move(seq.state), Token{cache_.of(seq.sequence().owner), row, token, twins});
    ++counters_.num_output_tokens;
    FairQueue::charge_output(decoding.sequence());
    counters_.num_accepted_tokens += i > 0 ? 1 : 0;
    const Sequence &sequence = decoding.sequence();
    if (sequence.num_outputs() == 1) {
      counters_.num_cached_tokens += static_cast<uint64_t>(sequence.num_cached);
      counters_.num_restored_tokens += static_cast<uint64_t>(sequence.num_restored);
    }
    if (const std::optional<ts_finish> why = sequence.finish()) {
      stop(std::move(decoding), *why, younger);
      seq.num_tokens = 0;
      return;
    }
    if (!goes_on && seq.draft.size > 0) sequence.drafts->learn(seq.draft, static_cast<int32_t>(i));
    seq.state = std::move(decoding);
    if (!goes_on) return;
  }
}

/// Its last token has ended it. Its session, if it has one, keeps its pages for a while.
void Scheduler::stop(Decoding &&decoding, ts_finish why, Batch *younger) {
  const Sequence &sequence = decoding.sequence();
  remember(sequence);
  Leases &leases = leases_of_[static_cast<size_t>(sequence.owner)];
  const Pause pause{why, now_ms_ + sequence.lease_ms};
  if (sequence.lease_ms == 0 || !options_.prefix_cache) {
    if (younger == nullptr) return finish(Transition::apply(std::move(decoding), Stop{why}));
    return finish(Transition::apply(std::move(decoding), Early<Stop>{{why}}), *younger);
  }
  if (younger == nullptr) {
    Paused paused = Transition::apply(std::move(decoding), Pause{pause});
    finish(std::move(paused.finished));
    leases.add(std::move(paused.leased));
  } else {
    Drained drained = Transition::apply(std::move(decoding), Early<Pause>{pause});
    TS_ASSERT(drained.leased, "who pauses early has what is leased");
    leases.add(std::move(*drained.leased));
    finish(std::move(drained), *younger);
  }
  while (leases.num_pages() > options_.num_pages / 2) leases.end_soonest();
}

void Scheduler::fail(Batch &&batch, const std::string &message) {
  TS_ASSERT(batch.arrays_ == in_flight_[0] && in_flight_[1] == nullptr, "this is not the batch in flight");
  in_flight_ = {};
  land(batch);
  running_ = std::exchange(batch.running_, {});
  give_up_copies(batch);
  for (Running &seq : running_) {
    if (seq.num_tokens == 0) continue;
    finish(next(std::move(seq.state), Fail{cache_, message}));
    seq.num_tokens = 0;
  }
  recycle(batch);
  remove_ended();
}

}  // namespace ts
