#include "patience.h"

#include <gtest/gtest.h>

namespace ts {
namespace {

/// How often a wait looks that is met at turn `met_at`, or never.
int turns(Patience &patience, int met_at = -1) {
  int num_turns = 0;
  patience.spin([&] { return num_turns++ == met_at; });
  return num_turns;
}

TEST(Patience, IsShortWhileMostWaitsSleepAfterAllTheirTurns) {
  constexpr int kMost = 1000;
  Patience patience(kMost);
  int num_long = 0;
  while (turns(patience) == kMost) ++num_long;
  EXPECT_EQ(num_long, 16);
  int num_short = 1;
  while (turns(patience) < kMost) ++num_short;
  EXPECT_GT(num_short, 200);
  EXPECT_LT(turns(patience), kMost) << "the trial was in vain";
}

TEST(Patience, IsWholeAgainWhereATrialIsMet) {
  constexpr int kMost = 1000;
  Patience patience(kMost);
  while (turns(patience) == kMost) {
  }
  while (turns(patience, kMost - 1) < kMost) {
  }
  for (int i = 0; i < 100; ++i)
    EXPECT_EQ(turns(patience, i % 2 == 0 ? kMost - 1 : -1), kMost) << "half of them are met";
}

TEST(Patience, NoneWhereThreadsOutnumberCores) {
  Patience patience(0);
  EXPECT_EQ(turns(patience), 0);
}

}  // namespace
}  // namespace ts
