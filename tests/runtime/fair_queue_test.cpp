#include "fair_queue.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "toy.h"

namespace ts {
namespace {

class FairQueueTest : public testing::Test {
 protected:
  void push(uint64_t id, int32_t priority, uint64_t tenant, int64_t now_ms = 0) {
    toy::Request request = toy::request(id, 4, 4);
    request.priority = priority;
    request.tenant = tenant;
    auto sequence = make_sequence(request.abi(), limits_of(toy::small()));
    sequence->arrival = next_arrival_++;
    queue_.push(std::move(sequence), now_ms);
    queue_.check();
  }

  uint64_t pop(int64_t now_ms = 0, int32_t num_tokens = 10) {
    popped_.push_back(queue_.pop(now_ms, num_tokens));
    queue_.check();
    return popped_.back().sequence().id;
  }

  std::vector<uint64_t> pop_all(int64_t now_ms = 0) {
    std::vector<uint64_t> ids;
    while (!queue_.empty()) ids.push_back(pop(now_ms));
    return ids;
  }

  FairQueue queue_{100};
  std::vector<Queued> popped_;
  uint64_t next_arrival_ = 0;
};

using Ids = std::vector<uint64_t>;

TEST_F(FairQueueTest, OneTenantIsFirstComeFirstServed) {
  for (const uint64_t id : {3, 1, 2}) push(id, 0, 0);
  EXPECT_EQ(pop_all(), (Ids{3, 1, 2}));
}

TEST_F(FairQueueTest, TheLowerClassGoesFirst) {
  push(1, 7, 0);
  push(2, 0, 0);
  push(3, -8, 0);
  push(4, 0, 0);
  EXPECT_EQ(pop_all(), (Ids{3, 2, 4, 1}));
}

TEST_F(FairQueueTest, TenantsTakeTurnsHoweverManyRequestsOneHas) {
  for (const uint64_t id : {1, 2, 3, 4}) push(id, 0, 1);
  for (const uint64_t id : {5, 6}) push(id, 0, 2);
  EXPECT_EQ(pop_all(), (Ids{1, 5, 2, 6, 3, 4}));
}

TEST_F(FairQueueTest, OutputsCountTwice) {
  push(1, 0, 1), push(2, 0, 1), push(3, 0, 2), push(4, 0, 2);
  EXPECT_EQ(pop(0, 10), 1);
  EXPECT_EQ(pop(0, 13), 3);
  FairQueue::charge_output(popped_[0].sequence());
  EXPECT_EQ(queue_.first(0).id, 2) << "12 tokens against 13";
  FairQueue::charge_output(popped_[0].sequence());
  EXPECT_EQ(queue_.first(0).id, 4) << "14 tokens against 13";
}

TEST_F(FairQueueTest, NobodySavesUp) {
  push(1, 0, 1);
  EXPECT_EQ(pop(0, 1000), 1);
  for (const uint64_t id : {2, 3}) push(id, 0, 1);
  for (const uint64_t id : {4, 5}) push(id, 0, 2);  // was never charged, but did not wait either
  EXPECT_EQ(pop_all(), (Ids{2, 4, 3, 5}));
}

TEST_F(FairQueueTest, WhoIsOverdueGoesFirstOnceForEachWait) {
  push(1, 0, 1, 0), push(2, 0, 1, 0);
  for (const uint64_t id : {3, 4, 5}) push(id, -8, 2, 800);
  EXPECT_EQ(pop(899), 3) << "the ninth class is overdue after nine times 100 ms";
  EXPECT_EQ(pop(900), 1);
  EXPECT_EQ(pop(900), 4);
  EXPECT_EQ(pop(1799), 5);
  EXPECT_EQ(pop(1800), 2);
}

TEST_F(FairQueueTest, ADebtIsKeptWhileTheFloorMayFall) {
  constexpr uint64_t kMost = 1, kSome = 2, kLeast = 3;
  for (const uint64_t tenant : {kMost, kSome, kLeast}) push(tenant, 0, tenant);
  pop(0, 60), pop(0, 50), pop(0, 10);
  popped_.clear();
  for (const uint64_t id : {4, 5, 6, 7}) push(id, 0, kMost);  // the floor is 60, and each looks for whom to forget
  EXPECT_EQ(queue_.take_all([](const Sequence &) { return true; }).size(), 4);  // and falls to 10, the last one's
  push(8, 0, kLeast), push(9, 0, kSome), push(10, 0, kLeast);
  EXPECT_EQ(pop_all(), (Ids{8, 10, 9})) << "who was charged 50 comes after who was charged 20";
}

TEST_F(FairQueueTest, ManyTenantsOfOneRequestAreForgotten) {
  for (uint64_t id = 1; id <= 1000; ++id) {
    push(id, 0, id);
    EXPECT_EQ(pop(), id);
    popped_.clear();
  }
  EXPECT_LE(queue_.num_flows(), 4);
}

}  // namespace
}  // namespace ts
