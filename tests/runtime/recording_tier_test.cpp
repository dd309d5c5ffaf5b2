#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "expect.h"
#include "toy.h"
#include "toy_run.h"

// Runs with a second tier, repeated: which copies fail is no function of the run, and so is in its trace.
namespace ts {
namespace {

using toy::recording;
using toy::replaying;
using toy::ToyRun;

constexpr uint64_t kRequests = 60;

EngineOptions tight(std::vector<CacheGroup> groups) {
  EngineOptions o = toy::small();
  o.scheduler.num_pages = groups.size() > 1 ? 48 : 40;
  o.scheduler.groups = std::move(groups);
  o.scheduler.tier = {400, 64, 6};
  o.scheduler.max_draft = 4;
  return o;
}

toy::Request request(uint64_t id) {
  toy::Request r =
      toy::request(id, static_cast<int32_t>(20 + id * 7 % 50), static_cast<int32_t>(4 + id % 20), id % 3 + 1);
  if (id % 7 == 0) r.cache_salt = "a secret";
  return r;
}

void eventful(uint64_t step, EngineCore &core) {
  if (step < kRequests) core.submit(request(step + 1).abi());
  if (step % 9 == 4) core.cancel(step / 2);
  if (step == 40) throw std::runtime_error("a kernel is broken");
}

class RecordingOfTier : public ::testing::TestWithParam<std::vector<CacheGroup>> {
 protected:
  void record() {
    int32_t num_copies = 0;
    const auto every_23rd_fails = [&num_copies](const PageCopy &) { return ++num_copies % 23 == 0; };
    ToyRun run(options_, recording(file_), eventful, 0, every_23rd_fails);
    run.core.submit(request(1).abi());
    run.collect(kRequests);
    run.core.close();
    run.collect(SIZE_MAX);
    tokens_ = run.tokens;
    finishes_ = run.finishes;
    stats_ = run.stats();
  }

  testing::Folder folder_;
  std::string file_ = folder_ / "run.trace";
  EngineOptions options_ = tight(GetParam());
  std::map<uint64_t, std::vector<int32_t>> tokens_;
  std::map<uint64_t, int32_t> finishes_;
  ts_stats stats_{};
};

TEST_P(RecordingOfTier, WhatFailedFailsAgain) {
  record();
  EXPECT_GT(stats_.num_pages_restored, 20U);
  EXPECT_GT(stats_.num_pages_broken, 10U);
  ToyRun again(options_, replaying(file_));  // where no copy fails
  again.collect(SIZE_MAX);
  EXPECT_EQ(again.core.failure(), "");
  EXPECT_EQ(again.tokens, tokens_);
  EXPECT_EQ(again.finishes, finishes_);
  const ts_stats stats = again.stats();
  EXPECT_EQ(stats.num_steps, stats_.num_steps);
  EXPECT_EQ(stats.num_pages_kept, stats_.num_pages_kept);
  EXPECT_EQ(stats.num_pages_restored, stats_.num_pages_restored);
  EXPECT_EQ(stats.num_pages_broken, stats_.num_pages_broken);
  EXPECT_EQ(stats.num_restored_tokens, stats_.num_restored_tokens);
}

TEST_P(RecordingOfTier, WhatFailsNowAndDidNotThenIsADifference) {
  record();
  int32_t num_copies = 0;
  ToyRun again(options_, replaying(file_), {}, 0, [&](const PageCopy &) { return ++num_copies == 5; });
  again.collect(SIZE_MAX);
  EXPECT_EQ(again.core.failure_status(), TS_DIFFERS);
  testing::expect_in(again.core.failure(), {"a page could not be", "the second tier, as it was in the trace"});
}

TEST_P(RecordingOfTier, AnotherTierIsADifference) {
  record();
  options_.scheduler.tier.num_slots = 12;
  ToyRun again(options_, replaying(file_));
  again.collect(SIZE_MAX);
  EXPECT_EQ(again.core.failure_status(), TS_DIFFERS);
  testing::expect_in(again.core.failure(), {"differs: "});
}

INSTANTIATE_TEST_SUITE_P(Groups, RecordingOfTier,
                         ::testing::Values(std::vector<CacheGroup>{CacheGroup{}},
                                           std::vector<CacheGroup>{CacheGroup{},
                                                                   {CacheGroup::Kind::window, 12},
                                                                   {CacheGroup::Kind::recurrent}}),
                         [](const auto &info) { return std::to_string(info.param.size()) + "_groups"; });

}  // namespace
}  // namespace ts
