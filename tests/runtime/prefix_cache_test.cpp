#include "prefix_cache.h"

#include <gtest/gtest.h>

#include <cstring>
#include <optional>
#include <vector>

#include "sha256.h"

namespace ts {
namespace {

PageHash hash_of(int32_t n) { return page_hash(kRootHash, std::vector<int32_t>{n}); }

TEST(PageHash, IsTheHeadOfSha256OverParentAndTokens) {
  const PageHash parent = hash_of(1);
  const std::vector<int32_t> tokens = {1, -2, 151935, 0};
  std::vector<uint8_t> bytes(sizeof(parent) + 16);
  std::memcpy(bytes.data(), &parent, sizeof(parent));
  std::memcpy(bytes.data() + sizeof(parent), tokens.data(), 16);
  const Digest digest = sha256(bytes);
  const PageHash hash = page_hash(parent, tokens);
  EXPECT_EQ(std::memcmp(&hash, digest.data(), sizeof(hash)), 0);
}

TEST(PageHash, DependsOnEveryTokenTheirOrderAndTheParent) {
  const PageHash hash = page_hash(kRootHash, std::vector<int32_t>{1, 2, 3});
  EXPECT_NE(hash, page_hash(kRootHash, std::vector<int32_t>{1, 2, 4}));
  EXPECT_NE(hash, page_hash(kRootHash, std::vector<int32_t>{2, 1, 3}));
  EXPECT_NE(hash, page_hash(hash, std::vector<int32_t>{1, 2, 3}));
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
