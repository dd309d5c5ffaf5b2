#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "batch.h"
#include "cache_parts.h"
#include "events.h"
#include "leases.h"
#include "states.h"

namespace ts {

struct SchedulerOptions {
  int32_t token_budget = 0;  ///< tokens a step may hold
  int32_t max_seqs = 0;      ///< sequences a step may hold
  int32_t max_context = 0;   ///< tokens of one sequence
  int32_t page_size = 0;
  int32_t num_pages = 0;   ///< of each owner
  int32_t num_owners = 1;  ///< parts that sequences and the KV cache are shared out in (CacheParts)
  bool prefix_cache = false;
  int32_t max_draft = 0;                 ///< tokens of one sequence that a step may guess; Draft::kMost at most
  std::span<int32_t> batch_memory = {};  ///< where the batch arrays lie: see BatchArrays
};

/// Sums since the start.
struct SchedulerCounters {
  uint64_t num_prompt_tokens = 0;  ///< of requests that were admitted
  uint64_t num_cached_tokens = 0;  ///< of these, found in the prefix cache
  uint64_t num_output_tokens = 0;
  uint64_t num_preemptions = 0;
  uint64_t num_finished = 0;
  uint64_t num_drafted_tokens = 0;
  uint64_t num_accepted_tokens = 0;  ///< of these, outputs
};

/// A row of logits: of the sequence that is the running-th of the step, `ahead` tokens behind its last.
struct LogitRow {
  int32_t running;
  int32_t ahead;  ///< 0, or that many tokens of its draft lie between
};

/// What sampling made of one row of logits: a token, or an error that ends the request. It counts if the row has ahead = 0, or
/// the row before counts and Batch::goes_on there.
struct Outcome {
  int32_t token = -1;
  std::string error;
};

class Scheduler;

/// A step in flight: its arrays, and the running sequences with every page that the step reads or writes. As long as
/// it lives, nothing else can reach these pages. It ends in Scheduler::commit or Scheduler::fail, once.
class Batch {
 public:
  Batch(Batch &&) noexcept = default;
  Batch &operator=(Batch &&) = delete;
  Batch(const Batch &) = delete;
  Batch &operator=(const Batch &) = delete;
  ~Batch();

  const ts_batch &arrays() const { return *arrays_; }
  int32_t num_logits() const { return arrays_->num_logits; }

  /// The sequence of which the `logit`-th row of logits decides a token: its next, or one further `ahead`.
  const Sequence &sequence(int32_t logit) const;
  int32_t ahead(int32_t logit) const;

  /// Whether the row behind this one counts if this one gives `token`: it was drafted, and does not end the sequence.
  bool goes_on(int32_t logit, int32_t token) const;

 private:
  friend class Scheduler;

  struct Running {
    std::variant<Prefilling, Decoding> state;
    int32_t num_tokens = 0;  // of this step, the draft's among them; 0: ended, to be removed
    Draft draft = {};

    const Sequence &sequence() const;
    const Context &context() const;
    Context &context();
    int32_t num_computed() const;
    bool wants_logits() const { return num_computed() + num_tokens >= sequence().num_tokens(); }
    bool wants_pages(int32_t page_size) const;  // before its last token
    bool goes_on(int32_t ahead, int32_t token) const;
  };

  Batch(std::vector<Running> &&running, const ts_batch &arrays, std::span<const LogitRow> logit_rows)
      : running_(std::move(running)), arrays_(&arrays), logit_rows_(logit_rows) {}

  std::vector<Running> running_;  // [num_seqs]: a sequence's index is its row of the page table
  const ts_batch *arrays_;
  std::span<const LogitRow> logit_rows_;  // [num_logits] a sequence's in order
};

inline const Sequence &Batch::Running::sequence() const {
  return std::visit([](const auto &s) -> const Sequence & { return s.sequence(); }, state);
}

inline const Context &Batch::Running::context() const {
  return std::visit([](const auto &s) -> const Context & { return s.context(); }, state);
}

inline Context &Batch::Running::context() {
  return std::visit([](auto &s) -> Context & { return s.context(); }, state);
}

inline bool Batch::Running::goes_on(int32_t ahead, int32_t token) const {
  return ahead < draft.size && draft.tokens[static_cast<size_t>(ahead)] == token && !sequence().stops_at(token);
}

inline bool Batch::Running::wants_pages(int32_t page_size) const {
  const int32_t most = num_pages_for(sequence().num_prompt + sequence().max_tokens - 1, page_size);
  return context().num_pages() < most;
}

inline int32_t Batch::Running::num_computed() const {
  return std::visit([](const auto &s) { return s.num_computed(); }, state);
}

/// Decides what each step computes: continuous batching under a token budget, decodes first, then prefills in chunks,
/// first come first served; the prefix cache; preemption of the youngest when pages run out.
///
/// A session's last request may leave a lease: its full pages stay until its next one is admitted, or their time has come, or
/// they are the only way for another request to run.
///
/// A pure function of its state and of the calls it gets: no clock, no thread, no device. Between schedule() and
/// commit() the running sequences are the batch's. A step costs O(sequences in the batch + pages they cross).
///
/// Every running sequence is older than every waiting one, and has a token in every step: at most min(max_seqs,
/// token_budget) run, and of these at most one, the youngest, has more prompt left than a step holds. The oldest is
/// never preempted, so every request ends.
///
/// With several owners a sequence belongs to that whose cache has most of its prefix, else to that with most pages left; a step's
/// sequences are sorted by owner.
class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions &options);
  Scheduler(const Scheduler &) = delete;
  Scheduler &operator=(const Scheduler &) = delete;

  /// The request fits the pool and the context (make_sequence has checked), and its id is not live.
  void submit(std::unique_ptr<Sequence> sequence);

  /// Ends a request in any state; unknown ids are ignored. O(live requests). Not while a batch is in flight.
  void cancel(uint64_t id);
  void cancel_all();

  /// The time of what follows, from any origin. It may jump; backwards it has no effect.
  void set_time(int64_t now_ms);

  /// Gives up what sessions have left for their next turns.
  void end_leases();

  /// The next step, or nothing if there is nothing to do. One batch may be in flight.
  std::optional<Batch> schedule();

  /// The step has run: outcomes[i] is what sampling made of the i-th row of logits.
  void commit(Batch &&batch, std::span<Outcome> outcomes);

  /// The step could not be run: every sequence in it ends with this message, and nothing of them is found again.
  void fail(Batch &&batch, const std::string &message);

  /// Requests that have ended since the last call, in `into`, whose memory is reused.
  void take_finished(std::vector<Finished> &into);

  int32_t num_waiting() const { return static_cast<int32_t>(waiting_.size()); }
  int32_t num_running() const { return static_cast<int32_t>(running_.size()); }  ///< between steps
  bool idle() const { return waiting_.empty() && running_.empty(); }
  const CacheParts &cache() const { return cache_; }
  const PagePool &pool(int32_t owner = 0) const { return cache_.pool(owner); }
  int32_t num_leases() const;
  const SchedulerCounters &counters() const { return counters_; }

  void check() const;  ///< asserts every invariant that can be seen between steps; O(pages), for tests

 private:
  using Running = Batch::Running;
  using Waiting = std::variant<Queued, Preempted>;

  bool make_room(int32_t owner);
  bool end_soonest_leases();
  bool grow_decodes();
  bool grow_prefill(int32_t &left);
  void draft(int32_t left);
  void admit(int32_t &left);
  bool admit_one(int32_t &left);
  int32_t choose_owner(const Sequence &sequence, std::vector<SharedPage> &prefix);
  void reserve_one(const Running &seq);
  int32_t make_row(int32_t owner);
  void move_row(int32_t from, int32_t to);
  void fill_arrays();
  void advance(int32_t r, std::span<Outcome> outcomes, size_t &next_outcome);
  void append(int32_t r, std::span<Outcome> outcomes);
  void stop(Decoding &&decoding, ts_finish why);
  void finish(Finished &&finished);
  void preempt(int32_t r);
  int32_t youngest() const;
  void remove(int32_t r);
  void remove_ended();
  Running &running(int32_t r) { return running_[static_cast<size_t>(r)]; }

  SchedulerOptions options_;
  CacheParts cache_;
  std::vector<Leases> leases_of_;  // each owner
  BatchArrays arrays_;
  std::deque<Waiting> waiting_;   // oldest first
  std::vector<Running> running_;  // index: row of the page table; sorted by owner; empty while a batch is in flight
  std::vector<int32_t> num_running_of_;  // each owner
  std::vector<int32_t> reserved_of_;     // each owner: pages that those that run already may still want, one each
  std::vector<LogitRow> logit_rows_;
  std::vector<Finished> finished_;
  SchedulerCounters counters_;
  uint64_t next_arrival_ = 0;
  int64_t now_ms_ = 0;
  bool in_flight_ = false;
  bool pages_short_ = false;  // the oldest waiting sequence did not fit, and nothing has changed that
};

}  // namespace ts
