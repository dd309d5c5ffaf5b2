#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "page.h"
#include "prefix_cache.h"
#include "request.h"

namespace ts {

/// The pages of one running sequence, in order: sealed ones, then those still written. `row` is always the sequence's
/// row of the page table, which is kept in step with the pages, an entry at a time.
class Context {
 public:
  explicit Context(int32_t num_pages_max) { sealed_.reserve(static_cast<size_t>(num_pages_max)); }
  Context(Context &&) noexcept = default;
  Context &operator=(Context &&other) noexcept;
  Context(const Context &) = delete;
  Context &operator=(const Context &) = delete;
  ~Context() { release(); }

  int32_t num_pages() const { return static_cast<int32_t>(sealed_.size() + open_.size()); }
  int32_t num_sealed() const { return static_cast<int32_t>(sealed_.size()); }

  /// Appends pages that the cache has found. What was being written behind the sealed pages is dropped.
  void adopt(std::vector<SharedPage> &&pages, std::span<int32_t> row);

  /// Makes room for `num_tokens` tokens. Demands that the pool has as many pages as are missing.
  void reserve(PrefixCache &cache, int32_t num_tokens, std::span<int32_t> row);

  /// Seals every page that the first `num_computed` tokens fill.
  void seal(PrefixCache &cache, const Sequence &sequence, int32_t num_computed, std::span<int32_t> row);

  /// Gives up what is not sealed.
  void drop_open() { open_.clear(); }

  /// Nobody finds these pages from now on.
  void forget(PrefixCache &cache) const;

  /// The page that the token at `position` is written to: it must not be sealed yet.
  const WritablePage &open_page(int32_t position, int32_t page_size) const;

 private:
  void release();  // the deepest page first, so that it is evicted before what it depends on

  std::vector<SharedPage> sealed_;
  std::vector<WritablePage> open_;
};

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

  /// Goes on behind pages that others have sealed in the meantime, instead of computing them.
  void adopt(PrefixCache &cache, std::span<int32_t> row);

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
  Miss miss() const { return miss_; }
  const std::string &message() const { return message_; }  ///< with TS_FINISH_ERROR and TS_FINISH_TIMEOUT

 private:
  friend class Transition;
  Finished(const Sequence &sequence, ts_finish finish, std::string message)
      : id_(sequence.id),
        finish_(finish),
        num_cached_(sequence.num_cached),
        miss_(sequence.miss),
        message_(std::move(message)) {}

  uint64_t id_;
  ts_finish finish_;
  int32_t num_cached_;
  Miss miss_;
  std::string message_;
};

/// What a session's last request leaves for its next one: its full pages, which nobody evicts for as long as this lives.
class Leased {
 public:
  uint64_t session() const { return session_; }
  int64_t until_ms() const { return until_ms_; }
  int32_t num_pages() const { return context_.num_sealed(); }

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

/// The pages of `sequence` from page `first` on that the cache can find, without a gap; never all of its tokens,
/// because the last one's logits must be computed.
std::vector<SharedPage> match_prefix(PrefixCache &cache, const Sequence &sequence, int32_t first);

/// Why no more than the first `num_found` pages of `sequence` were found.
Miss explain_miss(const PrefixCache &cache, const Sequence &sequence, int32_t num_found);

}  // namespace ts
