#include "drafts.h"

#include <gtest/gtest.h>

#include <vector>

#include "toy.h"

namespace ts {
namespace {

std::vector<int32_t> drafted(Drafts &drafts, const std::vector<int32_t> &tokens, int32_t most = Draft::kMost) {
  const Draft draft = drafts.propose(tokens, most);
  return {draft.tokens.begin(), draft.tokens.begin() + draft.size};
}

using Tokens = std::vector<int32_t>;

TEST(Drafts, AreWhatFollowedTheLongestMatch) {
  Drafts drafts(64);
  EXPECT_EQ(drafted(drafts, {1, 2}), Tokens()) << "too short to be like anything";
  EXPECT_EQ(drafted(drafts, {1, 2, 3}), Tokens());
  // 5 2 3 4 stood before 60, 2 3 4 alone, later, before 70
  const Tokens text = {5, 2, 3, 4, 60, 61, 62, 63, 64, 9, 2, 3, 4, 70, 71, 8, 5, 2, 3, 4};
  EXPECT_EQ(drafted(drafts, text), (Tokens{60, 61, 62, 63}));
  EXPECT_EQ(drafted(drafts, text, 2), (Tokens{60, 61}));
  EXPECT_EQ(drafted(drafts, text, 0), Tokens());
}

TEST(Drafts, TakeTheLatestOfEqualMatches) {
  Drafts drafts(64);
  EXPECT_EQ(drafted(drafts, {2, 3, 4, 60, 2, 3, 4, 70, 2, 3, 4}, 1), (Tokens{70}));
}

TEST(Drafts, RunIntoThemselvesWhereTheTextRepeats) {
  Drafts drafts(64);
  EXPECT_EQ(drafted(drafts, {1, 2, 3, 1, 2, 3}), (Tokens{1, 2, 3, 1}));
}

TEST(Drafts, GrowWhileTheyComeTrueAndStopWhereTheyDoNot) {
  Drafts drafts(256);
  Tokens text = toy::tokens(100, 1, 64);
  text.insert(text.end(), text.begin(), text.begin() + 10);
  const auto length = [&] { return drafted(drafts, text).size(); };
  EXPECT_EQ(length(), 4);
  drafts.learn(4, 4);
  EXPECT_EQ(length(), 8);
  drafts.learn(8, 8);
  drafts.learn(16, 16);
  EXPECT_EQ(length(), 16);
  drafts.learn(16, 9);
  EXPECT_EQ(length(), 16) << "more than half came true";
  drafts.learn(16, 1);
  EXPECT_EQ(length(), 8);
  for (int i = 0; i < 8; ++i) drafts.learn(1, 0);
  EXPECT_EQ(length(), 0) << "ten tokens alike are not enough any more";
}

TEST(Drafts, RestLongerEachTimeTheyFail) {
  constexpr int kSteps = 300;
  Drafts drafts(8192);
  Tokens text;
  int num_drafts = 0;
  for (int32_t i = 0; i < kSteps; ++i) {  // what follows the same twenty tokens is new each time
    for (int32_t token = 1; token <= 20; ++token) text.push_back(token);
    const Draft draft = drafts.propose(text, 1);
    if (draft.size > 0) drafts.learn(draft.size, 0), ++num_drafts;
    text.push_back(1000 + i);
  }
  EXPECT_GE(num_drafts, 7);
  EXPECT_LE(num_drafts, 8 + kSteps / 64);
  drafts.learn(1, 1);
  drafts.learn(1, 0);
  for (int32_t token = 1; token <= 20; ++token) text.push_back(token);
  EXPECT_EQ(drafts.propose(text, 1).size, 0);
  EXPECT_EQ(drafts.propose(text, 1).size, 1) << "one that came true makes the next rest short again";
}

}  // namespace
}  // namespace ts
