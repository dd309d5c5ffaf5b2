#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "engine.h"
#include "request.h"
#include "scheduler.h"
#include "sha256.h"
#include "trace.h"

namespace ts {

// What enters the control plane, and what comes of it: everything that a run can be repeated from, as the scheduler is a pure function
// of its calls and a token depends on its request alone.

struct Cancelled {
  uint64_t id;
};
struct Submitted {
  std::unique_ptr<Sequence> sequence;
  int64_t at_ms;
  Words record = {};  ///< of a run that is recorded: record_of(request, at_ms)
};
using Message = std::variant<Submitted, Cancelled>;

/// What the step thread takes in before it schedules.
struct Turn {
  int64_t now_ms = 0;
  bool closing = false;
  std::string failure;  ///< why nothing can be computed any more
  std::vector<Message> messages;
};

/// A request as a trace has it: all of it, but of its salt a hash, so that the same salts are the same again and none can be read.
Words record_of(const ts_request &request, int64_t at_ms);

/// Whose run a trace is of.
struct TraceHeader {
  Digest plan{};  ///< its seal
  std::string target;
  ts_engine_options options{};  ///< those that decide the schedule; the rest is not kept

  void put_into(ts_engine_options &to) const;  ///< the options that are kept
};

Words record_of(const TraceHeader &header);

/// The first record. Throws Error (TS_BAD_REQUEST) if it is of another format or plan.
TraceHeader read_header(TraceReader &reader, const Digest &plan);

/// What a step's batch is, as far as the trace keeps it: counts, and checksums of 64 bits.
using BatchRecord = std::array<int32_t, 14>;
BatchRecord record_of(uint64_t step, const Batch &batch, int32_t page_size, int32_t num_groups);

/// Writes a run down. The step thread alone calls it.
///
/// What a step begins with is in the file before it begins: a step that ends the process is in its trace. A step costs O(entries of its
/// page table), and one call of the system.
class Recorder {
 public:
  Recorder(const std::string &path, const TraceHeader &header);

  void taken(Turn &turn);
  void batch(uint64_t step, const Batch &batch, int32_t page_size, int32_t num_groups);
  void result(int64_t took_ns, std::span<const Outcome> outcomes, std::span<const PageCopy> copies);
  void failed(const std::string &message);     ///< the step
  void restarted(const std::string &message);  ///< the scheduler was given up
  void flush() { writer_.flush(); }            ///< where no step follows at once
  const std::string &failure() const { return writer_.failure(); }

 private:
  TraceWriter writer_;
  Words words_;
};

/// Gives a run's turns again, and compares what comes of them. The step thread alone calls it.
class Replay {
 public:
  /// `reader` has read the header.
  explicit Replay(std::unique_ptr<TraceReader> reader) : reader_(std::move(reader)) { more_ = reader_->next(); }

  /// The next turn; once there is none, one that closes. Throws Error (TS_BAD_REQUEST) where the trace is damaged.
  void take(Turn &turn, const RequestLimits &limits);

  /// How the trace's step differs from this one; empty if it does not.
  std::string compare(uint64_t step, const Batch &batch, int32_t page_size, int32_t num_groups) const;
  std::string compare(const Batch &batch, std::span<const Outcome> outcomes);

  /// The step's copies have been made: those that failed in the trace have failed. How it differs: one that has failed now has not then.
  std::string repeat(std::span<PageCopy> copies) const;

  int64_t took_ns() const { return took_ns_; }                                ///< the turn's step
  const std::optional<std::string> &step_failure() const { return failed_; }  ///< why it could not be run
  const std::optional<std::string> &restart() const { return restart_; }      ///< why the turn gave the scheduler up
  bool not_sampled(int32_t logit) const {                                     ///< the machine failed
    return has_result_ && static_cast<size_t>(logit) < tokens_.size() &&
           tokens_[static_cast<size_t>(logit)] == Outcome::kNotSampled;
  }
  bool ran() const { return has_result_; }  ///< how far it came before that
  bool scheduled() const { return batch_.has_value(); }

  // Sums so far.
  uint64_t num_requests() const { return num_requests_; }
  uint64_t num_output_tokens() const { return num_output_tokens_; }
  uint64_t num_bytes_cut_off() const { return reader_->num_bytes_cut_off(); }

 private:
  void take_outcome();

  std::unique_ptr<TraceReader> reader_;
  bool more_ = false;  // the reader has a record that was not taken
  uint64_t step_ = 0;
  std::optional<BatchRecord> batch_;
  bool has_result_ = false;
  int64_t took_ns_ = 0;
  std::vector<int32_t> tokens_;
  std::vector<int32_t> failed_copies_;  // their places among the step's, ascending
  std::optional<std::string> failed_, restart_;
  int64_t now_ms_ = 0;
  uint64_t num_requests_ = 0, num_output_tokens_ = 0;
};

}  // namespace ts
