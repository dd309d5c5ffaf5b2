#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "batch.h"
#include "batch_copy.h"
#include "cache_parts.h"
#include "events.h"
#include "fair_queue.h"
#include "fetch.h"
#include "leases.h"
#include "scheduled_batch.h"
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
  bool drafts_at_any_cost = false;    ///< as if tokens beside the first took no time
  Generations::Options earlier = {};  ///< what is kept of earlier requests for drafts, if there are drafts
  bool ahead = false;                 ///< a step may be scheduled while the one before it runs
  std::span<int32_t> batch_memory =
      {};  ///< where the batch arrays lie: see BatchArrays; with `ahead` those of two batches
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

/// Decides what each step computes: continuous batching under a token budget, decodes first, then prefills in chunks,
/// in the order of FairQueue; the prefix cache; preemption of the youngest (which was admitted last) when pages run out.
///
/// A session's last request may leave a lease: its full pages stay until its next one is admitted, or their time has come, or
/// they are the only way for another request to run.
///
/// A pure function of its state and of the calls it gets: no clock, no thread, no device. Between schedule() and
/// commit() the running sequences are the batch's. A step costs O(sequences in the batch + pages they cross).
///
/// With `ahead` a second batch may be scheduled behind the one in flight, as if that gave every sequence its tokens and ended none but
/// those that have all they asked for. Where more than that must be known first (Scheduler::may_go_ahead) the next step is scheduled
/// after the commit, as without.
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

  /// Ends a request in any state; unknown ids are ignored. O(live requests). One that is in the batch in flight, which must then be
  /// told, ends when that is committed. Not while two are in flight.
  void cancel(uint64_t id, Batch *in_flight = nullptr);
  void cancel_all(Batch *in_flight = nullptr);

  /// The time of what follows, from any origin. It may jump; backwards it has no effect. Ends what is past its deadline, as cancel
  /// does.
  void set_time(int64_t now_ms, Batch *in_flight = nullptr);

  /// Gives up what sessions have left for their next turns.
  void end_leases();

  /// The next step, or nothing if there is nothing to do. No batch is in flight.
  std::optional<Batch> schedule();

  /// The step behind the only one in flight, which hands on the sequences that go on. Nothing if none does, or more must be known
  /// first: then `older` is as it was, and leases at most have ended.
  std::optional<Batch> schedule_ahead(Batch &older);

  /// The step's copies have been made, and it has run: outcomes[i] is what sampling made of the i-th row of logits; of one that nobody
  /// wants it is not looked at. It took so long; 0: nobody knows. `younger`: the batch behind it, if there is one.
  void commit(Batch &&batch, std::span<Outcome> outcomes, int64_t took_ns = 0, Batch *younger = nullptr);

  /// The step could not be run: every sequence in it ends with this message, and nothing of them is found again.
  void fail(Batch &&batch, const std::string &message);

  /// Nor will the one behind it be, where who was not in `batch` stays as it was.
  void fail(Batch &&batch, Batch &&younger, const std::string &message);

  /// Requests that have ended since the last call, in `into`, whose memory is reused.
  void take_finished(std::vector<Finished> &into);

  int32_t num_waiting() const { return queue_.size() + static_cast<int32_t>(preempted_.size()); }
  int32_t num_running() const { return static_cast<int32_t>(running_.size()); }  ///< between steps
  bool idle() const { return num_waiting() == 0 && running_.empty(); }
  const CacheParts &cache() const { return cache_; }
  const PagePool &pool(int32_t owner = 0) const { return cache_.pool(owner); }
  int32_t num_leases() const;
  const SchedulerCounters &counters() const { return counters_; }

  /// Asserts every invariant that can be seen between steps, or with one batch in flight; O(pages), for tests.
  void check(const Batch *in_flight = nullptr) const;

 private:
  using Running = Batch::Running;
  using Leaving = Batch::Leaving;

  template <class Wanted, class Why>
  void end_waiting(const Wanted &wanted, const Why &why);
  void time_out(Batch *in_flight);
  static TimeOut time_out_of(const Sequence &sequence);
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
  void give_up_copies(Batch &batch);
  void reserve_one(const Running &seq);
  int32_t make_row(int32_t owner);
  void move_row(int32_t from, int32_t to);
  void weigh_decodes();
  Batch make_batch();
  void fill_arrays(BatchArrays &arrays, std::vector<LogitRow> &logit_rows);
  void begin_commit(const Batch &batch, std::span<const Outcome> outcomes, int64_t took_ns, const Batch *younger);
  void compute(Running &seq, std::span<int32_t> row, int32_t num_tokens, Batch *younger);
  void append(Running &seq, std::span<int32_t> row, std::span<Outcome> outcomes, Batch *younger);
  void stop(Decoding &&decoding, ts_finish why, Batch *younger);
  void finish(Finished &&finished);
  void finish(Drained &&drained, Batch &younger);
  void preempt(int32_t r);
  int32_t youngest() const;
  void remove(int32_t r);
  void remove_ended();
  void set_slots(BatchArrays &arrays, int32_t r, int32_t first_token);

  // With two batches in flight: scheduler_ahead.cpp.
  void make_batch_copies();
  static bool goes_on(const Running &seq);
  bool may_go_ahead(const Batch &older);
  bool may_go_ahead(const Running &prefill, int32_t num_available);
  void take_over(Batch &older);
  void grow_taken_over();
  void commit_behind(Batch &batch, std::span<Outcome> outcomes, Batch &younger);
  void leave(Running &seq);
  void land(Batch &batch);
  void recycle(Batch &batch);
  void check_in_flight(const Batch &batch) const;
  int32_t num_groups() const { return static_cast<int32_t>(options_.groups.size()); }
  int32_t num_in_flight() const { return (in_flight_[0] != nullptr ? 1 : 0) + (in_flight_[1] != nullptr ? 1 : 0); }
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
  std::array<std::unique_ptr<BatchCopy>, 2> batch_copies_;  // with `ahead`: of batches in flight, in turn
  size_t next_copy_ = 0;
  std::array<const BatchArrays *, 2> in_flight_{};  // the batches in flight, the older first
  uint64_t num_admissions_ = 0;
  // Memory of batches that were committed.
  std::vector<Running> spare_running_;
  std::vector<Batch::Passed> spare_passed_;
  std::vector<int32_t> spare_row_;   // [num_groups, max_pages] of who has no row of the page table any more
  std::vector<int32_t> missing_of_;  // each owner: pages that the step ahead takes for decodes
  Generations earlier_;
  std::vector<Finished> finished_;
  SchedulerCounters counters_;
  StepCost cost_;
  StepLoad load_;                  // of the step that is put together
  int32_t num_decodes_ = 0;        // in it
  int32_t num_prompt_tokens_ = 0;  // in it
  uint64_t next_arrival_ = 0;
  int64_t now_ms_ = 0;
  int64_t next_deadline_ms_ = kNever;       // of those that live, or earlier
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
