#include "prefix_cache.h"

#include <gtest/gtest.h>

#include <array>
#include <optional>
#include <vector>

namespace ts {
namespace {

PageHash hash_of(int32_t n) {
  PageHash hash;
  page_hasher().pages({}, std::array{n}, 1, {&hash, 1});
  return hash;
}

TEST(PrefixCache, FindsTheLongestPrefixThatIsThere) {
  PagePool pool(64, 4);
  PrefixCache cache(pool, true);
  std::vector<PageHash> hashes;
  for (int32_t i = 0; i < 50; ++i) hashes.push_back(hash_of(i));
  for (const PageHash &hash : hashes) cache.seal(cache.allocate(), hash);
  {
    const std::vector<SharedPage> found = cache.find_prefix(hashes);
    ASSERT_EQ(found.size(), 50);
    EXPECT_EQ(found[49].id(), cache.find(hashes[49])->id());
    EXPECT_EQ(pool.num_idle(), 0);
    cache.forget(hashes[30]);
  }
  EXPECT_EQ(cache.find_prefix(hashes).size(), 30) << "up to the first that is missing";
  EXPECT_TRUE(cache.find_prefix({}).empty());
  EXPECT_TRUE(cache.find_prefix(std::vector{hash_of(99)}).empty());
  cache.check();
}

TEST(PrefixCache, WhatIsFoundAgainSurvivesAScanOfWhatIsNot) {
  PagePool pool(64, 4);
  PrefixCache cache(pool, true);
  std::vector<PageHash> shared;
  for (int32_t i = 0; i < 16; ++i) shared.push_back(hash_of(i));
  for (const PageHash &hash : shared) cache.seal(cache.allocate(), hash);
  EXPECT_EQ(cache.find_prefix(shared).size(), 16);
  for (int32_t i = 0; i < 1000; ++i) cache.seal(cache.allocate(), hash_of(1000 + i));
  EXPECT_EQ(cache.find_prefix(shared).size(), 16);
  cache.check();
}

TEST(PrefixCache, WhatIsNoLongerFoundMakesRoomInTheEnd) {
  PagePool pool(64, 4);
  PrefixCache cache(pool, true);
  const auto use_twice = [&](int32_t i) {
    cache.seal(cache.allocate(), hash_of(i));
    return cache.find(hash_of(i)).has_value();
  };
  for (int32_t i = 0; i < 200; ++i) EXPECT_TRUE(use_twice(i));
  int32_t num_found = 0;
  for (int32_t i = 0; i < 200; ++i) num_found += cache.find(hash_of(i)).has_value() ? 1 : 0;
  EXPECT_EQ(num_found, 64) << "the youngest";
  EXPECT_TRUE(cache.find(hash_of(199)));
  for (int32_t i = 0; i < 16; ++i) cache.seal(cache.allocate(), hash_of(1000 + i));
  for (int32_t i = 0; i < 16; ++i) EXPECT_TRUE(cache.find(hash_of(1000 + i))) << "a quarter is for what is new";
  cache.check();
}

TEST(PrefixCache, WhatComesBackAfterItsEvictionIsKeptAsIfItHadBeenFound) {
  PagePool pool(8, 4);
  PrefixCache cache(pool, true);
  const auto scan = [&](int32_t from) {
    for (int32_t i = 0; i < 10; ++i) cache.seal(cache.allocate(), hash_of(from + i));
  };
  cache.seal(cache.allocate(), hash_of(1));
  scan(100);
  EXPECT_FALSE(cache.find(hash_of(1)));
  cache.seal(cache.allocate(), hash_of(1));
  scan(200);
  EXPECT_TRUE(cache.find(hash_of(1)));
}

TEST(PrefixCache, ExplainsWhatIsMissing) {
  PagePool pool(2, 4);
  PrefixCache cache(pool, true);
  const PageHash root = page_hasher().root(""), other = page_hasher().root("other");
  const std::vector<int32_t> tokens = {5, 6, 7, 8}, alike = {5, 6, 9, 8};
  const auto why = [&](const PageHash &hash, const PageHash &parent) {
    const Miss miss = cache.explain(hash, parent, alike);
    return std::pair(miss.why, miss.at);
  };
  EXPECT_EQ(why(hash_of(2), root), std::pair(TS_MISS_NEW, 0));
  cache.seal(cache.allocate(), hash_of(1), root, tokens);
  EXPECT_EQ(why(hash_of(2), root), std::pair(TS_MISS_NEW, 2)) << "two tokens in common with the page that is there";
  EXPECT_EQ(why(hash_of(2), other), std::pair(TS_MISS_NEW, 0)) << "but not for another root";
  EXPECT_EQ(why(hash_of(2), hash_of(1)), std::pair(TS_MISS_NEW, 0));
  cache.seal(cache.allocate(), hash_of(3), hash_of(1), tokens);
  EXPECT_EQ(why(hash_of(2), hash_of(1)), std::pair(TS_MISS_NEW, 2));
  const WritablePage evicts = cache.allocate();
  EXPECT_EQ(why(hash_of(1), root), std::pair(TS_MISS_EVICTED, 0));
  EXPECT_EQ(why(hash_of(2), root), std::pair(TS_MISS_NEW, 0)) << "the page that it had tokens in common with is gone";
  cache.check();
}

TEST(PrefixCache, FindsWhatWasSealedUntilItIsEvicted) {
  PagePool pool(2, 4);
  PrefixCache cache(pool, true);
  int32_t id = 0;
  {
    const SharedPage page = cache.seal(cache.allocate(), hash_of(1));
    id = page.id();
  }
  EXPECT_EQ(pool.num_idle(), 1);
  {
    const auto found = cache.find(hash_of(1));
    ASSERT_TRUE(found);
    EXPECT_EQ(found->id(), id);
    EXPECT_EQ(pool.num_idle(), 0) << "a found page is held";
    EXPECT_FALSE(cache.find(hash_of(2)));
  }
  const WritablePage blank = cache.allocate();
  EXPECT_NE(blank.id(), id) << "blank pages go first";
  const WritablePage evicted = cache.allocate();
  EXPECT_EQ(evicted.id(), id);
  EXPECT_FALSE(cache.find(hash_of(1)));
  cache.check();
}

TEST(PrefixCache, EvictsWhatWasUsedTheLongestAgo) {
  PagePool pool(3, 4);
  PrefixCache cache(pool, true);
  for (int32_t i = 0; i < 3; ++i) cache.seal(cache.allocate(), hash_of(i));
  EXPECT_EQ(pool.num_idle(), 3);
  EXPECT_TRUE(cache.find(hash_of(0)));  // used again, and given back at once
  const WritablePage a = cache.allocate();
  EXPECT_FALSE(cache.find(hash_of(1)));
  EXPECT_TRUE(cache.find(hash_of(0)));
  EXPECT_TRUE(cache.find(hash_of(2)));
  const WritablePage b = cache.allocate();
  EXPECT_FALSE(cache.find(hash_of(0)));
  EXPECT_TRUE(cache.find(hash_of(2)));
}

TEST(PrefixCache, TheSecondPageOfTheSameContentIsFreed) {
  PagePool pool(2, 4);
  PrefixCache cache(pool, true);
  WritablePage first = cache.allocate();
  WritablePage second = cache.allocate();
  const int32_t id = first.id();
  const SharedPage a = cache.seal(std::move(first), hash_of(1));
  const SharedPage b = cache.seal(std::move(second), hash_of(1));
  EXPECT_EQ(a.id(), id);
  EXPECT_EQ(b.id(), id);
  EXPECT_EQ(pool.num_blank(), 1);
  cache.check();
}

TEST(PrefixCache, ForgottenPagesAreNotFoundButStayGood) {
  PagePool pool(1, 4);
  PrefixCache cache(pool, true);
  {
    const SharedPage page = cache.seal(cache.allocate(), hash_of(1));
    cache.forget(hash_of(1));
    cache.forget(hash_of(1));
    EXPECT_FALSE(cache.find(hash_of(1)));
    EXPECT_EQ(pool.num_available(), 0);
  }
  EXPECT_EQ(pool.num_blank(), 1);
  cache.check();
}

TEST(PrefixCache, SwitchedOffItFindsNothing) {
  PagePool pool(2, 4);
  PrefixCache cache(pool, false);
  const SharedPage a = cache.seal(cache.allocate(), hash_of(1));
  const SharedPage b = cache.seal(cache.allocate(), hash_of(1));
  EXPECT_NE(a.id(), b.id());
  EXPECT_FALSE(cache.find(hash_of(1)));
  cache.check();
}

}  // namespace
}  // namespace ts
