#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "batch.h"
#include "check.h"
#include "events.h"
#include "fetch.h"
#include "states.h"
#include "step_cost.h"

namespace ts {

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
///
/// While it is in flight one more may be scheduled (Scheduler::schedule_ahead), which takes over the sequences that go on: the
/// youngest batch has them. Where their next token is still to be sampled it has a placeholder, which fill() replaces. What
/// ends when the older batch is committed runs for nothing in the younger one, to which its pages belong until it is
/// committed too.
class Batch {
 public:
  Batch(Batch &&) noexcept = default;
  Batch &operator=(Batch &&) = delete;
  Batch(const Batch &) = delete;
  Batch &operator=(const Batch &) = delete;
  ~Batch();

  const ts_batch &arrays() const { return arrays_->view(); }
  int32_t num_logits() const { return arrays().num_logits; }

  bool has(int32_t row) const;  ///< whether its sequence has not ended since it was scheduled

  /// Whether anybody waits for the `logit`-th row of logits.
  bool wants(int32_t logit) const { return has(logit_row(logit).running); }

  /// The sequence of which the `logit`-th row of logits decides a token: its next, or one further `ahead`. Demands wants().
  const Sequence &sequence(int32_t logit) const { return running(logit_row(logit).running); }
  const Sequence &running(int32_t row) const;  ///< demands has()
  bool decodes(int32_t row) const { return running_[static_cast<size_t>(row)].decodes(); }
  int32_t ahead(int32_t logit) const { return logit_row(logit).ahead; }

  /// Whether the row behind this one counts if this one gives `token`: it was drafted, and does not end the sequence.
  bool goes_on(int32_t logit, int32_t token) const;

  /// To be made in this order before the step is run, which reads and overwrites these pages; what makes one sets its state. A step
  /// may consist of nothing else: then it has no tokens, and is not run.
  std::span<PageCopy> copies() { return copies_; }
  std::span<const PageCopy> copies() const { return copies_; }

  /// Puts the tokens that the older batch has given in place of the placeholders. Once, before the step is run.
  void fill(const Batch &older, std::span<const Outcome> outcomes);

 private:
  friend class Scheduler;

  /// Why a sequence ends as soon as the batch in flight is committed.
  enum class Leaving : uint8_t { no, cancelled, timed_out };

  struct Running {
    std::variant<Prefilling, Decoding> state;
    int32_t num_tokens = 0;  // of this step, the draft's among them; 0: ended, to be removed
    Draft draft = {};
    uint64_t admission = 0;  // no two are equal
    int32_t num_ahead = 0;   // tokens that the older batch in flight computes
    bool awaits = false;     // and it gives a token, which this step computes
    Leaving leaving = Leaving::no;
    int32_t row_before = -1;  // in the older batch

    const Sequence &sequence() const;
    const Context &context() const;
    Context &context();
    int32_t num_computed() const;
    int32_t begin() const { return num_computed() + num_ahead; }                      // position of its first token
    int32_t num_known() const { return sequence().num_tokens() + (awaits ? 1 : 0); }  // the placeholder among them
    bool decodes() const { return awaits || std::holds_alternative<Decoding>(state); }
    bool wants_logits() const { return num_computed() + num_tokens >= sequence().num_tokens(); }
    bool wants_pages(int32_t page_size) const;  // of each group one, before its last token
    bool goes_on(int32_t ahead, int32_t token) const;
  };

  /// A sequence that the younger batch has, as it was in this one.
  struct Passed {
    const Sequence *sequence = nullptr;  // nullptr: it is here still, or has ended
    int32_t row = -1;                    // in the younger batch
  };

  Batch(std::vector<Running> &&running, BatchArrays &arrays, std::span<const LogitRow> logit_rows, const StepLoad &load,
        std::vector<PageCopy> &&copies, std::optional<Fetch> &&fetch)
      : running_(std::move(running)),
        arrays_(&arrays),
        logit_rows_(logit_rows),
        load_(load),
        copies_(std::move(copies)),
        fetch_(std::move(fetch)) {}

  const LogitRow &logit_row(int32_t logit) const {
    TS_ASSERT(logit >= 0 && logit < num_logits(), "the step has no such row of logits");
    return logit_rows_[static_cast<size_t>(logit)];
  }

  std::vector<Running> running_;  // [num_seqs]: a sequence's index is its row of the page table
  std::vector<Passed> passed_;    // [num_seqs], or empty: there is no younger batch
  BatchArrays *arrays_;
  std::span<const LogitRow> logit_rows_;  // [num_logits] a sequence's in order
  StepLoad load_;
  std::vector<PageCopy> copies_;
  std::optional<Fetch> fetch_;  // what the copies bring back
  // What is nobody's any more, but read or written by this step.
  std::vector<Draining> draining_;
  std::vector<WritablePage> duplicates_;
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

inline const Sequence &Batch::running(int32_t row) const {
  const auto index = static_cast<size_t>(row);
  if (!passed_.empty() && passed_[index].sequence != nullptr) return *passed_[index].sequence;
  return running_[index].sequence();
}

inline bool Batch::has(int32_t row) const {
  const auto index = static_cast<size_t>(row);
  return (!passed_.empty() && passed_[index].sequence != nullptr) || running_[index].num_tokens > 0;
}

inline bool Batch::goes_on(int32_t logit, int32_t token) const {
  const auto [index, ahead] = logit_row(logit);
  const Running &seq = running_[static_cast<size_t>(index)];
  return seq.draft.size > 0 && seq.goes_on(ahead, token);  // who drafts is not passed on
}

}  // namespace ts
