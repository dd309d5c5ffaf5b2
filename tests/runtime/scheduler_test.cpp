#include "scheduler.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "allocations.h"
#include "toy.h"

namespace ts {
namespace {

using toy::expect_solo;
using toy::Harness;
using toy::request;
using toy::Request;
using toy::small;

TEST(Scheduler, OneRequestIsPrefilledAndDecoded) {
  const EngineOptions o = small();
  Harness h(o);
  const Request r = request(1, 10, 5);
  h.submit(r);
  EXPECT_TRUE(h.step());
  EXPECT_EQ(h.last_num_tokens, 10);
  EXPECT_EQ(h.results.at(1).tokens.size(), 1);
  EXPECT_TRUE(h.step());
  EXPECT_EQ(h.last_num_tokens, 1);
  h.run();
  expect_solo(h, r, o);
  EXPECT_EQ(h.scheduler.pool().num_available(), o.scheduler.num_pages);
  EXPECT_EQ(h.scheduler.counters().num_output_tokens, 5);
}

TEST(Scheduler, ChunksOfAnySizeGiveTheSameOutput) {
  for (int32_t budget = 1; budget <= 24; ++budget) {
    EngineOptions o = small();
    o.scheduler.token_budget = budget;
    Harness h(o);
    const Request a = request(1, 21, 6);
    const Request b = request(2, 40, 6);
    h.submit(a);
    h.submit(b);
    int32_t most = 0;
    while (h.step()) most = std::max(most, h.last_num_tokens);
    EXPECT_EQ(most, budget);
    expect_solo(h, a, o);
    expect_solo(h, b, o);
  }
}

TEST(Scheduler, DecodesComeFirstAndPrefillsFillTheStep) {
  EngineOptions o = small();
  o.scheduler.token_budget = 8;
  Harness h(o);
  h.submit(request(1, 4, 20));
  h.submit(request(2, 4, 20));
  h.step();  // both whole prompts
  EXPECT_EQ(h.last_num_tokens, 8);
  h.submit(request(3, 15, 4));
  h.step();
  EXPECT_EQ(h.last_num_seqs, 3);
  EXPECT_EQ(h.last_num_tokens, 8) << "two decodes, and six tokens of the third's prompt";
  EXPECT_EQ(h.results.at(1).tokens.size(), 2);
  h.step();
  h.step();
  EXPECT_EQ(h.results.at(3).tokens.size(), 1);
  EXPECT_EQ(h.results.at(1).tokens.size(), 4) << "a prefill never holds up a decode";
}

TEST(Scheduler, FirstComeFirstServed) {
  EngineOptions o = small();
  o.scheduler.max_seqs = 2;
  Harness h(o);
  for (uint64_t id = 1; id <= 5; ++id) h.submit(request(id, 4, 3));
  h.step();
  EXPECT_EQ(h.last_num_seqs, 2);
  EXPECT_EQ(h.results.at(2).tokens.size(), 1);
  EXPECT_TRUE(h.results.at(3).tokens.empty());
  EXPECT_EQ(h.scheduler.num_waiting(), 3);
  h.run();
  for (uint64_t id = 1; id <= 5; ++id) expect_solo(h, request(id, 4, 3), o);
}

TEST(Scheduler, PagesThatNobodyCanStillWantAreNotHeldBack) {
  EngineOptions o = small();
  o.scheduler.prefix_cache = false;
  const int32_t page = o.scheduler.page_size;
  o.scheduler.num_pages = 8;
  Harness h(o);
  for (uint64_t id = 1; id <= 3; ++id) h.submit(request(id, page + 1, 2));  // two pages from first to last
  h.step();
  h.submit(request(4, page + 1, 2));
  h.step();
  EXPECT_EQ(h.last_num_tokens, 3 + page + 1) << "the fourth has its two pages";
  h.run();
  EXPECT_EQ(h.scheduler.counters().num_preemptions, 0);
}

TEST(Scheduler, AManyTimesLargerBatchGivesTheSameOutput) {
  const EngineOptions o = small();
  Harness h(o);
  std::vector<Request> all;
  for (uint64_t id = 1; id <= 40; ++id) {
    all.push_back(request(id, 1 + static_cast<int32_t>(id * 7 % 50), 1 + static_cast<int32_t>(id * 3 % 20)));
    h.submit(all.back());
  }
  h.run();
  for (const Request &r : all) expect_solo(h, r, o);
}

// ---- preemption -----------------------------------------------------------------------------------------------------

TEST(Scheduler, TheYoungestIsPreemptedAndResumesWithTheSameOutput) {
  for (const bool prefix_cache : {false, true}) {
    EngineOptions o = small();
    o.scheduler.num_pages = 11;
    o.scheduler.prefix_cache = prefix_cache;
    Harness h(o);
    std::vector<Request> all;
    for (uint64_t id = 1; id <= 4; ++id) {
      all.push_back(request(id, 6, 24));
      h.submit(all.back());
    }
    size_t num_oldest = 0;
    while (!h.results.at(1).finish) {
      h.step();
      EXPECT_EQ(h.results.at(1).tokens.size(), ++num_oldest) << "the oldest is never held up";
    }
    h.run();
    EXPECT_GT(h.scheduler.counters().num_preemptions, 0);
    for (const Request &r : all) expect_solo(h, r, o);
    EXPECT_EQ(h.scheduler.pool().num_available(), 11);
  }
}

TEST(Scheduler, APreemptedPromptDoesNotCountAsCached) {
  EngineOptions o = small();
  o.scheduler.num_pages = 8;
  Harness h(o);
  h.submit(request(1, 9, 20));
  h.submit(request(2, 9, 20));
  h.run();
  EXPECT_GT(h.scheduler.counters().num_preemptions, 0);
  EXPECT_EQ(h.results.at(2).num_cached, 0) << "it computed all of its prompt itself, though it found it again later";
}

// ---- ends -----------------------------------------------------------------------------------------------------------

TEST(Scheduler, EndsAtEndTokensStopTokensAndLength) {
  const EngineOptions o = small();
  Request r = request(2, 5, 40);
  const std::vector<int32_t> all = toy::solo(r, o).tokens;
  ASSERT_EQ(all.size(), 40);
  const auto run = [&](const Request &with) {
    Harness h(o);
    h.submit(with);
    h.run();
    expect_solo(h, with, o);
    return h.results.at(with.id);
  };
  EXPECT_EQ(*run(r).finish, TS_FINISH_LENGTH);
  r.stop = {all[7]};
  const toy::Result stopped = run(r);
  EXPECT_EQ(*stopped.finish, TS_FINISH_STOP);
  EXPECT_EQ(stopped.tokens.back(), all[7]);
  EXPECT_LE(stopped.tokens.size(), 8);
  r.stop.clear();
  r.ignore_eos = 0;
  r.logit_bias = {{1, 100.0F}};  // the end token
  EXPECT_EQ(run(r).tokens, std::vector<int32_t>{1});
  r.ignore_eos = 1;
  EXPECT_EQ(run(r).tokens.size(), 40);
}

TEST(Scheduler, CancelsInEveryState) {
  EngineOptions o = small();
  o.scheduler.num_pages = 9;
  o.scheduler.token_budget = 8;
  Harness h(o);
  const auto finish = [&](uint64_t id) { return h.results.at(id).finish; };
  h.submit(request(1, 4, 30));
  h.submit(request(2, 4, 30));
  h.step();
  h.submit(request(3, 20, 4));
  h.submit(request(4, 4, 4));
  h.step();
  h.scheduler.cancel(3);  // prefilling
  h.scheduler.cancel(4);  // queued
  h.scheduler.cancel(99);
  h.step();
  EXPECT_EQ(finish(3), TS_FINISH_CANCELLED);
  EXPECT_EQ(finish(4), TS_FINISH_CANCELLED);
  while (h.scheduler.counters().num_preemptions == 0) ASSERT_TRUE(h.step());
  EXPECT_EQ(h.scheduler.num_waiting(), 1);
  h.scheduler.cancel(2);  // preempted
  h.scheduler.cancel(1);  // decoding
  h.step();
  EXPECT_EQ(finish(1), TS_FINISH_CANCELLED);
  EXPECT_EQ(finish(2), TS_FINISH_CANCELLED);
  EXPECT_TRUE(h.scheduler.idle());
  EXPECT_EQ(h.scheduler.pool().num_available(), 9) << "every page is back";
  EXPECT_EQ(h.scheduler.counters().num_finished, 4);
}

TEST(Scheduler, TimesOutInEveryState) {
  EngineOptions o = small();
  o.scheduler.num_pages = 9;
  o.scheduler.token_budget = 8;
  Harness h(o);
  const auto submit = [&](uint64_t id, int32_t num_prompt, int32_t max_tokens, int32_t timeout_ms) {
    Request r = request(id, num_prompt, max_tokens);
    r.timeout_ms = timeout_ms;
    h.submit(r);
  };
  const auto message = [&](uint64_t id) {
    EXPECT_EQ(h.results.at(id).finish, TS_FINISH_TIMEOUT);
    return h.results.at(id).message;
  };
  submit(1, 4, 30, 5000);
  submit(2, 4, 30, 4000);
  h.step();
  submit(3, 9, 4, 10);
  submit(4, 4, 4, 10);
  h.step();
  h.set_time(9);
  EXPECT_EQ(h.scheduler.counters().num_finished, 0);
  h.set_time(10);
  h.step();
  EXPECT_EQ(message(3), "the request's timeout of 0.010 s is over: 0 of at most 4 tokens were made") << "prefilling";
  EXPECT_EQ(message(4), "the request's timeout of 0.010 s is over: it was still waiting to be run") << "queued";
  while (h.scheduler.counters().num_preemptions == 0) ASSERT_TRUE(h.step());
  h.set_time(5000);
  h.step();
  EXPECT_NE(message(1).find("of at most 30 tokens"), std::string::npos) << "decoding";
  EXPECT_NE(message(2).find("of at most 30 tokens"), std::string::npos) << "preempted";
  EXPECT_TRUE(h.scheduler.idle());
  EXPECT_EQ(h.scheduler.pool().num_available(), 9) << "every page is back";
}

TEST(Scheduler, NanLogitsEndOneRequestAndNothingOfItIsFoundAgain) {
  const EngineOptions o = small();
  Harness h(o);
  const Request healthy = request(1, 12, 8);
  Request poisoned = request(2, 12, 8);
  poisoned.prompt[9] = toy::kPoison;
  h.submit(healthy);
  h.submit(poisoned);
  h.run();
  expect_solo(h, healthy, o);
  EXPECT_EQ(h.results.at(2).finish, TS_FINISH_ERROR);
  EXPECT_NE(h.results.at(2).message.find("not finite: that of token 32 is"), std::string::npos)
      << h.results.at(2).message;
  Request again = poisoned;
  again.id = 3;
  again.prompt[9] = 5;
  h.submit(again);
  h.run();
  EXPECT_EQ(h.results.at(3).num_cached, 0);
  expect_solo(h, again, o);
}

TEST(Scheduler, AFailedStepEndsItsRequestsAndLeavesTheRest) {
  EngineOptions o = small();
  o.scheduler.max_seqs = 2;
  Harness h(o);
  for (uint64_t id = 1; id <= 3; ++id) h.submit(request(id, 6, 4));
  h.step();
  auto batch = h.scheduler.schedule();
  ASSERT_TRUE(batch);
  h.scheduler.fail(std::move(*batch), "the device said no");
  h.run();
  EXPECT_EQ(h.results.at(1).finish, TS_FINISH_ERROR);
  EXPECT_EQ(h.results.at(2).message, "the device said no");
  expect_solo(h, request(3, 6, 4), o);
  EXPECT_EQ(h.scheduler.pool().num_available(), o.scheduler.num_pages);
}

TEST(SchedulerDeathTest, ABatchEndsExactlyOnce) {
  const EngineOptions o = small();
  const auto scheduled = [&](Harness &h) {
    h.submit(request(1, 6, 4));
    return h.scheduler.schedule();
  };
  std::vector<Outcome> outcomes(1);
  outcomes[0].token = 5;
  EXPECT_DEATH(
      {
        Harness h(o);
        auto batch = scheduled(h);
        batch.reset();
      },
      "a batch was dropped");
  EXPECT_DEATH(
      {
        Harness h(o);
        auto batch = scheduled(h);
        h.scheduler.schedule();
      },
      "one batch at a time");
  EXPECT_DEATH(
      {
        Harness h(o);
        auto batch = scheduled(h);
        h.scheduler.cancel(1);
      },
      "the batch in flight must be told");
  EXPECT_DEATH(
      {
        Harness h(o);
        auto batch = scheduled(h);
        h.scheduler.commit(std::move(*batch), outcomes);
        h.scheduler.commit(std::move(*batch), outcomes);  // NOLINT(bugprone-use-after-move)
      },
      "not the batches in flight");
}

// ---- cost -----------------------------------------------------------------------------------------------------------

TEST(Scheduler, ASteadyDecodingStepDoesNotAllocate) {
  if (!allocations::kReplaced) GTEST_SKIP() << "a sanitizer has its own operator new";
  EngineOptions o = small();
  o.scheduler.max_context = 4096;
  o.scheduler.num_pages = 4096;
  Harness h(o);
  for (uint64_t id = 1; id <= 8; ++id) h.submit(request(id, 4, 2000));
  for (int i = 0; i < 4; ++i) h.step(false);
  ASSERT_EQ(h.scheduler.num_running(), 8);
  std::vector<Outcome> outcomes(8);
  std::vector<Finished> finished;
  const int64_t before = allocations::count;
  for (int i = 0; i < 200; ++i) {
    auto batch = h.scheduler.schedule();
    for (Outcome &outcome : outcomes) outcome.token = 4 + i % 50;
    h.scheduler.commit(std::move(*batch), outcomes);
    h.scheduler.take_finished(finished);
  }
  EXPECT_EQ(allocations::count, before) << "pages were crossed, too";
}

TEST(Scheduler, ASteadyDecodingStepThatGuessesDoesNotAllocate) {
  if (!allocations::kReplaced) GTEST_SKIP() << "a sanitizer has its own operator new";
  EngineOptions o = small();
  o.scheduler.max_context = 4096;
  o.scheduler.num_pages = 4096;
  o.scheduler.token_budget = o.scheduler.max_seqs = 64;
  o.scheduler.max_draft = 5;
  Harness h(o);
  h.submit(request(100, 4, 20));
  h.run();  // there is an earlier generation
  for (uint64_t id = 1; id <= 8; ++id) h.submit(request(id, 4, 2000));
  for (int i = 0; i < 4; ++i) h.step(false);
  std::vector<Outcome> outcomes(64);
  std::vector<Finished> finished;
  int64_t before = 0;
  for (int i = 0; i < 250; ++i) {
    if (i == 50) before = allocations::count;  // by then each has had as many open pages as a draft takes
    auto batch = h.scheduler.schedule();
    for (Outcome &outcome : outcomes) outcome.token = i % 20 == 0 ? 30 : 7;
    h.scheduler.commit(std::move(*batch), std::span(outcomes).first(static_cast<size_t>(batch->num_logits())));
    h.scheduler.take_finished(finished);
  }
  EXPECT_EQ(allocations::count, before);
  const SchedulerCounters &sums = h.scheduler.counters();
  EXPECT_GT(sums.num_accepted_tokens, 1000);
  EXPECT_GT(sums.num_drafted_tokens, sums.num_accepted_tokens);
}

// ---- drafts from earlier generations --------------------------------------------------------------------------------

/// Steps that a request takes by itself, behind those of `h`.
int steps_of(Harness &h, const Request &r) {
  h.submit(r);
  int num_steps = 0;
  while (h.step()) ++num_steps;
  return num_steps;
}

/// What a tenant was told before is guessed when it asks again, whatever the prefix cache holds; what another was told is not,
/// with or without a prefix cache.
TEST(Scheduler, WhatATenantWasToldIsGuessedWhenItAsksAgain) {
  for (const bool prefix_cache : {true, false}) {
    EngineOptions o = small();
    o.scheduler.prefix_cache = prefix_cache;
    o.scheduler.max_draft = 8;
    Harness h(o);
    Request r = request(2, 10, 60);
    r.cache_salt = "one";
    const int first = steps_of(h, r);
    r.id = 4, r.cache_salt = "two";
    EXPECT_EQ(steps_of(h, r), first) << "another tenant's answer was guessed";
    r.id = 6, r.cache_salt = "one";
    EXPECT_LT(steps_of(h, r), first / 4);
    for (const uint64_t id : {2, 4, 6}) {
      r.id = id;
      expect_solo(h, r, o);
    }
    Request sampled = r;
    sampled.id = 8, sampled.temperature = 0.8F;
    const int fresh = steps_of(h, sampled);
    sampled.id = 10;
    EXPECT_LT(steps_of(h, sampled), fresh / 4) << "the same seed gives the same answer";
    expect_solo(h, sampled, o);
    sampled.id = 12, sampled.seed = 99;
    steps_of(h, sampled);
    expect_solo(h, sampled, o);
  }
}

TEST(Scheduler, WhatWasCancelledCanBeGuessedAndWhatFailedCannot) {
  EngineOptions o = small();
  o.scheduler.max_draft = 8;
  Harness h(o);
  Request r = request(2, 10, 60);
  const int alone = steps_of(h, r);
  for (const bool cancel : {true, false}) {
    Request other = request(20, 10, 60, cancel ? 7 : 8);
    other.id = cancel ? 20 : 30;
    h.submit(other);
    for (int i = 0; i < 40; ++i) h.step();
    if (cancel) h.scheduler.cancel(other.id);
    if (!cancel) h.scheduler.fail(std::move(*h.scheduler.schedule()), "failed");
    h.step();
    ++other.id, ++other.id;
    const int again = steps_of(h, other);
    EXPECT_EQ(again < alone - 20, cancel) << again << " steps of " << alone;
  }
}

}  // namespace
}  // namespace ts
