#include "cache_groups.h"

#include <gtest/gtest.h>

#include <set>

#include "allocations.h"
#include "expect.h"
#include "scheduler.h"
#include "toy.h"

// Layers that see a window, and recurrent states, beside full attention: what they hold, give back, and find again.
namespace ts {
namespace {

using testing::expect_in;
using testing::refusal;
using toy::expect_solo;
using toy::Harness;
using toy::request;
using toy::Request;
using toy::small;
using Kind = CacheGroup::Kind;

EngineOptions with(std::vector<CacheGroup> groups) {
  EngineOptions o = small();
  o.scheduler.groups = std::move(groups);
  return o;
}

int32_t num_held(const Harness &h) { return h.scheduler.pool().num_pages() - h.scheduler.pool().num_available(); }

TEST(CacheGroups, KnowTheFirstPageThatIsRead) {
  const CacheGroup full, window{Kind::window, 8}, narrow{Kind::window, 1};
  EXPECT_EQ(full.first_page(1000, 4), 0);
  EXPECT_EQ(window.first_page(10, 4), 0) << "a token at 10 sees 3 to 10";
  EXPECT_EQ(window.first_page(11, 4), 1);
  EXPECT_EQ(window.first_page(12, 4), 1);
  EXPECT_EQ(narrow.first_page(12, 4), 3) << "itself alone";
}

/// Against counting: every chunk at every position.
TEST(CacheGroups, KnowTheMostPagesThatASequenceHolds) {
  for (const int32_t page_size : {1, 2, 4, 8}) {
    for (const int32_t window : {1, 2, 3, 7, 8, 9, 20}) {
      const CacheGroup group{Kind::window, window};
      for (const int32_t chunk : {1, 2, 5, 16}) {
        int32_t most = 0;
        for (int32_t begin = 0; begin < 100; ++begin) {
          for (int32_t end = begin + 1; end <= std::min(begin + chunk, 100); ++end) {
            const int32_t full = begin / page_size * page_size;
            most = std::max(most, num_pages_for(end, page_size) - group.first_page(full, page_size));
          }
        }
        EXPECT_EQ(group.most_pages(100, chunk, page_size), most) << window << " in pages of " << page_size;
      }
    }
  }
  EXPECT_EQ((CacheGroup{Kind::window, 1000}.most_pages(10, 512, 4)), 3) << "no more than there are";
}

TEST(CacheGroups, WhatFailsIsForgottenWhereItWasGivenBackToo) {
  EngineOptions o = with({{Kind::window, 12}, {}});
  o.scheduler.token_budget = 16;
  o.scheduler.num_pages = 60;
  o.scheduler.prefix_cache = true;
  Harness h(o);
  for (const uint64_t id : {1, 2}) {
    Request r = request(id, 60, 4, 7);
    r.prompt[10] = toy::kPoison;
    h.submit(r);
    h.run();
    EXPECT_EQ(h.results.at(id).finish, TS_FINISH_ERROR);
    EXPECT_LE(h.results.at(id).num_cached, 10);
  }
}

TEST(CacheGroups, AWindowsMemoryDoesNotGrowWithTheContext) {
  EngineOptions o = with({{Kind::window, 12}});
  o.scheduler.token_budget = 16;
  o.scheduler.num_pages = 8;  // of 4 tokens: 11 behind a full page, and 16 of a step from any place in the next
  const Request r = request(1, 90, 38);
  for (const bool prefix_cache : {false, true}) {
    o.scheduler.prefix_cache = prefix_cache;
    Harness h(o);
    h.submit(r);
    while (h.step()) {
      EXPECT_LE(num_held(h), h.last_num_tokens == 1 ? 4 : 8);
      if (h.last_num_tokens == 1 && prefix_cache && !h.scheduler.idle()) {
        EXPECT_GE(h.scheduler.pool().num_idle(), 4) << "what is given back can still be found";
      }
    }
    expect_solo(h, r, o);
  }
  o.scheduler.num_pages = 7;
  expect_in(refusal([&] { make_sequence(r.abi(), limits_of(o)); }, TS_BAD_REQUEST), {"need 8 KV pages of 4 tokens"});
}

TEST(CacheGroups, ManyContextsFitWhereFullAttentionPreempts) {
  for (const bool window : {false, true}) {
    EngineOptions o = with({window ? CacheGroup{Kind::window, 8} : CacheGroup{}});
    o.scheduler.num_pages = 40;
    Harness h(o);
    std::vector<Request> requests;
    for (uint64_t id = 1; id <= 8; ++id) requests.push_back(request(id, 4, 60));
    for (const Request &r : requests) h.submit(r);
    h.run();
    for (const Request &r : requests) expect_solo(h, r, o);
    EXPECT_EQ(h.scheduler.counters().num_preemptions == 0, window);
  }
}

TEST(CacheGroups, ATurnFindsTheLastOneInEveryGroup) {
  const EngineOptions o = with({{}, {Kind::window, 6}, {Kind::recurrent}});
  Harness h(o);
  const Request first = request(1, 21, 12);
  h.submit(first);
  h.run();
  Request second = first;
  second.id = 2;
  const std::vector<int32_t> &said = h.results.at(1).tokens;
  second.prompt.insert(second.prompt.end(), said.begin(), said.end());
  h.submit(second);
  h.run();
  EXPECT_EQ(h.results.at(2).num_cached, 32) << "21 + 12 tokens, of which the last was never an input";
  expect_solo(h, second, o);
}

TEST(CacheGroups, ALeaseKeepsAllThatTheNextTurnNeeds) {
  for (const int32_t num_outputs : {5, 6, 7, 8, 9}) {  // to each place of a page
    EngineOptions o = with({{}, {Kind::window, 6}, {Kind::recurrent}});
    o.scheduler.num_pages = 40;
    Harness h(o);
    Request turn = request(1, 21, num_outputs);
    turn.session = 1;
    turn.lease_ms = 1000;
    h.submit(turn);
    h.run();
    EXPECT_EQ(h.scheduler.num_leases(), 1);
    for (uint64_t id = 10; id < 20; ++id) h.submit(request(id, 50, 2));  // all other pages, over and over
    h.run();
    const std::vector<int32_t> said = h.results.at(1).tokens;
    turn.id = 2;
    turn.prompt.insert(turn.prompt.end(), said.begin(), said.end());
    h.submit(turn);
    h.run();
    EXPECT_EQ(h.results.at(2).num_cached, (21 + num_outputs - 1) / 4 * 4);
    expect_solo(h, turn, o);
  }
}

TEST(CacheGroups, ChunksEndWhereCheckpointsAreKept) {
  for (const bool prefix_cache : {true, false}) {
    EngineOptions o = with({{}, {Kind::recurrent}});
    o.scheduler.prefix_cache = prefix_cache;
    Harness h(o);
    const Request a = request(1, 30, 3, 7), b = request(2, 30, 3, 7);
    h.submit(a);
    h.step();
    EXPECT_EQ(h.last_num_tokens, prefix_cache ? 28 : 30);
    h.run();
    h.submit(b);
    h.run();
    EXPECT_EQ(h.results.at(2).num_cached, prefix_cache ? 28 : 0);
    expect_solo(h, a, o);
    expect_solo(h, b, o);
  }
}

TEST(CacheGroups, AStateIsCopiedOnWriteAndHeldTwiceAtMost) {
  const EngineOptions o = with({{Kind::recurrent}});
  Harness h(o);
  int32_t copies = 0;
  h.on_batch = [&](const Batch &batch) {
    const ts_batch &b = batch.arrays();
    for (int32_t s = 0; s < b.num_seqs; ++s) {
      const int32_t *row = b.page_table + static_cast<ptrdiff_t>(s) * b.page_table_stride;
      copies += row[0] != row[1] ? 1 : 0;
    }
  };
  h.submit(request(1, 9, 40));
  while (h.step()) EXPECT_LE(num_held(h), 2);
  EXPECT_EQ(copies, 10) << "behind checkpoints after 8, 12, ... 44 of 48 inputs";
  expect_solo(h, request(1, 9, 40), o);
}

TEST(CacheGroups, NobodyDraftsBehindAState) {
  EngineOptions o = with({{}, {Kind::recurrent}});
  o.scheduler.max_draft = 8;
  o.scheduler.drafts_at_any_cost = true;
  Harness h(o);
  Request r = request(2, 20, 60);
  r.logit_bias = {{5, 40}, {6, 39.5F}};  // it repeats itself
  h.submit(r);
  h.run();
  EXPECT_EQ(h.scheduler.counters().num_drafted_tokens, 0);
  expect_solo(h, r, o);
}

/// The index of a cache of several groups, filled by hand.
class Filled {
 public:
  Filled() {
    RequestLimits limits = limits_of(small());
    limits.groups = {{}, {Kind::window, 8}, {Kind::recurrent}};
    text = make_sequence(request(1, 30, 4).abi(), limits);
  }
  void seal(int32_t group, const std::set<size_t> &pages) {
    for (const size_t page : pages) cache.seal(cache.allocate(), text->hashes[page].of_group(group));
  }
  void forget(int32_t group, size_t page) { cache.forget(text->hashes[page].of_group(group)); }
  std::vector<size_t> found(int32_t first = 0, int32_t most = INT32_MAX) {
    const Prefix prefix = match_prefix(cache, *text, first, most);
    std::vector<size_t> sizes = {static_cast<size_t>(prefix.num_pages)};
    for (const auto &pages : prefix.of_group) sizes.push_back(pages.size());
    return sizes;
  }

  PagePool pool{64, 4};
  PrefixCache cache{pool, true, {{}, {Kind::window, 8}, {Kind::recurrent}}};
  std::unique_ptr<Sequence> text;
};

TEST(CacheGroups, APrefixIsFoundAsFarAsEveryGroupCanGoOn) {
  using Sizes = std::vector<size_t>;
  Filled f;
  EXPECT_EQ(f.found(), (Sizes{0}));
  f.seal(0, {0, 1, 2, 3, 4, 5, 6});
  EXPECT_EQ(f.found(), (Sizes{0})) << "one group is not enough";
  f.seal(1, {2, 3, 4, 5, 6});
  f.seal(2, {1, 3, 5});
  EXPECT_EQ(f.found(), (Sizes{6, 6, 2, 1})) << "the last checkpoint is behind page 5";
  EXPECT_EQ(f.found(0, 5), (Sizes{4, 4, 2, 1}));
  EXPECT_EQ(f.found(4), (Sizes{6, 2, 2, 1})) << "behind four pages that are here";
  EXPECT_EQ(f.found(5), (Sizes{6, 1, 1, 1}));
  EXPECT_EQ(f.found(6), (Sizes{0}));
  f.forget(1, 4);
  EXPECT_EQ(f.found(), (Sizes{4, 4, 2, 1})) << "page 4 is in the window behind page 5";
  f.forget(1, 3);
  EXPECT_EQ(f.found(), (Sizes{0})) << "behind page 1 the window reads pages 0 and 1, which are not here";
  f.seal(1, {0, 1});
  EXPECT_EQ(f.found(), (Sizes{2, 2, 2, 1}));
  f.forget(0, 0);
  EXPECT_EQ(f.found(), (Sizes{0}));
}

TEST(CacheGroups, AGroupsMissIsToldAsAnEviction) {
  Filled f;
  f.seal(1, {0, 1, 2, 3, 4, 5, 6});
  EXPECT_EQ(explain_miss(f.cache, *f.text, 0).why, TS_MISS_NEW);
  f.seal(0, {0});
  EXPECT_EQ(explain_miss(f.cache, *f.text, 0).why, TS_MISS_EVICTED) << "attention has it, the state is gone";
}

TEST(CacheGroups, ASteadyDecodingStepAllocatesNothing) {
  if (!allocations::kReplaced) GTEST_SKIP() << "a sanitizer has its own operator new";
  for (const auto &groups : {std::vector<CacheGroup>{{}}, {{}, {Kind::window, 6}, {Kind::recurrent}}}) {
    const EngineOptions o = with(groups);
    Scheduler scheduler(o.scheduler);
    for (uint64_t id = 1; id <= 5; ++id) {
      scheduler.submit(make_sequence(request(id, 6 + static_cast<int32_t>(id), 100).abi(), limits_of(o)));
    }
    std::vector<Outcome> outcomes(5);
    for (Outcome &outcome : outcomes) outcome.token = 9;
    int64_t before = 0;
    for (int i = 0; i < 60; ++i) {
      if (i == 12) before = allocations::count;
      auto batch = scheduler.schedule();
      ASSERT_TRUE(batch);
      const auto num_logits = static_cast<size_t>(batch->num_logits());
      scheduler.commit(std::move(*batch), std::span(outcomes).first(num_logits));
    }
    EXPECT_EQ(allocations::count, before) << groups.size() << " groups";
    scheduler.cancel_all();
  }
}

}  // namespace
}  // namespace ts
