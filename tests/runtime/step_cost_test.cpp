#include "step_cost.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "scheduler.h"
#include "toy.h"

namespace ts {
namespace {

StepCost simple() { return {{{1, 1000}, {2, 1000}, {4, 2000}, {64, 32000}}, 2000, 1000}; }  // 2 ns and 1 ns a key

TEST(StepCost, IsLinearBetweenSizesAndInKeys) {
  const StepCost cost = simple();
  EXPECT_DOUBLE_EQ(cost.ns({1, 0, 0}), 1000);
  EXPECT_DOUBLE_EQ(cost.ns({3, 0, 0}), 1500);
  EXPECT_DOUBLE_EQ(cost.ns({34, 0, 0}), 17000);
  EXPECT_DOUBLE_EQ(cost.ns({100, 0, 0}), 32000) << "nothing is known beyond";
  EXPECT_DOUBLE_EQ(cost.ns({1, 500, 70}), 1000 + 1000 + 70);
}

TEST(StepCost, LearnsWhatStepsTakeAndForgetsAHiccup) {
  StepCost cost = simple();
  cost.learn({64, 0, 0}, 32000);
  for (int i = 0; i < 100; ++i) cost.learn({4, 0, 0}, 6000);
  EXPECT_NEAR(cost.ns({4, 0, 0}), 6000, 60);
  const double other = cost.ns({64, 0, 0});
  EXPECT_GT(other, 32000 * 1.2) << "what one size takes says a little of the others";
  EXPECT_LT(other, 32000 * 3);
  cost.learn({4, 0, 0}, 60'000'000);
  EXPECT_LT(cost.ns({4, 0, 0}), 6000 * 1.5);
  for (int i = 0; i < 40; ++i) cost.learn({4, 0, 0}, 6000);
  EXPECT_NEAR(cost.ns({4, 0, 0}), 6000, 60);
}

TEST(StepCost, ASizeThatNobodyTriedIsLikeTheNearestThatSomebodyDid) {
  StepCost cost = simple();
  cost.learn({64, 0, 0}, 16000);
  EXPECT_NEAR(cost.ns({1, 0, 0}), 500, 1) << "one step says enough of what is not known";
  cost.learn({1, 0, 0}, 2000);
  EXPECT_NEAR(cost.ns({1, 0, 0}), 2000, 10);
  EXPECT_NEAR(cost.ns({2, 0, 0}), 2000, 10) << "of the sizes 1, 2, 4 and 64 nearer to 1 than to 64";
  EXPECT_NEAR(cost.ns({4, 0, 0}), 2000, 10) << "nearer to 64, which halved it; but no less than a smaller step";
  EXPECT_NEAR(cost.ns({64, 0, 0}), 16000, 200);
  for (int i = 0; i < 20; ++i) cost.learn({4, 0, 0}, 3000);
  EXPECT_NEAR(cost.ns({4, 0, 0}), 3000, 50);
}

TEST(StepCost, ASizeThatWasSlowOnceIsTriedAgain) {
  StepCost cost = simple();
  for (int i = 0; i < 100; ++i) cost.learn({64, 0, 0}, 320'000);
  for (int i = 0; i < 2000; ++i) cost.learn({4, 0, 0}, 2000);
  EXPECT_NEAR(cost.ns({64, 0, 0}), 32000, 1000);
}

TEST(StepCost, NeverFallsWhereTheLoadGrows) {
  StepCost cost = simple();
  for (int i = 0; i < 100; ++i) cost.learn({2, 100, 0}, 90'000);
  for (int i = 0; i < 100; ++i) cost.learn({64, 0, 100}, 1000);
  for (int32_t n = 1; n < 64; ++n) EXPECT_LE(cost.ns({n, 50, 50}), cost.ns({n + 1, 50, 50})) << n;
}

/// A decode, and a prompt of 100 tokens: how many of it the next step takes.
int32_t chunk_beside_a_decode(int64_t target_ns, int32_t num_decodes = 1) {
  EngineOptions o = toy::small();
  o.scheduler.token_budget = 64;
  o.scheduler.cost = simple();
  o.scheduler.target_step_ns = target_ns;
  toy::Harness h(o);
  for (int32_t i = 0; i < num_decodes; ++i) h.submit(toy::request(static_cast<uint64_t>(i) + 1, 4, 20));
  h.step();
  h.submit(toy::request(100, 100, 4));
  h.step();
  return h.last_num_tokens - num_decodes;
}

TEST(Scheduler, APromptIsCutToWhatTheTargetLeaves) {
  EXPECT_EQ(chunk_beside_a_decode(0), 63) << "no target";
  EXPECT_EQ(chunk_beside_a_decode(1'000'000'000), 63);
  // 1 + c tokens take (1 + c) * 500 ns, 5 keys of the decode 10 ns, and c (c + 1) / 2 keys of the prompt as many ns.
  EXPECT_EQ(chunk_beside_a_decode(500 * 31 + 10 + 465), 30);
  EXPECT_EQ(chunk_beside_a_decode(500 * 31 + 10 + 464), 29);
  EXPECT_EQ(chunk_beside_a_decode(1), Scheduler::kLeastChunk) << "prompts move on even so";
}

TEST(Scheduler, WithoutDecodesAPromptTakesTheWholeBudget) { EXPECT_EQ(chunk_beside_a_decode(1, 0), 64); }

}  // namespace
}  // namespace ts
