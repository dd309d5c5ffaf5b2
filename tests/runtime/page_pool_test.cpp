#include "page_pool.h"

#include <gtest/gtest.h>

#include <array>
#include <optional>
#include <random>
#include <type_traits>
#include <vector>

#include "prefix_cache.h"

namespace ts {
namespace {

PageHash hash_of(int32_t n) {
  PageHash hash;
  page_hasher().pages({}, std::array{n}, 1, {&hash, 1});
  return hash;
}

static_assert(!std::is_copy_constructible_v<WritablePage> && !std::is_copy_assignable_v<WritablePage>);
static_assert(!std::is_copy_constructible_v<SharedPage> && !std::is_copy_assignable_v<SharedPage>);
static_assert(!std::is_default_constructible_v<WritablePage> && !std::is_default_constructible_v<SharedPage>);
static_assert(!std::is_constructible_v<WritablePage, PagePool *, int32_t> &&
              !std::is_constructible_v<SharedPage, PagePool *, int32_t>);
static_assert(!std::is_constructible_v<Slot, int32_t>);

TEST(PagePool, GivesEveryPageOnceAndTakesItBack) {
  PagePool pool(3, 4);
  PrefixCache cache(pool, true);
  {
    const WritablePage a = cache.allocate();
    const WritablePage b = cache.allocate();
    const WritablePage c = cache.allocate();
    EXPECT_EQ(a.id() + b.id() + c.id(), 0 + 1 + 2);
    EXPECT_NE(a.id(), b.id());
    EXPECT_EQ(pool.num_available(), 0);
    EXPECT_EQ(b.slot(3).value(), b.id() * 4 + 3);
    cache.check();
  }
  EXPECT_EQ(pool.num_blank(), 3);
}

TEST(PagePool, MovedPagesHaveOneOwner) {
  PagePool pool(2, 4);
  PrefixCache cache(pool, false);
  WritablePage a = cache.allocate();
  WritablePage b = cache.allocate();
  const int32_t id = a.id();
  b = std::move(a);  // what b held is given back
  EXPECT_EQ(b.id(), id);
  EXPECT_EQ(pool.num_blank(), 1);
  WritablePage &same = b;
  b = std::move(same);
  EXPECT_EQ(b.id(), id);
}

TEST(PagePool, ASharedPageIsFreeAfterItsLastReference) {
  PagePool pool(1, 4);
  PrefixCache cache(pool, false);
  {
    std::optional<SharedPage> a = cache.seal(cache.allocate(), hash_of(0));
    std::optional<SharedPage> b = a->share();
    EXPECT_EQ(a->id(), b->id());
    a.reset();
    EXPECT_EQ(pool.num_available(), 0);
    b.reset();
    EXPECT_EQ(pool.num_blank(), 1) << "without a prefix cache nothing is idle";
  }
  cache.check();
}

using PagePoolDeathTest = testing::Test;

TEST(PagePoolDeathTest, MisuseThatCompilesIsCaught) {
  PagePool pool(2, 4);
  PrefixCache cache(pool, true);
  EXPECT_DEATH(
      {
        WritablePage a = cache.allocate();
        const WritablePage b = std::move(a);
        a.id();  // NOLINT(bugprone-use-after-move)
      },
      "used after it was moved from");
  EXPECT_DEATH(
      {
        WritablePage a = cache.allocate();
        const SharedPage sealed = cache.seal(std::move(a), hash_of(1));
        const SharedPage again = cache.seal(std::move(a), hash_of(2));  // NOLINT(bugprone-use-after-move)
      },
      "moved from|or twice");
  EXPECT_DEATH(
      {
        const WritablePage a = cache.allocate();
        a.slot(4);
      },
      "a slot lies outside its page");
  EXPECT_DEATH(
      {
        const WritablePage a = cache.allocate();
        const WritablePage b = cache.allocate();
        cache.allocate();
      },
      "none is available");
  EXPECT_DEATH(
      {
        std::optional<WritablePage> page;
        PagePool short_lived(1, 4);
        PrefixCache of_it(short_lived, true);
        page.emplace(of_it.allocate());
      },
      "a page outlived its pool");
}

/// Random use against a plain model: which pages are held, and in which order the idle ones were last used.
TEST(PagePool, RandomUseKeepsEveryInvariant) {
  std::mt19937 random(7);
  PagePool pool(13, 4);
  PrefixCache cache(pool, true);
  std::vector<WritablePage> writable;
  std::vector<SharedPage> shared;
  for (int i = 0; i < 20000; ++i) {
    const uint32_t what = random() % 6;
    if (what <= 1 && pool.num_available() > 0) {
      writable.push_back(cache.allocate());
    } else if (what == 2 && !writable.empty()) {
      shared.push_back(cache.seal(std::move(writable.back()), hash_of(static_cast<int32_t>(random() % 24))));
      writable.pop_back();
    } else if (what == 3 && !shared.empty()) {
      std::swap(shared[random() % shared.size()], shared.back());
      shared.pop_back();
    } else if (what == 4) {
      if (auto found = cache.find(hash_of(static_cast<int32_t>(random() % 24)))) shared.push_back(std::move(*found));
    } else if (what == 5 && !shared.empty()) {
      if (random() % 4 == 0) cache.forget(hash_of(static_cast<int32_t>(random() % 24)));
      if (random() % 4 == 0 && !writable.empty()) writable.pop_back();
      shared.push_back(shared[random() % shared.size()].share());
    }
    cache.check();
    ASSERT_LE(static_cast<int32_t>(writable.size()), pool.num_pages() - pool.num_available());
  }
}

}  // namespace
}  // namespace ts
