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
#include "check.h"
#include "events.h"
#include "fair_queue.h"
#include "fetch.h"
#include "leases.h"
#include "states.h"
#include "step_cost.h"

namespace ts {

struct SchedulerOptions {
  int32_t token_budget = 0;  ///< tokens a step may hold
  int32_t max_seqs = 0;      ///< sequences a step may hold
  int32_t max_context = 0;   ///< tokens of one sequence
  int32_t page_size = 0;
  int32_t num_pages = 0;   ///< of each owner
  int32_t num_owners = 1;  ///< parts that sequences and the KV cache are shared out in (CacheParts)
  bool prefix_cache = false;
  std::vector<CacheGroup> groups = {CacheGroup{}};
  TierOptions tier = {};         ///< keeps what the prefix cache evicts
  int64_t patience_ms = 10'000;  ///< see FairQueue
  StepCost cost = {};            ///< what a step takes; has to be known for a target, and for drafts
  int64_t target_step_ns = 0;    ///< what a step with decodes may take, so that prefills do not stall them; 0: any time
  /// Tokens of one sequence that a step may guess; Draft::kMost at most. None with a recurrent group: a state cannot be taken
  /// back to before what was guessed wrong.
  int32_t max_draft = 0;
  bool drafts_at_any_cost = false;       ///< as if tokens beside the first took no time
  Generations::Options earlier = {};     ///< what is kept of earlier requests for drafts, if there are drafts
  std::span<int32_t> batch_memory = {};  ///< where the batch arrays lie: see BatchArrays
};

/// Sums since the start.
struct SchedulerCounters {
  uint64_t num_prompt_tokens = 0;  ///< of requests that were admitted
  uint64_t num_cached_tokens = 0;  ///< of these, found in the prefix cache
  uint64_t num_output_tokens = 0;
  uint64_t num_preemptions = 0;
  uint64_t num_finished = 0;
  uint64_t num_admitted = 0;  ///< for the first time
  uint64_t num_drafted_tokens = 0;
  uint64_t num_accepted_tokens = 0;  ///< of these, outputs
  uint64_t num_restored_tokens = 0;  ///< of num_cached_tokens, brought back from the second tier for their request
  uint64_t num_pages_kept = 0;       ///< copied to the second tier
  uint64_t num_pages_restored = 0;   ///< and back
  uint64_t num_pages_broken = 0;     ///< that could not be, or came back changed
};

/// A row of logits: of the sequence that is the running-th of the step, `ahead` tokens behind its last.
struct LogitRow {
  int32_t running;
  int32_t ahead;  ///< 0, or that many tokens of its draft lie between
};

/// What sampling made of one row of logits: a token, or an error that ends the request. It counts if the row has ahead = 0, or
/// the row before counts and Batch::goes_on there.
struct Outcome {
  static constexpr int32_t kNone = -1, kNotSampled = -2;
  int32_t token = kNone;  ///< with an error: kNone, or kNotSampled if that is the machine's, which need not come again
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
  const Sequence &running(int32_t row) const { return running_[static_cast<size_t>(row)].sequence(); }
  bool decodes(int32_t row) const { return std::holds_alternative<Decoding>(running_[static_cast<size_t>(row)].state); }
  int32_t ahead(int32_t logit) const;

  /// Whether the row behind this one counts if this one gives `token`: it was drafted, and does not end the sequence.
  bool goes_on(int32_t logit, int32_t token) const;

  /// To be made in this order before the step is run, which reads and overwrites these pages; what makes one sets its state. A step
  /// may consist of nothing else: then it has no tokens, and is not run.
  std::span<PageCopy> copies() { return copies_; }
  std::span<const PageCopy> copies() const { return copies_; }

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
    bool wants_pages(int32_t page_size) const;  // of each group one, before its last token
    bool goes_on(int32_t ahead, int32_t token) const;
  };

  Batch(std::vector<Running> &&running, const ts_batch &arrays, std::span<const LogitRow> logit_rows,
        std::vector<PageCopy> &&copies, std::optional<Fetch> &&fetch)
      : running_(std::move(running)),
        arrays_(&arrays),
        logit_rows_(logit_rows),
        copies_(std::move(copies)),
        fetch_(std::move(fetch)) {}

  std::vector<Running> running_;  // [num_seqs]: a sequence's index is its row of the page table
  const ts_batch *arrays_;
  std::span<const LogitRow> logit_rows_;  // [num_logits] a sequence's in order
  std::vector<PageCopy> copies_;
  std::optional<Fetch> fetch_;  // what the copies bring back
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

inline const Sequence &Batch::sequence(int32_t logit) const {
  TS_ASSERT(logit >= 0 && logit < num_logits(), "the step has no such row of logits");
  return running_[static_cast<size_t>(logit_rows_[static_cast<size_t>(logit)].running)].sequence();
}

inline int32_t Batch::ahead(int32_t logit) const { return logit_rows_[static_cast<size_t>(logit)].ahead; }

inline bool Batch::goes_on(int32_t logit, int32_t token) const {
  const auto [index, ahead] = logit_rows_[static_cast<size_t>(logit)];
  return running_[static_cast<size_t>(index)].goes_on(ahead, token);
}

inline int32_t Batch::Running::num_computed() const {
  return std::visit([](const auto &s) { return s.num_computed(); }, state);
}

/// Decides what each step computes: continuous batching under a token budget, decodes first, then prefills in chunks,
/// in the order of FairQueue; the prefix cache; preemption of the youngest (which was admitted last) when pages run out.
///
/// A session's last request may leave a lease: its full pages stay until its next one is admitted, or their time has come, or
/// they are the only way for another request to run.
///
/// A pure function of its state and of the calls it gets: no clock, no thread, no device. Between schedule() and
/// commit() the running sequences are the batch's. A step costs O(sequences in the batch + pages they cross).
///
/// Every running sequence was admitted before every one that was preempted, and has a token in every step: at most min(max_seqs,
/// token_budget) run, and of these at most one, the youngest, has more prompt left than a step holds. Who was preempted resumes
/// before anyone is admitted. The oldest is never preempted, so every request that is admitted ends; and nobody is admitted before
/// the one whose turn it is, whether it fits or not, so that within the bound of FairQueue each is admitted.
///
/// With a target time, a step in which anyone decodes has as many tokens of prompts (and of drafts) as are predicted to fit into it; but
/// kLeastChunk of a prompt in any case, so that prompts move on even where the target cannot be met. So decodes wait at most for the
/// target, or for themselves with kLeastChunk tokens more.
///
/// With recurrent groups a chunk that would go past the end of a page stops at the last one that it reaches, because only there a
/// checkpoint is kept, which others, and the sequence itself when it was preempted, go on from.
///
/// Where the second tier has what the cache lacks of a prefix, whose turn it is waits for a step, or a few, until that is brought back,
/// and nobody is admitted before; then it finds it in the cache.
///
/// With several owners a sequence belongs to that whose cache has most of its prefix, else to that with most pages left; a step's
/// sequences are sorted by owner.
class Scheduler {
 public:
  static constexpr int32_t kLeastChunk = 16;

  explicit Scheduler(const SchedulerOptions &options);
  Scheduler(const Scheduler &) = delete;
  Scheduler &operator=(const Scheduler &) = delete;

  /// The request fits the pool and the context (make_sequence has checked), and its id is not live. It came `waited_ms` ago.
  void submit(std::unique_ptr<Sequence> sequence, int64_t waited_ms = 0);

  /// Ends a request in any state; unknown ids are ignored. O(live requests). Not while a batch is in flight.
  void cancel(uint64_t id);
  void cancel_all();

  /// The time of what follows, from any origin. It may jump; backwards it has no effect. Ends what is past its deadline. Not while
  /// a batch is in flight.
  void set_time(int64_t now_ms);

  /// Gives up what sessions have left for their next turns.
  void end_leases();

  /// The next step, or nothing if there is nothing to do. One batch may be in flight.
  std::optional<Batch> schedule();

  /// The step's copies have been made, and it has run: outcomes[i] is what sampling made of the i-th row of logits. It took so long; 0: nobody knows.
  void commit(Batch &&batch, std::span<Outcome> outcomes, int64_t took_ns = 0);

  /// The step could not be run: every sequence in it ends with this message, and nothing of them is found again.
  void fail(Batch &&batch, const std::string &message);

  /// Requests that have ended since the last call, in `into`, whose memory is reused.
  void take_finished(std::vector<Finished> &into);

  int32_t num_waiting() const { return queue_.size() + static_cast<int32_t>(preempted_.size()); }
  int32_t num_running() const { return static_cast<int32_t>(running_.size()); }  ///< between steps
  bool idle() const { return num_waiting() == 0 && running_.empty(); }
  const CacheParts &cache() const { return cache_; }
  const PagePool &pool(int32_t owner = 0) const { return cache_.pool(owner); }
  int32_t num_leases() const;
  const SchedulerCounters &counters() const { return counters_; }

  void check() const;  ///< asserts every invariant that can be seen between steps; O(pages), for tests

 private:
  using Running = Batch::Running;

  template <class Wanted, class Why>
  void end_waiting(const Wanted &wanted, const Why &why);
  void time_out();
  bool make_room(int32_t owner, int32_t num_pages);
  bool end_soonest_leases();
  int32_t fitting(int32_t most, int64_t position) const;
  int32_t prompt_chunk(int32_t most, int64_t position);
  int32_t to_checkpoint(int32_t chunk, int64_t position) const;
  bool grow_decodes();
  bool grow_prefill(int32_t &left);
  void draft(int32_t left);
  void remember(const Sequence &sequence);
  void admit(int32_t &left);
  const Sequence &next_waiting();
  bool admit_one(int32_t &left);
  Prefilling take_turn(Admit &&admit, int32_t missing);
  int32_t choose_owner(const Sequence &sequence, Prefix &prefix);
  void fetch(const Sequence &sequence, int32_t owner, Prefix &&prefix);
  Miss why_missed(const Sequence &sequence, int32_t owner, int32_t num_found);
  void end_copies(Batch &batch);
  void reserve_one(const Running &seq);
  int32_t make_row(int32_t owner);
  void move_row(int32_t from, int32_t to);
  void weigh_decodes();
  void fill_arrays();
  void advance(int32_t r, std::span<Outcome> outcomes, size_t &next_outcome);
  void append(int32_t r, std::span<Outcome> outcomes);
  void stop(Decoding &&decoding, ts_finish why);
  void finish(Finished &&finished);
  void preempt(int32_t r);
  int32_t youngest() const;
  void remove(int32_t r);
  void remove_ended();
  void set_slots(int32_t r, int32_t first_token);
  int32_t num_groups() const { return static_cast<int32_t>(options_.groups.size()); }
  Running &running(int32_t r) { return running_[static_cast<size_t>(r)]; }

  SchedulerOptions options_;
  CacheParts cache_;
  std::vector<Leases> leases_of_;  // each owner
  BatchArrays arrays_;
  FairQueue queue_;
  std::deque<Preempted> preempted_;  // in the order in which they were admitted
  std::vector<Running> running_;     // index: row of the page table; sorted by owner; empty while a batch is in flight
  std::vector<int32_t> num_running_of_;  // each owner
  std::vector<int32_t> reserved_of_;  // each owner: pages that those that run already may still want, one a group each
  std::vector<LogitRow> logit_rows_;
  Generations earlier_;
  std::vector<Finished> finished_;
  SchedulerCounters counters_;
  StepCost cost_;
  StepLoad load_;                  // of the step that is put together, or in flight
  int32_t num_decodes_ = 0;        // in it
  int32_t num_prompt_tokens_ = 0;  // in it
  uint64_t next_arrival_ = 0;
  int64_t now_ms_ = 0;
  int64_t next_deadline_ms_ = kNever;  // of those that live, or earlier
  bool in_flight_ = false;
  const bool checkpoints_;                  // there are recurrent groups, and what they leave can be found again
  std::optional<uint64_t> short_of_pages_;  // arrival of who did not fit, where nothing has changed that
  std::optional<Fetch> fetch_;              // of the step that is put together

  /// What has come back for who is to be admitted next.
  struct Fetched {
    std::optional<uint64_t> arrival;
    int32_t num_tokens = 0;
    int32_t broken = -1;  // the page of the text that did not
  };
  Fetched fetched_;
};

}  // namespace ts
