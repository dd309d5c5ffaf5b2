#include "generations.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "allocations.h"
#include "toy.h"

namespace ts {
namespace {

using Tokens = std::vector<int32_t>;
constexpr PageHash kA{1, 1}, kB{2, 2}, kC{3, 3};

/// What is found is alike in as many tokens as is said, and no place is alike in more of the first 32. `text` is searched by the
/// plainest means.
TEST(TextIndex, FindsTheLongestMatch) {
  std::mt19937 random(3);
  TextIndex index(600);
  Tokens text;
  size_t num_found = 0;
  for (int i = 0; i < 600; ++i) {
    text.push_back(static_cast<int32_t>(random() % 5));
    index.add(text);
    const auto [end, length] = index.longest(text, text);
    const auto alike = [&](size_t place) {
      size_t n = 0;
      while (n < std::min(place, TextIndex::kEnough) && text[place - 1 - n] == text[text.size() - 1 - n]) ++n;
      return n;
    };
    size_t best = 0, places = 0;
    for (size_t place = text.size(); place-- > 0 && places < TextIndex::kMostPlaces;) {  // the latest first
      if (alike(place) < TextIndex::kLeast) continue;
      ++places;
      best = std::max(best, alike(place));
    }
    if (length > 0) {
      ASSERT_EQ(alike(end), length);
    }
    ASSERT_LE(length, best);  // less only where places of another hash took a turn in the bucket
    num_found += length == best && best > 0 ? 1 : 0;
  }
  EXPECT_GT(num_found, 450);
}

TEST(Generations, AreFoundUntilTheyAreOld) {
  Generations earlier({.num_tokens = 64, .num_tenants = 4});
  const Tokens first = toy::tokens(20, 1, 1000);
  earlier.add(kA, first);
  const auto found = [&] { return earlier.longest(kA, std::span(first).first(10)); };
  EXPECT_EQ(found().length, 10);
  EXPECT_EQ(found().next.front(), first[10]);
  EXPECT_LT(found().next[10], 0) << "it ends after ten more";
  int num_added = 0;
  while (found().length > 0) earlier.add(kA, toy::tokens(20, static_cast<uint64_t>(++num_added) + 5, 1000));
  EXPECT_GE(num_added * 21, 64 - 2 * 21);
  EXPECT_LE(num_added * 21, 2 * 64);
}

TEST(Generations, OfOneTenantAreNotAnothers) {
  Generations earlier({.num_tokens = 64, .num_tenants = 2});
  const Tokens a = toy::tokens(20, 1, 1000), b = toy::tokens(20, 2, 1000);
  earlier.add(kA, a);
  for (int i = 0; i < 50; ++i) earlier.add(kB, b);
  EXPECT_EQ(earlier.longest(kB, std::span(a).first(10)).length, 0);
  EXPECT_EQ(earlier.longest(kA, std::span(b).first(10)).length, 0);
  EXPECT_EQ(earlier.longest(kA, std::span(a).first(10)).length, 10) << "however much B says, A's is there";
  earlier.add(kC, a);  // B was used longer ago
  EXPECT_EQ(earlier.num_tenants(), 2);
  EXPECT_EQ(earlier.longest(kB, std::span(b).first(10)).length, 0);
  EXPECT_EQ(earlier.longest(kA, std::span(a).first(10)).length, 10);
  EXPECT_EQ(earlier.longest(kC, std::span(b).first(10)).length, 0) << "where C's lies B's lay";
}

TEST(Generations, LongerThanTheirRoomLeaveTheirEnd) {
  Generations earlier({.num_tokens = 64, .num_tenants = 1});
  const Tokens text = toy::tokens(200, 1, 1000);
  earlier.add(kA, text);
  earlier.add(kA, Tokens{1, 2, 3});  // too short to be found
  EXPECT_EQ(earlier.longest(kA, std::span(text).first(190)).length, TextIndex::kEnough);
  EXPECT_EQ(earlier.longest(kA, std::span(text).first(100)).length, 0);
}

TEST(Generations, AllocateOnceATenant) {
  Generations earlier({.num_tokens = 256, .num_tenants = 2});
  const Tokens text = toy::tokens(100, 1, 1000);
  earlier.add(kA, text);
  earlier.add(kB, text);
  const int64_t before = allocations::count;
  for (int i = 0; i < 20; ++i) {
    earlier.add(i % 3 == 0 ? kA : i % 3 == 1 ? kB : kC, text);
    earlier.longest(kA, text);
  }
  EXPECT_EQ(allocations::count, before);
}

}  // namespace
}  // namespace ts
