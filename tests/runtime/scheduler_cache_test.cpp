#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "scheduler.h"
#include "toy.h"

// What the scheduler finds again: the prefix cache, tenants, and what sessions leave between their turns.
namespace ts {
namespace {

using toy::expect_solo;
using toy::Harness;
using toy::request;
using toy::Request;
using toy::small;

// ---- prefix cache ---------------------------------------------------------------------------------------------------

TEST(Scheduler, APrefixIsFoundAgainButNeverTheLastToken) {
  const EngineOptions o = small();
  for (const int32_t num_prompt : {3, 4, 5, 8, 11, 12, 13}) {
    Harness h(o);
    h.submit(request(1, num_prompt, 2, 7));
    h.run();
    EXPECT_EQ(h.results.at(1).num_cached, 0);
    const Request again = request(2, num_prompt, 6, 7);
    h.submit(again);
    h.step();
    const int32_t cached = (num_prompt - 1) / 4 * 4;
    EXPECT_EQ(h.last_num_tokens, num_prompt - cached);
    h.run();
    EXPECT_EQ(h.results.at(2).num_cached, cached);
    expect_solo(h, again, o);
  }
}

TEST(Scheduler, TenantsDoNotFindEachOthersPages) {
  const EngineOptions o = small();
  Harness h(o);
  const auto run = [&](uint64_t id, const char *salt) {
    Request r = request(id, 17, 2, 7);
    r.cache_salt = salt;
    h.submit(r);
    h.run();
    expect_solo(h, r, o);
    return h.results.at(id).num_cached;
  };
  EXPECT_EQ(run(1, ""), 0);
  EXPECT_EQ(run(2, "a"), 0);
  EXPECT_EQ(run(3, "b"), 0);
  EXPECT_EQ(run(4, ""), 16);
  EXPECT_EQ(run(5, "a"), 16);
  EXPECT_EQ(run(6, "b"), 16);
}

TEST(Scheduler, AMissSaysWhy) {
  EngineOptions o = small();
  o.scheduler.num_pages = 12;
  Harness h(o);
  const auto miss = [&](uint64_t id, const char *salt, int32_t changed) {
    Request r = request(id, 17, 2, 7);
    r.cache_salt = salt;
    if (changed >= 0) r.prompt[static_cast<size_t>(changed)] = r.prompt[static_cast<size_t>(changed)] == 5 ? 6 : 5;
    h.submit(r);
    h.run();
    const Miss m = h.results.at(id).miss;
    return std::pair(m.why, m.at);
  };
  EXPECT_EQ(miss(1, "a", -1), std::pair(TS_MISS_NEW, 0));
  EXPECT_EQ(miss(2, "a", -1), std::pair(TS_MISS_NONE, 0));
  EXPECT_EQ(miss(3, "a", 10), std::pair(TS_MISS_NEW, 10)) << "the token that differs";
  EXPECT_EQ(miss(4, "b", 10), std::pair(TS_MISS_NEW, 0)) << "which no other tenant learns";
  EXPECT_EQ(miss(5, "", -1), std::pair(TS_MISS_NEW, 0));
  EXPECT_EQ(miss(6, "", 10), std::pair(TS_MISS_NEW, 8)) << "nor anyone without a salt: pages are enough to guess at";
  h.submit(request(7, 44, 2));  // all pages
  h.run();
  EXPECT_EQ(miss(8, "a", -1), std::pair(TS_MISS_EVICTED, 0));
  o.scheduler.prefix_cache = false;
  Harness without(o);
  without.submit(request(1, 17, 2));
  without.run();
  EXPECT_EQ(without.results.at(1).miss.why, TS_MISS_OFF);
}

TEST(Scheduler, TheNextTurnFindsPromptAndOutputOfTheLast) {
  const EngineOptions o = small();
  Harness h(o);
  const Request first = request(1, 10, 9);
  h.submit(first);
  h.run();
  Request second = first;
  second.id = 2;
  second.prompt.insert(second.prompt.end(), h.results.at(1).tokens.begin(), h.results.at(1).tokens.end());
  const std::vector<int32_t> more = toy::tokens(3, 9, 64);
  second.prompt.insert(second.prompt.end(), more.begin(), more.end());
  h.submit(second);
  h.run();
  EXPECT_EQ(h.results.at(2).num_cached, 16)
      << "10 + 9 tokens, the last of which was never an input: four full pages of 18";
  expect_solo(h, second, o);
}

TEST(Scheduler, TwoThatPrefillTheSamePromptAtOnceShareItsPages) {
  EngineOptions o = small();
  o.scheduler.token_budget = 24;
  Harness h(o);
  const Request a = request(1, 17, 8, 7);
  const Request b = request(2, 17, 8, 7);
  h.submit(a);
  h.submit(b);
  h.step();  // all of a, and 7 tokens of b: both compute page 0
  EXPECT_EQ(h.last_num_tokens, 24);
  h.step();  // b goes on behind a's sealed pages: one token of each
  EXPECT_EQ(h.last_num_tokens, 2);
  EXPECT_EQ(o.scheduler.num_pages - h.scheduler.pool().num_available(), 4 + 2) << "four pages together, one each";
  h.run();
  EXPECT_EQ(h.results.at(2).num_cached, 16 - 7);
  expect_solo(h, a, o);
  expect_solo(h, b, o);
}

TEST(Scheduler, WithoutAPrefixCacheNothingIsShared) {
  EngineOptions o = small();
  o.scheduler.prefix_cache = false;
  Harness h(o);
  for (uint64_t id = 1; id <= 3; ++id) h.submit(request(id, 12, 4, 7));
  h.run();
  for (uint64_t id = 1; id <= 3; ++id) {
    expect_solo(h, request(id, 12, 4, 7), o);
    EXPECT_EQ(h.results.at(id).num_cached, 0);
  }
  EXPECT_EQ(h.scheduler.pool().num_blank(), o.scheduler.num_pages);
}

TEST(Scheduler, WhatWaitsForPagesThatARunningPrefillComputesGetsThem) {
  EngineOptions o = small();
  o.scheduler.num_pages = 12;
  Harness h(o);
  h.submit(request(1, 33, 8, 7));  // nine pages
  h.step();
  h.submit(request(2, 34, 2, 7));  // nine more, of which eight are the first's
  h.step();
  EXPECT_EQ(h.last_num_seqs, 2);
  h.run();
  EXPECT_EQ(h.results.at(2).num_cached, 32);
}

// ---- leases -----------------------------------------------------------------------------------------------------------

Request turn(uint64_t id, int32_t num_prompt, uint64_t session, int32_t lease_ms) {
  Request r = request(id, num_prompt, 2, session);  // turns of a session have the same prompt
  r.session = session;
  r.lease_ms = lease_ms;
  return r;
}

TEST(Scheduler, ASessionsPagesStayForItsNextTurn) {
  for (const int32_t lease_ms : {0, 50}) {
    EngineOptions o = small();
    o.scheduler.num_pages = 20;
    Harness h(o);
    h.scheduler.set_time(1000);
    h.submit(turn(1, 17, 7, lease_ms));
    h.run();
    EXPECT_EQ(h.scheduler.pool().num_available(), lease_ms > 0 ? 16 : 20) << "four full pages";
    for (uint64_t id = 2; id < 8; ++id) {
      h.submit(request(id, 40, 8));
      h.run();
    }
    h.scheduler.set_time(1049);
    h.submit(turn(9, 17, 7, 0));
    h.run();
    EXPECT_EQ(h.results.at(9).num_cached, lease_ms > 0 ? 16 : 0) << "else others have driven it out";
    EXPECT_EQ(h.scheduler.pool().num_available(), 20) << "the next turn has taken the lease over";
    EXPECT_EQ(h.scheduler.counters().num_preemptions, 0);
  }
}

TEST(Scheduler, ALeaseEndsWhenItsTimeHasComeAndTheClockMayJump) {
  const EngineOptions o = small();
  Harness h(o);
  h.scheduler.set_time(1000);
  h.submit(turn(1, 17, 7, 50));
  h.run();
  h.scheduler.set_time(500);
  h.scheduler.set_time(1049);
  EXPECT_EQ(h.scheduler.num_leases(), 1);
  h.scheduler.set_time(1050);
  EXPECT_EQ(h.scheduler.num_leases(), 0);
  EXPECT_EQ(h.scheduler.pool().num_available(), o.scheduler.num_pages);
}

TEST(Scheduler, LeasesHoldAtMostHalfOfThePagesTheFirstToEndGoFirst) {
  EngineOptions o = small();
  o.scheduler.num_pages = 20;
  Harness h(o);
  for (uint64_t session = 1; session <= 4; ++session) {
    h.submit(turn(session, 17, session, session == 2 ? 10 : 100));
    h.run();
  }
  EXPECT_EQ(h.scheduler.num_leases(), 2) << "of four pages each, ten are allowed";
  h.submit(turn(9, 17, 4, 0));
  h.run();
  EXPECT_EQ(h.results.at(9).num_cached, 16);
}

TEST(Scheduler, ALeaseMakesRoomWhereARequestCouldNotRunOrGoOnOtherwise) {
  EngineOptions o = small();
  o.scheduler.num_pages = 12;
  for (const int32_t num_prompt : {40, 20}) {  // too much at once, and too much in the end
    Harness h(o);
    h.submit(turn(1, 17, 7, 1000));
    h.run();
    ASSERT_EQ(h.scheduler.num_leases(), 1);
    const Request large = request(2, num_prompt, 48 - num_prompt);
    h.submit(large);
    h.run();
    EXPECT_EQ(h.scheduler.num_leases(), 0);
    EXPECT_EQ(h.scheduler.counters().num_preemptions, 0);
    expect_solo(h, large, o);
  }
}

}  // namespace
}  // namespace ts
