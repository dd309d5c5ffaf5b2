#include "scheduler.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "check.h"

namespace ts {
namespace {

const Sequence &sequence_of(const std::variant<Queued, Preempted> &waiting) {
  return std::visit([](const auto &state) -> const Sequence & { return state.sequence(); }, waiting);
}

/// Applies an event to whichever state it is: each of them must accept it, with the same outcome.
template <class Event, class... States>
auto next(std::variant<States...> &&state, Event &&event) {
  return std::visit(
      [&](auto &&s) { return Transition::apply(std::forward<decltype(s)>(s), std::forward<Event>(event)); },
      std::move(state));
}

}  // namespace

// ---- batch ----------------------------------------------------------------------------------------------------------

Batch::~Batch() {
  TS_ASSERT(running_.empty() || std::uncaught_exceptions() > 0, "a batch was dropped: its requests would never end");
}

const Sequence &Batch::sequence(int32_t logit) const {
  TS_ASSERT(logit >= 0 && logit < num_logits(), "the step has no such row of logits");
  return running_[static_cast<size_t>(logit_rows_[static_cast<size_t>(logit)].running)].sequence();
}

int32_t Batch::ahead(int32_t logit) const { return logit_rows_[static_cast<size_t>(logit)].ahead; }

bool Batch::goes_on(int32_t logit, int32_t token) const {
  const auto [index, ahead] = logit_rows_[static_cast<size_t>(logit)];
  return running_[static_cast<size_t>(index)].goes_on(ahead, token);
}

// ---- inbox ----------------------------------------------------------------------------------------------------------

Scheduler::Scheduler(const SchedulerOptions &options)
    : options_(options),
      cache_(options.num_owners, options.num_pages, options.page_size, options.prefix_cache),
      arrays_(options.token_budget, options.max_seqs, num_pages_for(options.max_context, options.page_size),
              options.batch_memory) {
  TS_ASSERT(options.token_budget >= 1 && options.max_seqs >= 1, "a step holds at least one token of one sequence");
  TS_ASSERT(options.max_draft >= 0 && options.max_draft <= Draft::kMost, "a draft has room for so many tokens");
  const auto max_seqs = static_cast<size_t>(options.max_seqs);
  running_.reserve(max_seqs);
  logit_rows_.reserve(max_seqs);
  finished_.reserve(max_seqs);
  num_running_of_.resize(static_cast<size_t>(options.num_owners));
  reserved_of_.resize(static_cast<size_t>(options.num_owners));
  leases_of_.resize(static_cast<size_t>(options.num_owners));
}

void Scheduler::submit(std::unique_ptr<Sequence> sequence) {
  TS_ASSERT(sequence->page_size == options_.page_size, "a sequence is made for this scheduler's pages");
  TS_ASSERT(sequence->hashed == options_.prefix_cache, "a sequence has hashes if there is a prefix cache");
  TS_ASSERT(num_pages_for(sequence->num_prompt + sequence->max_tokens - 1, options_.page_size) <= options_.num_pages,
            "a request that can never fit is refused before it comes here");
  sequence->arrival = next_arrival_++;
  waiting_.emplace_back(std::in_place_type<Queued>, std::move(sequence));
}

void Scheduler::cancel(uint64_t id) {
  TS_ASSERT(!in_flight_, "a request in a batch in flight cannot be cancelled");
  for (int32_t r = 0; r < num_running(); ++r) {
    if (running(r).sequence().id != id) continue;
    finish(next(std::move(running(r).state), Cancel{}));
    remove(r);
    return;
  }
  const auto found =
      std::find_if(waiting_.begin(), waiting_.end(), [id](const auto &w) { return sequence_of(w).id == id; });
  if (found == waiting_.end()) return;
  finish(next(std::move(*found), Cancel{}));
  waiting_.erase(found);
  pages_short_ = false;
}

void Scheduler::cancel_all() {
  while (!running_.empty()) cancel(running_.back().sequence().id);
  while (!waiting_.empty()) cancel(sequence_of(waiting_.front()).id);
}

void Scheduler::set_time(int64_t now_ms) {
  now_ms_ = std::max(now_ms_, now_ms);
  for (Leases &leases : leases_of_) {
    if (leases.end_due(now_ms_)) pages_short_ = false;
  }
}

void Scheduler::end_leases() {
  while (end_soonest_leases()) {
  }
  pages_short_ = false;
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

// ---- schedule -------------------------------------------------------------------------------------------------------

std::optional<Batch> Scheduler::schedule() {
  TS_ASSERT(!in_flight_, "one batch at a time");
  const bool had_pages = grow_decodes();
  int32_t left = options_.token_budget - num_running();
  TS_ASSERT(left >= 0, "more sequences run than a step has tokens for");
  if (grow_prefill(left) && had_pages) admit(left);
  if (running_.empty()) {
    TS_ASSERT(waiting_.empty(), "with nothing running, every page is available to the oldest request");
    return std::nullopt;
  }
  if (options_.max_draft > 0) draft(left);
  fill_arrays();
  in_flight_ = true;
  return Batch(std::exchange(running_, {}), arrays_.view(), logit_rows_);
}

/// Ends leases of an owner until it has a page available. False if it has none even so.
bool Scheduler::make_room(int32_t owner) {
  Leases &leases = leases_of_[static_cast<size_t>(owner)];
  while (pool(owner).num_available() == 0 && !leases.empty()) leases.end_soonest();
  return pool(owner).num_available() > 0;
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
    const bool crosses = num_tokens > decoding->context().num_pages() * options_.page_size;
    const int32_t owner = decoding->sequence().owner;
    if (crosses && !make_room(owner)) {
      preempt(youngest());
      enough = false;
      r = 0;  // rows have moved; those that have their slot keep it
      continue;
    }
    decoding->context().reserve(cache_.of(owner), num_tokens, arrays_.row(r));
    ++r;
  }
  return enough;
}

/// Gives the sequence that is still prefilling, if there is one, its next chunk out of the `left` tokens. (It holds
/// one of the tokens of the budget already.) False if it got less than it could use.
bool Scheduler::grow_prefill(int32_t &left) {
  for (int32_t r = 0; r < num_running(); ++r) {
    auto *prefilling = std::get_if<Prefilling>(&running(r).state);
    if (prefilling == nullptr) continue;
    PrefixCache &cache = cache_.of(prefilling->sequence().owner);
    prefilling->adopt(cache, arrays_.row(r));
    const int32_t wanted = std::min(left + 1, prefilling->num_remaining());
    make_room(prefilling->sequence().owner);
    const int32_t room = (prefilling->context().num_pages() + cache.pool().num_available()) * options_.page_size;
    const int32_t chunk = std::min(wanted, room - prefilling->num_computed());
    if (chunk <= 0) {
      TS_ASSERT(r == youngest(), "the youngest sequence is the one that is still prefilling");
      preempt(r);
      return false;
    }
    prefilling->context().reserve(cache, prefilling->num_computed() + chunk, arrays_.row(r));
    running(r).num_tokens = chunk;
    left -= chunk - 1;
    return chunk == prefilling->num_remaining();  // at most one sequence is in the middle of its prefill
  }
  return true;
}

void Scheduler::admit(int32_t &left) {
  const int32_t max_running = std::min(options_.max_seqs, options_.token_budget);
  if (left <= 0 || num_running() >= max_running || waiting_.empty() || pages_short_) return;
  std::ranges::fill(reserved_of_, 0);
  for (const Running &seq : running_) reserve_one(seq);
  while (left > 0 && num_running() < max_running && !waiting_.empty() && !pages_short_) {
    if (!admit_one(left)) pages_short_ = true;
  }
}

void Scheduler::reserve_one(const Running &seq) {
  const auto owner = static_cast<size_t>(seq.sequence().owner);
  reserved_of_[owner] += seq.wants_pages(options_.page_size) ? 1 : 0;
}

/// Admits the oldest waiting sequence if an owner has room for all that it knows.
bool Scheduler::admit_one(int32_t &left) {
  const Sequence &sequence = sequence_of(waiting_.front());
  std::vector<SharedPage> prefix;
  int32_t owner = choose_owner(sequence, prefix);
  while (owner < 0 && running_.empty() && end_soonest_leases()) owner = choose_owner(sequence, prefix);
  if (owner < 0) return false;
  for (Leases &leases : leases_of_) leases.end(sequence.session);  // what it left is `prefix` now, or of no use

  const Miss miss = explain_miss(cache_.of(owner), sequence, static_cast<int32_t>(prefix.size()));
  const bool first_time = std::holds_alternative<Queued>(waiting_.front());
  const int32_t r = make_row(owner);
  const std::span<int32_t> row = arrays_.row(r);
  Prefilling state = next(std::move(waiting_.front()), Admit{std::move(prefix), row, owner, miss});
  waiting_.pop_front();
  if (first_time) counters_.num_prompt_tokens += static_cast<uint64_t>(state.sequence().num_prompt);

  const int32_t chunk = std::min(left, state.num_remaining());
  state.context().reserve(cache_.of(owner), state.num_computed() + chunk, row);
  left -= chunk;
  Running seq{std::move(state), chunk};
  reserve_one(seq);
  if (r == num_running()) {
    running_.push_back(std::move(seq));
  } else {
    running(r) = std::move(seq);
  }
  return true;
}

/// The owner that has most of the sequence's prefix, which comes with it, else most pages left; of those with room for all that the
/// sequence knows beside the reserved pages, or else it would soon be preempted again. -1 if there is none.
int32_t Scheduler::choose_owner(const Sequence &sequence, std::vector<SharedPage> &prefix) {
  int32_t best = -1, most_left = 0;
  for (int32_t owner = 0; owner < cache_.num_owners(); ++owner) {
    std::vector<SharedPage> found = match_prefix(cache_.of(owner), sequence, 0);
    const int32_t missing =
        num_pages_for(sequence.num_tokens(), options_.page_size) - static_cast<int32_t>(found.size());
    const int32_t left = pool(owner).num_available() - reserved_of_[static_cast<size_t>(owner)] - missing;
    if (left < 0) continue;
    const bool better = found.size() > prefix.size() || (found.size() == prefix.size() && left > most_left);
    if (best >= 0 && !better) continue;
    best = owner;
    most_left = left;
    prefix = std::move(found);
  }
  return best;
}

/// Lets decodes guess ahead, with tokens and rows of logits that nobody else wants, and pages that nobody may miss.
void Scheduler::draft(int32_t left) {
  int32_t rows = options_.max_seqs - num_running();
  for (int32_t r = 0; r < num_running(); ++r) {
    auto *decoding = std::get_if<Decoding>(&running(r).state);
    if (decoding == nullptr || decoding->sequence().drafts == nullptr) continue;
    const Sequence &sequence = decoding->sequence();
    const int32_t spare = pool(sequence.owner).num_available() > num_running() ? 1 : 0;
    const int32_t room = (decoding->context().num_pages() + spare) * options_.page_size - sequence.num_tokens();
    const int32_t before_last = sequence.max_tokens - sequence.num_outputs() - 1;
    const int32_t most = std::min({options_.max_draft, left, rows, room, before_last});
    if (most <= 0) continue;
    running(r).draft = sequence.drafts->propose(sequence.tokens, most);
    const int32_t num_drafted = running(r).draft.size;
    running(r).num_tokens += num_drafted;
    decoding->context().reserve(cache_.of(sequence.owner), sequence.num_tokens() + num_drafted, arrays_.row(r));
    left -= num_drafted;
    rows -= num_drafted;
  }
}

void Scheduler::fill_arrays() {
  arrays_.clear();
  logit_rows_.clear();
  for (int32_t r = 0; r < num_running(); ++r) {
    const Running &seq = running(r);
    const Sequence &sequence = seq.sequence();
    const int32_t begin = seq.num_computed();
    const int32_t end = begin + seq.num_tokens;
    const int32_t known = sequence.num_tokens();
    TS_ASSERT(seq.num_tokens >= 1 && end <= known + seq.draft.size, "every running sequence has tokens in every step");
    arrays_.add_sequence(end);
    for (int32_t p = begin; p < end;) {
      const WritablePage &page = seq.context().open_page(p, options_.page_size);
      int32_t offset = p % options_.page_size;
      for (; p < end && offset < options_.page_size; ++p) {
        const int32_t token =
            p < known ? sequence.tokens[static_cast<size_t>(p)] : seq.draft.tokens[static_cast<size_t>(p - known)];
        arrays_.add_token(token, p, page.slot(offset++));
        if (p < known - 1) continue;
        arrays_.want_logits();
        logit_rows_.push_back({r, p - (known - 1)});
      }
    }
  }
}

// ---- commit ---------------------------------------------------------------------------------------------------------

void Scheduler::commit(Batch &&batch, std::span<Outcome> outcomes) {
  TS_ASSERT(in_flight_ && batch.arrays_ == &arrays_.view(), "this is not the batch in flight");
  TS_ASSERT(static_cast<int32_t>(outcomes.size()) == batch.num_logits(), "every row of logits has an outcome");
  running_ = std::exchange(batch.running_, {});
  in_flight_ = false;
  size_t next_outcome = 0;
  for (int32_t r = 0; r < num_running(); ++r) advance(r, outcomes, next_outcome);
  TS_ASSERT(next_outcome == outcomes.size(), "every outcome has a sequence");
  remove_ended();
}

/// Moves one sequence on by what the step has computed of it.
void Scheduler::advance(int32_t r, std::span<Outcome> outcomes, size_t &next_outcome) {
  Running &seq = running(r);
  const std::span<int32_t> row = arrays_.row(r);
  PrefixCache &cache = cache_.of(seq.sequence().owner);
  if (!seq.wants_logits()) {
    auto &prefilling = std::get<Prefilling>(seq.state);
    seq.state = Transition::apply(std::move(prefilling), Chunk{cache, row, seq.num_tokens});
    return;
  }
  const size_t num_rows = static_cast<size_t>(seq.draft.size) + 1;
  append(r, outcomes.subspan(next_outcome, num_rows));
  next_outcome += num_rows;
}

/// Appends what sampling gave: the next token, and those behind it that were drafted.
void Scheduler::append(int32_t r, std::span<Outcome> outcomes) {
  Running &seq = running(r);
  counters_.num_drafted_tokens += outcomes.size() - 1;
  for (size_t i = 0; i < outcomes.size(); ++i) {
    if (!outcomes[i].error.empty()) {
      finish(next(std::move(seq.state), Fail{cache_.of(seq.sequence().owner), std::move(outcomes[i].error)}));
      seq.num_tokens = 0;
      return;
    }
    const int32_t token = outcomes[i].token;
    const bool goes_on = seq.goes_on(static_cast<int32_t>(i), token);
    Decoding decoding = next(std::move(seq.state), Token{cache_.of(seq.sequence().owner), arrays_.row(r), token});
    ++counters_.num_output_tokens;
    counters_.num_accepted_tokens += i > 0 ? 1 : 0;
    const Sequence &sequence = decoding.sequence();
    if (sequence.num_outputs() == 1) counters_.num_cached_tokens += static_cast<uint64_t>(sequence.num_cached);
    if (const std::optional<ts_finish> why = sequence.finish()) {
      stop(std::move(decoding), *why);
      seq.num_tokens = 0;
      return;
    }
    if (!goes_on && seq.draft.size > 0) sequence.drafts->learn(seq.draft.size, static_cast<int32_t>(i));
    seq.state = std::move(decoding);
    if (!goes_on) return;
  }
}

/// Its last token has ended it. Its session, if it has one, keeps its pages for a while.
void Scheduler::stop(Decoding &&decoding, ts_finish why) {
  const Sequence &sequence = decoding.sequence();
  if (sequence.lease_ms == 0 || !options_.prefix_cache) {
    finish(Transition::apply(std::move(decoding), Stop{why}));
    return;
  }
  Leases &leases = leases_of_[static_cast<size_t>(sequence.owner)];
  Paused paused = Transition::apply(std::move(decoding), Pause{why, now_ms_ + sequence.lease_ms});
  finish(std::move(paused.finished));
  leases.add(std::move(paused.leased));
  while (leases.num_pages() > options_.num_pages / 2) leases.end_soonest();
}

void Scheduler::fail(Batch &&batch, const std::string &message) {
  TS_ASSERT(in_flight_ && batch.arrays_ == &arrays_.view(), "this is not the batch in flight");
  running_ = std::exchange(batch.running_, {});
  in_flight_ = false;
  for (Running &seq : running_) {
    PrefixCache &cache = cache_.of(seq.sequence().owner);
    finish(next(std::move(seq.state), Fail{cache, message}));
    seq.num_tokens = 0;
  }
  remove_ended();
}

// ---- rows -----------------------------------------------------------------------------------------------------------

int32_t Scheduler::youngest() const {
  const auto it = std::max_element(running_.begin(), running_.end(), [](const Running &a, const Running &b) {
    return a.sequence().arrival < b.sequence().arrival;
  });
  return static_cast<int32_t>(it - running_.begin());
}

/// The r-th sequence goes back to the head of the queue: it is younger than all that run, and older than all that wait.
void Scheduler::preempt(int32_t r) {
  Preempted preempted = next(std::move(running(r).state), Preempt{});
  TS_ASSERT(waiting_.empty() || sequence_of(waiting_.front()).arrival > preempted.sequence().arrival,
            "a running sequence is older than those that wait");
  waiting_.emplace_front(std::move(preempted));
  ++counters_.num_preemptions;
  remove(r);
}

void Scheduler::move_row(int32_t from, int32_t to) {
  running(to) = std::move(running(from));
  arrays_.move_row(from, to, running(to).context().num_pages());
}

/// The row behind those of `owner`: of each owner after it, the first sequence moves behind the last. If it is no new row, what
/// runs there is spent.
int32_t Scheduler::make_row(int32_t owner) {
  int32_t row = num_running();
  for (int32_t o = cache_.num_owners() - 1; o > owner; --o) {
    const int32_t count = num_running_of_[static_cast<size_t>(o)];
    if (count == 0) continue;
    const int32_t first = row - count;
    if (row == num_running()) {
      running_.push_back(std::move(running(first)));
      arrays_.move_row(first, row, running_.back().context().num_pages());
    } else {
      move_row(first, row);
    }
    row = first;
  }
  ++num_running_of_[static_cast<size_t>(owner)];
  return row;
}

/// Takes out the r-th sequence, whose state is spent; the last one of its owner moves to its row, to that one's the last of the
/// next owner, and so on.
void Scheduler::remove(int32_t r) {
  int32_t end = 0, hole = r;
  for (int32_t &count : num_running_of_) {
    const bool mine = end <= r && r < end + count;
    end += count;
    if (end <= r) continue;
    if (mine) --count;
    if (hole != end - 1) move_row(end - 1, hole);
    hole = end - 1;
  }
  running_.pop_back();
  pages_short_ = false;
}

void Scheduler::remove_ended() {
  for (int32_t r = num_running() - 1; r >= 0; --r) {
    if (running(r).num_tokens == 0) remove(r);
  }
}

void Scheduler::check() const {
  cache_.check();
  TS_ASSERT(!in_flight_, "invariants are checked between steps");
  const auto in_order = [](const Waiting &a, const Waiting &b) {
    return sequence_of(a).arrival < sequence_of(b).arrival;
  };
  TS_ASSERT(std::is_sorted(waiting_.begin(), waiting_.end(), in_order), "the queue is in order of arrival");
  int32_t num_prefilling = 0;
  for (const Running &seq : running_) {
    num_prefilling += std::holds_alternative<Prefilling>(seq.state) ? 1 : 0;
    TS_ASSERT(waiting_.empty() || seq.sequence().arrival < sequence_of(waiting_.front()).arrival, "the oldest run");
    TS_ASSERT(seq.context().num_pages() * options_.page_size >= seq.num_computed(), "what was computed lies in pages");
    TS_ASSERT(seq.context().num_sealed() == seq.num_computed() / options_.page_size, "full pages are sealed");
  }
  const auto by_owner = [](const Running &a, const Running &b) { return a.sequence().owner < b.sequence().owner; };
  TS_ASSERT(std::is_sorted(running_.begin(), running_.end(), by_owner), "those of an owner are together");
  for (const Leases &leases : leases_of_) {
    TS_ASSERT(leases.num_pages() <= options_.num_pages / 2, "leases hold at most half of the pages");
  }
  TS_ASSERT(num_prefilling <= 1, "at most one sequence is in the middle of its prefill");
}

}  // namespace ts
