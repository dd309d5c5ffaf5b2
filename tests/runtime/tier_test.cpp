#include "tier.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <span>
#include <utility>
#include <vector>

namespace ts {
namespace {

using State = PageCopy::State;

PageHash hash_of(int32_t n) {
  PageHash hash;
  page_hasher().pages({}, std::array{n}, 1, {&hash, 1});
  return hash;
}

struct Small {
  explicit Small(int32_t num_slots, int32_t max_stores = 100, int32_t max_loads = 100)
      : tier({num_slots, max_stores, max_loads}, 50, orders) {}

  /// The step has run.
  void end(State state = State::done) {
    for (PageCopy copy : std::exchange(orders, {})) {
      copy.state = state;
      tier.end(copy);
    }
    tier.check();
  }

  /// How many of these can be brought back.
  int64_t count(std::span<const PageHash> hashes) const {
    return std::ranges::count_if(hashes, [this](const PageHash &hash) { return tier.holds(hash); });
  }

  std::vector<PageCopy> orders;
  Tier tier;
};

TEST(Tier, WhatIsEvictedCanBeBroughtBackOnceItIsCopied) {
  Small small(4);
  small.tier.keep(hash_of(1), 7);
  ASSERT_EQ(small.orders.size(), 1);
  EXPECT_EQ(small.orders[0].page, 7);
  EXPECT_EQ(small.orders[0].slot, 50) << "slots are numbered over all owners";
  EXPECT_EQ(small.orders[0].to, PageCopy::To::slot);
  const std::array hashes = {hash_of(1), hash_of(2)};
  EXPECT_EQ(small.count(hashes), 0) << "it is on its way";
  small.end();
  EXPECT_EQ(small.count(hashes), 1);
  EXPECT_EQ(small.tier.num_held(), 1);

  small.tier.load(small.tier.pin(hash_of(1)), 9);
  EXPECT_EQ(small.orders.at(0).page, 9);
  EXPECT_EQ(small.orders[0].slot, 50);
  EXPECT_EQ(small.orders[0].to, PageCopy::To::page);
  small.end();
  EXPECT_EQ(small.count(hashes), 1) << "it stays";
  small.tier.keep(hash_of(1), 3);
  EXPECT_TRUE(small.orders.empty()) << "so it need not be copied again";
}

TEST(Tier, GivesAwayWhatWasUsedLeastLatelyButNothingThatIsRead) {
  Small small(3);
  for (int32_t i = 0; i < 3; ++i) small.tier.keep(hash_of(i), i);
  small.end();
  small.tier.keep(hash_of(0), 9);                   // used again
  const int32_t read = small.tier.pin(hash_of(1));  // the oldest, but read
  for (int32_t i = 3; i < 6; ++i) small.tier.keep(hash_of(i), i);
  ASSERT_EQ(small.orders.size(), 2) << "there is no third slot";
  for (const PageCopy &copy : small.orders) EXPECT_NE(copy.slot, read);
  small.tier.load(read, 20);
  small.end();
  EXPECT_EQ(small.count(std::array{hash_of(3), hash_of(4)}), 2);
  EXPECT_EQ(small.count(std::array{hash_of(1)}), 1);
  EXPECT_EQ(small.count(std::array{hash_of(0)}), 0);
}

TEST(Tier, ASlotWhoseCopyFailedIsNeverUsedAgain) {
  Small small(2);
  small.tier.keep(hash_of(1), 1);
  small.end(State::failed);
  EXPECT_EQ(small.tier.num_broken(), 1);
  EXPECT_EQ(small.count(std::array{hash_of(1)}), 0);
  small.tier.keep(hash_of(1), 1);
  ASSERT_EQ(small.orders.at(0).slot, 51);
  small.end();
  small.tier.load(small.tier.pin(hash_of(1)), 1);
  small.end(State::failed);
  EXPECT_EQ(small.tier.num_broken(), 2);
  EXPECT_EQ(small.tier.num_held(), 0);
  small.tier.keep(hash_of(1), 1);
  EXPECT_TRUE(small.orders.empty()) << "no slot is left";
}

TEST(Tier, WhatMayNotHaveBeenCopiedIsNotFound) {
  Small small(2);
  small.tier.keep(hash_of(1), 1);
  small.end(State::ordered);  // the step failed
  EXPECT_EQ(small.count(std::array{hash_of(1)}), 0);
  small.tier.keep(hash_of(1), 1);
  small.end();
  small.tier.load(small.tier.pin(hash_of(1)), 1);
  small.end(State::ordered);
  EXPECT_EQ(small.count(std::array{hash_of(1)}), 1) << "reading harms nothing";
}

TEST(Tier, ForgetsAlsoWhatIsOnItsWay) {
  Small small(3);
  small.tier.keep(hash_of(1), 1);
  small.tier.keep(hash_of(2), 2);
  small.end();
  small.tier.keep(hash_of(3), 3);
  small.tier.load(small.tier.pin(hash_of(2)), 2);
  for (int32_t i = 0; i < 4; ++i) small.tier.forget(hash_of(i));
  small.tier.check();
  small.tier.keep(hash_of(4), 4);
  EXPECT_EQ(small.orders.back().slot, 50) << "the only one without a copy under way";
  small.end();
  EXPECT_EQ(small.tier.num_held(), 1);
  EXPECT_EQ(small.count(std::array{hash_of(4)}), 1);
}

TEST(Tier, AStepOrdersNoMoreThanItHasRoomFor) {
  Small small(8, 2, 1);
  for (int32_t i = 0; i < 5; ++i) small.tier.keep(hash_of(i), i);
  EXPECT_EQ(small.orders.size(), 2);
  small.end();
  EXPECT_EQ(small.tier.num_held(), 2);
}

/// Whatever happens, slots are conserved, and what is found is what was put there last.
TEST(Tier, KeepsItsInvariantsUnderRandomUse) {
  std::mt19937 random(1);
  for (int32_t world = 0; world < 30; ++world) {
    Small small(1 + static_cast<int32_t>(random() % 12));
    std::vector<int32_t> content(static_cast<size_t>(small.tier.num_slots()), -1);  // of slots
    std::vector<std::pair<int32_t, int32_t>> loads;                                 // slot, what must be in it
    for (int32_t step = 0; step < 300; ++step) {
      for (auto n = random() % 6; n > 0; --n) {
        const auto what = static_cast<int32_t>(random() % 20);
        const std::array hash = {hash_of(what)};
        if (random() % 5 == 0) {
          small.tier.forget(hash[0]);
        } else if (random() % 2 == 0 && small.count(hash) == 1) {
          const int32_t slot = small.tier.pin(hash[0]);
          small.tier.load(slot, what);
          loads.emplace_back(slot, what);
        } else {
          small.tier.keep(hash[0], what);
        }
      }
      // Copies are made in order: what is read is what its name says.
      auto load = loads.begin();
      for (PageCopy &copy : small.orders) {
        int32_t &held = content.at(static_cast<size_t>(copy.slot - 50));
        if (copy.to == PageCopy::To::slot) held = copy.page;
        if (copy.to == PageCopy::To::page) {
          ASSERT_EQ(held, copy.page);
          ASSERT_EQ(*load++, std::pair(copy.slot, copy.page));
        }
        copy.state = random() % 100 == 0 ? State::failed : random() % 20 == 0 ? State::ordered : State::done;
        small.tier.end(copy);
      }
      small.orders.clear();
      loads.clear();
      small.tier.check();
    }
  }
}

}  // namespace
}  // namespace ts
