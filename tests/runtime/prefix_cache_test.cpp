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
    cache.forget(found[30]);
  }
  EXPECT_EQ(cache.find_prefix(hashes).size(), 30) << "up to the first that is missing";
  EXPECT_TRUE(cache.find_prefix({}).empty());
  EXPECT_TRUE(cache.find_prefix(std::vector{hash_of(99)}).empty());
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
    cache.forget(page);
    cache.forget(page);
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
