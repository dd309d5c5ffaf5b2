#include "drafts.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "toy.h"

namespace ts {
namespace {

using Tokens = std::vector<int32_t>;

/// A step of 1,000 ns, to which each further token adds 100.
StepCost cost() { return {{{1, 1000}, {1001, 101'000}}, 0, 0}; }

/// One sequence's drafts, and a step that holds nobody else.
class One {
 public:
  explicit One(size_t num_tokens_max = 1 << 14, StepCost of_steps = cost())
      : drafts(num_tokens_max), cost_(std::move(of_steps)) {}

  Draft guess(const Tokens &tokens, int32_t most = Draft::kMost) {
    const double ns = cost_.ns({1, 0, 0});
    drafts.earn(ns);
    StepValue step{cost_, {1, 0, 0}, ns, 1};
    const Draft draft = drafts.guess(tokens, tenant, earlier, most, step);
    EXPECT_EQ(step.load.num_tokens, 1 + draft.size);
    EXPECT_NEAR(step.ns, cost_.ns(step.load), 1e-6);
    return draft;
  }

  Tokens tokens(const Tokens &text, int32_t most = Draft::kMost) {
    const Draft draft = guess(text, most);
    return {draft.tokens.begin(), draft.tokens.begin() + draft.size};
  }

  /// As if drafts had come true before: there is something to spend.
  One &rich() {
    drafts.earn(1000);
    for (int i = 0; i < 4; ++i) drafts.learn(Draft{.size = 1, .kind = Draft::kEarlier3}, 1);
    return *this;
  }

  Drafts drafts;
  Generations earlier{{.num_tokens = 256, .num_tenants = 2}};
  PageHash tenant{1, 2};

 private:
  StepCost cost_;
};

TEST(Drafts, AreWhatFollowedTheLongestMatch) {
  One one;
  one.rich();
  EXPECT_EQ(one.tokens({1, 2}), Tokens()) << "too short to be like anything";
  EXPECT_EQ(one.tokens({1, 2, 3}), Tokens());
  // 5 2 3 4 6 7 stood before 60, 2 3 4 6 7 alone, later, before 70
  const Tokens text = {5, 2, 3, 4, 6, 7, 60, 61, 62, 63, 64, 9, 2, 3, 4, 6, 7, 70, 71, 8, 5, 2, 3, 4, 6, 7};
  EXPECT_EQ(one.tokens(text, 2), (Tokens{60, 61}));
  EXPECT_EQ(one.tokens(text, 0), Tokens());
}

TEST(Drafts, TakeTheLatestOfEqualMatches) {
  EXPECT_EQ(One().rich().tokens({2, 3, 4, 60, 2, 3, 4, 70, 2, 3, 4}, 1), (Tokens{70}));
}

TEST(Drafts, RunIntoThemselvesWhereTheTextRepeats) {
  EXPECT_EQ(One().rich().tokens({1, 2, 3, 4, 5, 1, 2, 3, 4, 5}, 7).size(), 2) << "five alike are half believed";
  One one;
  one.rich();
  for (int i = 0; i < 30; ++i) one.drafts.learn(Draft{.size = 16, .kind = Draft::kOwn5}, 16);
  EXPECT_EQ(one.tokens({1, 2, 3, 4, 5, 1, 2, 3, 4, 5}, 7), (Tokens{1, 2, 3, 4, 5, 1, 2}));
}

TEST(Drafts, AreAsLongAsTheirTimeIsWorth) {
  Tokens text = toy::tokens(100, 1, 64);
  text.insert(text.end(), text.begin(), text.begin() + 20);
  // (1 + 0.9 + ... + 0.9^n) / (1 + 0.1 n) is largest at n = 10
  EXPECT_EQ(One().rich().tokens(text).size(), 10);
  EXPECT_EQ(One(1 << 14, StepCost({{1, 1000}, {1000, 1001}}, 0, 0)).rich().tokens(text).size(), 16) << "nearly free";
  EXPECT_EQ(One(1 << 14, StepCost({{1, 1000}, {21, 19'000}}, 0, 0)).rich().tokens(text).size(), 0)
      << "a second token takes nine tenths of a step and comes true nine times of ten: in two steps' time there are "
         "two";
  EXPECT_EQ(One(1 << 14, StepCost({{1, 1000}, {2, 2100}, {20, 2300}}, 0, 0)).rich().tokens(text).size(), 16)
      << "one does not pay, many do";
}

TEST(Drafts, AreBelievedByWhatCameOfThem) {
  Drafts drafts(64);
  const double first = drafts.chance(Draft::kOwn9);
  for (int i = 0; i < 20; ++i) drafts.learn(Draft{.size = 4, .kind = Draft::kOwn9}, 4);
  EXPECT_GT(drafts.chance(Draft::kOwn9), 0.97);
  for (int i = 0; i < 20; ++i) drafts.learn(Draft{.size = 4, .kind = Draft::kOwn9}, 1);
  EXPECT_NEAR(drafts.chance(Draft::kOwn9), 0.5, 0.1);
  for (int i = 0; i < 80; ++i) drafts.learn(Draft{.size = 4, .kind = Draft::kOwn9}, 0);
  EXPECT_LT(drafts.chance(Draft::kOwn9), 0.06);
  EXPECT_GT(first, 0.06);
  EXPECT_DOUBLE_EQ(drafts.chance(Draft::kEarlier9), One().drafts.chance(Draft::kEarlier9)) << "others are not theirs";
}

/// What follows the same twenty tokens is new each time: every guess fails.
TEST(Drafts, ThatNeverComeTrueTakeAFiftiethOfTheTime) {
  constexpr int kSteps = 4000;
  One one(1 << 17);
  Tokens text;
  int num_drafted = 0;
  for (int32_t i = 0; i < kSteps; ++i) {
    for (int32_t token = 1; token <= 20; ++token) text.push_back(token);
    const Draft draft = one.guess(text);
    if (draft.size > 0) one.drafts.learn(draft, 0);
    num_drafted += draft.size;
    text.push_back(1000 + i);
  }
  EXPECT_LE(num_drafted * 100, kSteps * 1000 / 50);
  EXPECT_GE(num_drafted, 5) << "now and then one is tried";
}

TEST(Drafts, GoOnBehindATokenThatWasEdited) {
  Tokens text = toy::tokens(60, 5, 64);
  One one;
  one.rich();
  text.insert(text.end(), text.begin(), text.begin() + 20);
  const Draft draft = one.guess(text, 4);
  ASSERT_EQ(draft.size, 4);
  EXPECT_EQ(draft.kind, Draft::kOwn17);
  one.drafts.learn(draft, 1);
  text.push_back(text[20]);
  text.push_back(99);  // where text[21] stood
  const Draft resumed = one.guess(text, 2);
  EXPECT_EQ(resumed.kind, Draft::kResumed);
  ASSERT_GE(resumed.size, 1);
  EXPECT_EQ(resumed.tokens[0], text[22]);
  for (const int32_t token : {98, 97, 96, 95}) text.push_back(token);
  EXPECT_EQ(one.guess(text, 2).size, 0) << "that was no edit";
}

TEST(Drafts, ComeFromEarlierGenerationsOfTheTenantAlone) {
  const Tokens said = toy::tokens(40, 7, 64);
  const auto one = [&](PageHash tenant, int num_known) {
    One asks;
    asks.tenant = tenant;
    asks.earlier.add({1, 2}, said);
    asks.earlier.add({3, 4}, toy::tokens(40, 8, 64));
    return asks.rich().tokens({said.begin(), said.begin() + num_known});
  };
  const Tokens next = one({1, 2}, 20);
  ASSERT_GT(next.size(), 3);
  EXPECT_TRUE(std::equal(next.begin(), next.end(), said.begin() + 20));
  EXPECT_EQ(one({1, 2}, 38), (Tokens{said[38], said[39]})) << "there it ended";
  EXPECT_EQ(one({3, 4}, 20), Tokens()) << "another tenant said it";
}

}  // namespace
}  // namespace ts
