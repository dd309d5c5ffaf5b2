#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "context.h"
#include "prefix_cache.h"
#include "request.h"

namespace ts {

/// Waits to be admitted for the first time.
class Queued {
 public:
  explicit Queued(std::unique_ptr<Sequence> sequence) : sequence_(std::move(sequence)) {}
  const Sequence &sequence() const { return *sequence_; }

 private:
  friend class Transition;
  std::unique_ptr<Sequence> sequence_;
};

/// Some of its tokens are not in the KV cache yet; the last one's logits are still to come.
class Prefilling {
 public:
  const Sequence &sequence() const { return *sequence_; }
  const Context &context() const { return context_; }
  Context &context() { return context_; }
  int32_t num_computed() const { return num_computed_; }
  int32_t num_remaining() const { return sequence_->num_tokens() - num_computed_; }

  /// Goes on behind pages that others have sealed in the meantime, instead of computing them. Where several groups must agree,
  /// at most `most` pages are looked at.
  void adopt(PrefixCache &cache, int32_t most, std::span<int32_t> row);

 private:
  friend class Transition;
  Prefilling(std::unique_ptr<Sequence> sequence, Context context, int32_t num_computed)
      : sequence_(std::move(sequence)), context_(std::move(context)), num_computed_(num_computed) {}

  std::unique_ptr<Sequence> sequence_;
  Context context_;
  int32_t num_computed_;  // tokens in the KV cache
};

/// All of its tokens but the last are in the KV cache.
class Decoding {
 public:
  const Sequence &sequence() const { return *sequence_; }
  const Context &context() const { return context_; }
  Context &context() { return context_; }
  int32_t num_computed() const { return sequence_->num_tokens() - 1; }

 private:
  friend class Transition;
  Decoding(std::unique_ptr<Sequence> sequence, Context context)
      : sequence_(std::move(sequence)), context_(std::move(context)) {}

  std::unique_ptr<Sequence> sequence_;
  Context context_;
};

/// Lost its pages to an older sequence, and waits to be admitted again. Its full pages can still be found, for as long
/// as they last.
class Preempted {
 public:
  const Sequence &sequence() const { return *sequence_; }

 private:
  friend class Transition;
  explicit Preempted(std::unique_ptr<Sequence> sequence) : sequence_(std::move(sequence)) {}
  std::unique_ptr<Sequence> sequence_;
};

/// Ended. What is left is what its last event says.
class Finished {
 public:
  uint64_t id() const { return id_; }
  ts_finish finish() const { return finish_; }
  int32_t num_cached() const { return num_cached_; }
  int32_t num_restored() const { return num_restored_; }
  Miss miss() const { return miss_; }
  const std::string &message() const { return message_; }  ///< with TS_FINISH_ERROR and TS_FINISH_TIMEOUT

 private:
  friend class Transition;
  Finished(const Sequence &sequence, ts_finish finish, std::string message)
      : id_(sequence.id),
        finish_(finish),
        num_cached_(sequence.num_cached),
        num_restored_(sequence.num_restored),
        miss_(sequence.miss),
        message_(std::move(message)) {}

  uint64_t id_;
  ts_finish finish_;
  int32_t num_cached_;
  int32_t num_restored_;
  Miss miss_;
  std::string message_;
};

/// The pages of a request that has ended while the youngest batch in flight has it still, which reads and writes them for nothing.
/// Nobody else has them until that batch is committed: dropping them before is a bug of the engine.
class Draining {
 public:
  Draining(Draining &&other) noexcept : context_(std::move(other.context_)), held_(std::exchange(other.held_, false)) {}
  Draining &operator=(Draining &&) = delete;
  Draining(const Draining &) = delete;
  Draining &operator=(const Draining &) = delete;
  ~Draining() {
    TS_ASSERT(!held_ || std::uncaught_exceptions() > 0, "pages were given back that a batch in flight reads");
  }

 private:
  friend class Transition;
  explicit Draining(Context context) : context_(std::move(context)) {}

  Context context_;
  bool held_ = true;
};

/// What a session's last request leaves for its next one: its sealed pages, which nobody evicts for as long as this lives.
class Leased {
 public:
  uint64_t session() const { return session_; }
  int64_t until_ms() const { return until_ms_; }
  int32_t num_pages() const { return context_.num_kept(); }

 private:
  friend class Transition;
  Leased(uint64_t session, int64_t until_ms, Context context)
      : session_(session), until_ms_(until_ms), context_(std::move(context)) {
    context_.drop_open();
  }

  uint64_t session_;
  int64_t until_ms_;
  Context context_;
};

}  // namespace ts
