#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "cache_groups.h"
#include "engine_core.h"
#include "sampler.h"

/// A tiny deterministic model over a real paged cache, of any cache groups.
namespace toy {

constexpr uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t x = (a ^ (b + 0x9E3779B97F4A7C15 + (a << 6) + (a >> 2))) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 31)) * 0x94D049BB133111EB;
  return x ^ (x >> 29);
}

/// What a token leaves in the cache depends on the token, its position, and everything before it.
inline uint64_t value_of(int32_t token, int32_t position, uint64_t sum_before) {
  return mix(mix(static_cast<uint64_t>(token), static_cast<uint64_t>(position)), sum_before);
}

/// Writing this token makes the logits of its whole context NaN.
constexpr int32_t kPoison = 3;
constexpr uint64_t kPoisonValue = 0xDEAD;

inline void logits_of(uint64_t value, bool poisoned, std::span<float> logits) {
  for (size_t i = 0; i < logits.size(); ++i) {
    logits[i] = static_cast<float>(mix(value, i) % 10007) / 1250.0F - 4.0F;
  }
  logits[kPoison] = -40;  // never an output
  if (poisoned) logits[logits.size() / 2] = std::numeric_limits<float>::quiet_NaN();
}

/// The toy's layers, one a cache group, along one text. Of the tokens that it sees, a full or a window group adds up the values; a
/// recurrent one mixes them, one after the other. A token's value depends on what all groups give, so one wrong value spoils all
/// that follow, as a layer's does; so does the poison.
class Layers {
 public:
  explicit Layers(std::span<const ts::CacheGroup> groups) : groups_(groups), sums_(groups.size()) {}

  uint64_t state(size_t group) const { return sums_[group]; }
  void set_state(size_t group, uint64_t state) { sums_[group] = state; }
  bool poisoned() const { return poisoned_; }  ///< the last token

  /// What a full group has of the tokens before those that follow.
  void add(size_t group, uint64_t value) {
    sums_[group] += value;
    seen_ = seen_ || is_poison(group, value);
  }

  /// The next token: read(group, position) gives a value of a paged group, write(group, value) takes the token's. What all groups
  /// give of it.
  template <class Read, class Write>
  uint64_t step(int32_t token, int32_t position, const Read &read, const Write &write) {
    uint64_t before = 0;
    bool poisoned = token == kPoison || seen_;
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (groups_[g].kind == ts::CacheGroup::Kind::window) {
        sums_[g] = 0;
        for (int32_t p = std::max(0, position - groups_[g].window + 1); p < position; ++p) {
          const uint64_t value = read(g, p);
          sums_[g] += value;
          poisoned = poisoned || is_poison(g, value);
        }
      }
      poisoned = poisoned || (groups_[g].recurrent() && sums_[g] == kPoisonValue);
      before += sums_[g];
    }
    const uint64_t value = poisoned ? kPoisonValue : value_of(token, position, before);
    uint64_t out = 0;
    poisoned_ = poisoned;
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (groups_[g].recurrent()) {
        sums_[g] = poisoned ? kPoisonValue : mix(sums_[g], value);
      } else {
        sums_[g] += value + g;
        seen_ = seen_ || (poisoned && groups_[g].kind == ts::CacheGroup::Kind::full);
        write(g, value + g);
      }
      out += sums_[g];
    }
    return out;
  }

 private:
  static bool is_poison(size_t group, uint64_t value) { return value == kPoisonValue + group; }

  std::span<const ts::CacheGroup> groups_;
  std::vector<uint64_t> sums_;  // a recurrent group's state
  bool poisoned_ = false;
  bool seen_ = false;  // poison, by a full group
};

class Model {
 public:
  explicit Model(const ts::EngineOptions &options)
      : groups_(options.scheduler.groups),
        vocab_size_(options.vocab_size),
        page_size_(options.scheduler.page_size),
        pages_each_(options.scheduler.num_pages),
        slots_each_(options.scheduler.tier.num_slots),
        cache_(static_cast<size_t>(options.scheduler.num_owners * pages_each_ * page_size_)),
        tier_(static_cast<size_t>(options.scheduler.num_owners * slots_each_ * page_size_)),
        writer_(static_cast<size_t>(options.scheduler.num_owners * pages_each_)),
        reader_(writer_.size()) {}

  /// Makes one copy to or from the second tier; one that `fails` leaves nothing of use behind.
  void copy(ts::PageCopy &copy, bool fails) {
    using To = ts::PageCopy::To;
    ASSERT_EQ(copy.state, ts::PageCopy::State::ordered) << "a copy is ordered once";
    ASSERT_EQ(copy.page / pages_each_, copy.slot / slots_each_) << "a page and its slot have one owner";
    const auto page = cache_.begin() + static_cast<ptrdiff_t>(copy.page) * page_size_;
    const auto slot = tier_.begin() + static_cast<ptrdiff_t>(copy.slot) * page_size_;
    copy.to == To::slot ? std::copy_n(page, page_size_, slot) : std::copy_n(slot, page_size_, page);
    if (fails) std::fill_n(copy.to == To::slot ? slot : page, page_size_, kLost);
    copy.state = fails ? ts::PageCopy::State::failed : ts::PageCopy::State::done;
  }

  /// The cache has, of what the sequence in a row of the batch reads, what computing it again would give.
  void expect_content(const ts_batch &b, int32_t s, std::span<const int32_t> tokens) const {
    const int32_t begin = b.positions[b.query_start[s]];
    Layers layers(groups_);
    std::vector<std::vector<uint64_t>> values(groups_.size());  // [group][position]
    for (int32_t p = 0; p < begin; ++p) {
      layers.step(
          tokens[static_cast<size_t>(p)], p, [&](size_t g, int32_t at) { return values[g][static_cast<size_t>(at)]; },
          [&](size_t g, uint64_t value) { values[g].push_back(value); });
    }
    for (size_t g = 0; g < groups_.size() && begin > 0; ++g) {
      const int32_t *pages = row(b, s, g);
      if (groups_[g].recurrent()) {
        ASSERT_EQ(cache_.at(static_cast<size_t>(pages[1] * page_size_)), layers.state(g)) << "another state came back";
        continue;
      }
      for (int32_t p = groups_[g].first_page(begin, page_size_) * page_size_; p < begin; ++p) {
        const auto slot = static_cast<size_t>(pages[p / page_size_] * page_size_ + p % page_size_);
        ASSERT_EQ(cache_.at(slot), values[g][static_cast<size_t>(p)])
            << "page " << p / page_size_ << " of group " << g << " came back as something else";
      }
    }
  }

  ts::Logits run(const ts_batch &b) {
    check(b);
    logits_.resize(static_cast<size_t>(b.num_logits * vocab_size_));
    int32_t next_logit = 0;
    for (int32_t s = 0; s < b.num_seqs; ++s) {
      const auto slot_of = [&](size_t g, int32_t p) {
        return static_cast<size_t>(row(b, s, g)[p / page_size_] * page_size_ + p % page_size_);
      };
      const auto state_at = [&](size_t g, int32_t entry) -> uint64_t & {
        return cache_.at(static_cast<size_t>(row(b, s, g)[entry] * page_size_));
      };
      Layers layers(groups_);
      const int32_t begin = b.positions[b.query_start[s]];
      for (size_t g = 0; g < groups_.size(); ++g) {
        if (groups_[g].recurrent() && begin > 0) layers.set_state(g, state_at(g, 1));
        if (groups_[g].kind != ts::CacheGroup::Kind::full) continue;
        for (int32_t p = 0; p < begin; ++p) layers.add(g, cache_.at(slot_of(g, p)));
      }
      for (int32_t t = b.query_start[s]; t < b.query_start[s + 1]; ++t) {
        const int32_t p = b.positions[t];
        const auto read = [&](size_t g, int32_t at) { return cache_.at(slot_of(g, at)); };
        const auto write = [&](size_t g, uint64_t value) {
          const auto slot = static_cast<size_t>(b.slots[static_cast<ptrdiff_t>(g) * b.num_tokens + t]);
          EXPECT_EQ(slot_of(g, p), slot) << "the page table leads to where the token is written";
          cache_.at(slot) = value;
        };
        const uint64_t out = layers.step(b.token_ids[t], p, read, write);
        if (next_logit == b.num_logits || b.logit_rows[next_logit] != t) continue;
        logits_of(out, layers.poisoned(),
                  std::span(logits_).subspan(static_cast<size_t>(next_logit++ * vocab_size_),
                                             static_cast<size_t>(vocab_size_)));
      }
      for (size_t g = 0; g < groups_.size(); ++g) {
        if (groups_[g].recurrent()) state_at(g, 0) = layers.state(g);
      }
    }
    EXPECT_EQ(next_logit, b.num_logits) << "every row of logits is the last token of a sequence or in its middle";
    return {logits_.data(), vocab_size_};
  }

 private:
  const int32_t *row(const ts_batch &b, int32_t s, size_t group) const {
    const auto each = b.page_table_stride / static_cast<int32_t>(groups_.size());
    return b.page_table + static_cast<ptrdiff_t>(s) * b.page_table_stride + static_cast<ptrdiff_t>(group) * each;
  }

  /// What launch_abi.h and cache_groups.h promise to kernels, and that no two write one page, and none reads what another writes:
  /// no two sequences, nor two groups.
  void check(const ts_batch &b) {
    ASSERT_GE(b.num_seqs, 1);
    ASSERT_EQ(b.query_start[0], 0);
    ASSERT_EQ(b.query_start[b.num_seqs], b.num_tokens);
    std::fill(writer_.begin(), writer_.end(), -1);
    std::fill(reader_.begin(), reader_.end(), -1);
    for (int32_t s = 0; s < b.num_seqs; ++s) {
      const int32_t begin = b.query_start[s];
      const int32_t end = b.query_start[s + 1];
      ASSERT_LT(begin, end) << "a sequence without tokens";
      for (int32_t t = begin; t < end; ++t) {
        ASSERT_EQ(b.positions[t], b.context_len[s] - (end - t));
        ASSERT_TRUE(b.token_ids[t] >= 0 && b.token_ids[t] < vocab_size_);
        for (size_t g = 0; g < groups_.size(); ++g) {
          const int32_t page = b.slots[static_cast<ptrdiff_t>(g) * b.num_tokens + t] / page_size_;
          int32_t &writer = writer_.at(static_cast<size_t>(page));
          ASSERT_TRUE(writer == -1 || writer == who(s, g)) << "two write a page";
          writer = who(s, g);
          if (!groups_[g].recurrent()) continue;
          ASSERT_EQ(page, row(b, s, g)[0]) << "a state is written elsewhere than its page";
        }
      }
    }
    int32_t last_owner = 0;
    for (int32_t s = 0; s < b.num_seqs; ++s) {
      const int32_t owner = b.slots[b.query_start[s]] / page_size_ / pages_each_;
      ASSERT_GE(owner, last_owner) << "sequences are not sorted by owner";
      last_owner = owner;
      for (size_t g = 0; g < groups_.size(); ++g) check_reads(b, s, g, owner);
    }
  }

  void check_reads(const ts_batch &b, int32_t s, size_t g, int32_t owner) {
    const int32_t *pages = row(b, s, g);
    const int32_t position = b.positions[b.query_start[s]];
    int32_t first = 1, end = position > 0 ? 2 : 1;  // a state's
    if (!groups_[g].recurrent()) {
      first = groups_[g].first_page(position, page_size_);
      end = ts::num_pages_for(b.context_len[s], page_size_);
      const int32_t full = position / page_size_ * page_size_;
      for (int32_t i = 0; i < groups_[g].first_page(full, page_size_); ++i) {
        ASSERT_EQ(pages[i], ts::CacheGroup::kNoPage) << "a page is kept too long";
      }
    }
    for (int32_t i = first; i < end; ++i) {
      ASSERT_GE(pages[i], 0) << "a page that is read was given back";
      const auto page = static_cast<size_t>(pages[i]);
      ASSERT_EQ(pages[i] / pages_each_, owner) << "a page is not its sequence's owner's";
      ASSERT_TRUE(reader_.at(page) / kMostGroups != s || reader_[page] < 0) << "a page is twice in a context";
      reader_[page] = who(s, g);
      ASSERT_TRUE(writer_[page] == -1 || writer_[page] == who(s, g)) << "a page is read while another writes it";
    }
  }

  static constexpr uint64_t kLost = 0xBAD;
  static constexpr int32_t kMostGroups = 16;
  static int32_t who(int32_t sequence, size_t group) { return sequence * kMostGroups + static_cast<int32_t>(group); }

  std::vector<ts::CacheGroup> groups_;
  int32_t vocab_size_;
  int32_t page_size_;
  int32_t pages_each_;           // of each owner
  int32_t slots_each_;           // likewise
  std::vector<uint64_t> cache_;  // [num_pages * page_size], of all owners and groups; a state is the first of its page
  std::vector<uint64_t> tier_;   // [num_slots * page_size]
  std::vector<int32_t> writer_;  // [num_pages] who of this step, or -1
  std::vector<int32_t> reader_;  // [num_pages]
  std::vector<float> logits_;
};

}  // namespace toy
