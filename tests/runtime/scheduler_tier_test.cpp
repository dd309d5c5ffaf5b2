#include <gtest/gtest.h>

#include <optional>
#include <utility>
#include <vector>

#include "allocations.h"
#include "scheduler.h"
#include "toy.h"

// Pages that the prefix cache evicts, kept in a second tier and brought back.
namespace ts {
namespace {

using toy::expect_solo;
using toy::Harness;
using toy::request;
using toy::Request;
using toy::small;

/// 16 pages of 4 tokens, and a tier for 32 more.
EngineOptions tight() {
  EngineOptions o = small();
  o.scheduler.num_pages = 16;
  o.scheduler.tier = {32, 64, 64};
  return o;
}

void run(Harness &h, const Request &r) {
  h.submit(r);
  h.run();
}

/// Takes every page, so that all that was there is evicted; what it leaves itself is of no use to anyone.
void flood(Harness &h, uint64_t id) { run(h, request(id, 60, 2)); }

TEST(SecondTier, WhatWasEvictedComesBack) {
  const EngineOptions o = tight();
  Harness h(o);
  run(h, request(1, 41, 4, 7));
  flood(h, 2);
  EXPECT_GE(h.scheduler.cache().num_held(), 10);
  const Request again = request(3, 41, 4, 7);
  run(h, again);
  EXPECT_EQ(h.results.at(3).num_cached, 40);
  EXPECT_EQ(h.results.at(3).num_restored, 40);
  EXPECT_EQ(h.results.at(3).miss.why, TS_MISS_NONE);
  EXPECT_EQ(h.scheduler.counters().num_pages_restored, 10U);
  EXPECT_EQ(h.scheduler.counters().num_restored_tokens, 40U);
  expect_solo(h, again, o);
  run(h, request(4, 41, 4, 7));
  EXPECT_EQ(h.results.at(4).num_cached, 40);
  EXPECT_EQ(h.results.at(4).num_restored, 0) << "it is in the cache again";
}

TEST(SecondTier, OtherTenantsFindNothingInIt) {
  Harness h(tight());
  run(h, request(1, 41, 4, 7));
  flood(h, 2);
  Request other = request(3, 41, 4, 7);
  other.cache_salt = "other";
  run(h, other);
  EXPECT_EQ(h.results.at(3).num_cached, 0);
}

TEST(SecondTier, BringsBackSoManyPagesAStepWhileOthersDecode) {
  EngineOptions o = tight();
  o.scheduler.num_pages = 32;
  o.scheduler.tier = {128, 64, 3};
  Harness h(o);
  run(h, request(1, 41, 4, 7));
  for (const uint64_t id : {2, 6}) run(h, request(id, 110, 2));
  const Request decoding = request(3, 4, 40), waiting = request(4, 41, 4, 7), behind = request(5, 5, 4);
  h.submit(decoding);
  h.step();
  h.submit(waiting);
  h.submit(behind);
  for (const size_t num_loads : {3, 3, 3, 1}) {
    h.step();
    EXPECT_EQ(h.last_num_seqs, 1) << "nobody is admitted before the one whose turn it is";
    EXPECT_GE(h.last_num_copies, num_loads);
  }
  h.step();
  EXPECT_EQ(h.last_num_seqs, 3);
  h.run();
  EXPECT_EQ(h.results.at(4).num_restored, 40);
  for (const Request &r : {decoding, waiting, behind}) expect_solo(h, r, o);
}

TEST(SecondTier, WhatComesBackChangedIsComputed) {
  const EngineOptions o = tight();
  Harness h(o);
  run(h, request(1, 41, 4, 7));
  flood(h, 2);
  int32_t num_loads = 0;
  h.copy_fails = [&](const PageCopy &copy) { return copy.to == PageCopy::To::page && ++num_loads == 4; };
  const Request again = request(3, 41, 4, 7);
  run(h, again);
  EXPECT_EQ(h.results.at(3).num_restored, 12);
  EXPECT_EQ(h.results.at(3).miss.why, TS_MISS_BROKEN);
  EXPECT_EQ(h.results.at(3).miss.at, 12);
  EXPECT_EQ(h.scheduler.counters().num_pages_broken, 1U);
  expect_solo(h, again, o);
}

TEST(SecondTier, ATierThatKeepsNothingCostsNothingElse) {
  const EngineOptions o = tight();
  Harness h(o);
  h.copy_fails = [](const PageCopy &) { return true; };
  for (uint64_t id = 1; id <= 8; ++id) {
    const Request r = request(id, 41, 4, 7 + id % 3);
    run(h, r);
    expect_solo(h, r, o);
  }
  EXPECT_EQ(h.scheduler.cache().num_held(), 0);
  EXPECT_EQ(h.scheduler.counters().num_pages_broken, 32U) << "each slot is tried once";
}

TEST(SecondTier, NothingOfARequestThatFailedComesBack) {
  EngineOptions o = tight();
  o.scheduler.token_budget = 16;
  Harness h(o);
  Request poisoned = request(1, 41, 4, 7);
  poisoned.prompt[0] = toy::kPoison;
  h.submit(poisoned);
  h.step();
  h.step();
  h.scheduler.cancel(1);  // before anyone can see what is wrong with it
  flood(h, 2);
  poisoned.id = 3;
  run(h, poisoned);
  EXPECT_EQ(h.results.at(3).num_restored, 32) << "they share their fate";
  EXPECT_EQ(h.results.at(3).finish, TS_FINISH_ERROR);
  poisoned.id = 4;
  run(h, poisoned);
  EXPECT_EQ(h.results.at(4).num_cached, 0);
  EXPECT_EQ(h.results.at(4).finish, TS_FINISH_ERROR);
}

TEST(SecondTier, AStepThatFailsLeavesWhatItWasToBringBack) {
  const EngineOptions o = tight();
  Harness h(o);
  run(h, request(1, 41, 4, 7));
  flood(h, 2);
  h.submit(request(3, 41, 4, 7));
  std::optional<Batch> batch = h.scheduler.schedule();
  ASSERT_TRUE(batch);
  EXPECT_EQ(batch->arrays().num_tokens, 0) << "a step of copies alone";
  h.scheduler.fail(std::move(*batch), "failed");
  h.scheduler.check();
  h.run();
  EXPECT_EQ(h.results.at(3).finish, TS_FINISH_LENGTH) << "it was not in the step";
  EXPECT_GT(h.results.at(3).num_restored, 0);
  expect_solo(h, request(3, 41, 4, 7), o);
}

TEST(SecondTier, WhatIsStillToComeIsNotGivenAwayForWhatIsEvicted) {
  EngineOptions o = tight();
  o.scheduler.tier = {12, 64, 2};
  Harness h(o);
  run(h, request(1, 41, 4, 7));
  flood(h, 2);
  run(h, request(3, 41, 4, 7));
  EXPECT_EQ(h.results.at(3).num_restored, 40) << "two pages a step, each of which evicts two others";
  expect_solo(h, request(3, 41, 4, 7), o);
}

TEST(SecondTier, WhoIsCancelledMeanwhileLeavesWhatCameBack) {
  EngineOptions o = tight();
  o.scheduler.tier = {32, 64, 4};
  Harness h(o);
  run(h, request(1, 41, 4, 7));
  flood(h, 2);
  h.submit(request(3, 41, 4, 7));
  h.step();
  EXPECT_EQ(h.last_num_copies, 7U) << "four are brought back, where three were and one page was blank";
  h.scheduler.cancel(3);
  h.step();
  EXPECT_EQ(h.results.at(3).finish, TS_FINISH_CANCELLED);
  EXPECT_EQ(h.scheduler.pool().num_available(), 16) << "nobody holds a page";
  run(h, request(4, 41, 4, 7));
  EXPECT_EQ(h.results.at(4).num_cached, 40);
  EXPECT_EQ(h.results.at(4).num_restored, 24);
  expect_solo(h, request(4, 41, 4, 7), o);
}

TEST(SecondTier, WhoWasPreemptedGetsItsPagesBack) {
  const EngineOptions o = tight();
  Harness h(o);
  const Request older = request(1, 20, 40), younger = request(2, 20, 20);
  h.submit(older);
  h.submit(younger);
  h.run();
  EXPECT_GE(h.scheduler.counters().num_preemptions, 1U);
  EXPECT_GE(h.scheduler.counters().num_pages_restored, 5U) << "all of its prompt";
  EXPECT_EQ(h.results.at(2).num_restored, 0) << "it has computed them itself";
  for (const Request &r : {older, younger}) expect_solo(h, r, o);
}

/// 10 pages of 4 tokens for full attention, of which the window's last 3 are read, and the state's checkpoints at 32 and 40.
EngineOptions three_groups() {
  EngineOptions o = small();
  o.scheduler.groups = {{}, {CacheGroup::Kind::window, 12}, {CacheGroup::Kind::recurrent}};
  o.scheduler.num_pages = 40;
  o.scheduler.tier = {200, 200, 64};
  return o;
}

TEST(SecondTier, BringsBackWhatEveryGroupNeeds) {
  const EngineOptions o = three_groups();
  Harness h(o);
  run(h, request(1, 41, 4, 7));
  run(h, request(2, 100, 2));
  const uint64_t before = h.scheduler.counters().num_pages_restored;
  run(h, request(3, 41, 4, 7));
  EXPECT_EQ(h.results.at(3).num_cached, 40);
  EXPECT_EQ(h.results.at(3).num_restored, 40);
  EXPECT_EQ(h.scheduler.counters().num_pages_restored - before, 10U + 3U + 1U);
  expect_solo(h, request(3, 41, 4, 7), o);
}

TEST(SecondTier, WithoutWhatOneGroupNeedsThereIsNoHit) {
  const EngineOptions o = three_groups();
  Harness h(o);
  run(h, request(1, 41, 4, 7));
  run(h, request(2, 100, 2));
  int32_t num_loads = 0;
  h.copy_fails = [&](const PageCopy &copy) { return copy.to == PageCopy::To::page && ++num_loads == 14; };
  run(h, request(3, 41, 4, 7));
  EXPECT_EQ(num_loads, 17) << "the last checkpoint is broken: what the window reads at the one before, and that";
  EXPECT_EQ(h.results.at(3).num_cached, 32);
  EXPECT_EQ(h.results.at(3).num_restored, 32);
  EXPECT_EQ(h.results.at(3).miss.why, TS_MISS_BROKEN);
  EXPECT_EQ(h.results.at(3).miss.at, 32);
  expect_solo(h, request(3, 41, 4, 7), o);

  h.copy_fails = [](const PageCopy &copy) { return copy.to == PageCopy::To::page; };
  run(h, request(4, 100, 2));
  run(h, request(5, 41, 4, 7));
  EXPECT_EQ(h.results.at(5).num_cached, 0) << "no page of full attention comes back";
  expect_solo(h, request(5, 41, 4, 7), o);
}

TEST(SecondTier, ASteadyDecodingStepThatEvictsDoesNotAllocate) {
  if (!allocations::kReplaced) GTEST_SKIP() << "a sanitizer has its own operator new";
  EngineOptions o = small();
  o.scheduler.max_context = 4096;
  o.scheduler.num_pages = 1024;
  o.scheduler.tier = {2048, 64, 8};
  Harness h(o);
  for (uint64_t id = 100; id < 164; ++id) run(h, request(id, 120, 2));
  for (uint64_t id = 1; id <= 4; ++id) h.submit(request(id, 4, 900));
  for (int i = 0; i < 20; ++i) h.step(false);
  ASSERT_EQ(h.scheduler.num_running(), 4);
  ASSERT_EQ(h.scheduler.pool().num_blank(), 0);
  std::vector<Outcome> outcomes(4);
  std::vector<Finished> finished;
  size_t num_copies = 0;
  const int64_t before = allocations::count;
  for (int i = 0; i < 200; ++i) {
    auto batch = h.scheduler.schedule();
    for (PageCopy &copy : batch->copies()) copy.state = PageCopy::State::done;
    num_copies += batch->copies().size();
    for (Outcome &outcome : outcomes) outcome.token = 4 + i % 50;
    h.scheduler.commit(std::move(*batch), outcomes);
    h.scheduler.take_finished(finished);
  }
  EXPECT_EQ(allocations::count, before);
  EXPECT_GE(num_copies, 199U) << "a page for each of the four, every four steps";
  h.scheduler.cancel_all();
}

}  // namespace
}  // namespace ts
