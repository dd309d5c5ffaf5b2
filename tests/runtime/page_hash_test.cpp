#include "page_hash.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

namespace ts {
namespace {

using Path = PageHasher::Path;
constexpr std::array kPaths = {Path::best, Path::narrow, Path::portable};

PageHash bytes16(std::array<uint8_t, 16> bytes) {
  PageHash hash;
  std::memcpy(static_cast<void *>(&hash), bytes.data(), sizeof(hash));
  return hash;
}

const PageHash kKey =
    bytes16({0x25, 0x62, 0x93, 0x47, 0x58, 0x92, 0x42, 0x76, 0x1d, 0x31, 0xf8, 0x26, 0xba, 0x4b, 0x75, 0x7b});

std::vector<PageHash> hashes_of(const PageHasher &hasher, const PageHash &parent, const std::vector<int32_t> &tokens,
                                int32_t page_size) {
  std::vector<PageHash> hashes(tokens.size() / static_cast<size_t>(page_size));
  hasher.pages(parent, tokens, page_size, hashes);
  return hashes;
}

std::vector<int32_t> many_tokens(size_t n) {
  std::vector<int32_t> tokens(n);
  std::iota(tokens.begin(), tokens.end(), 151'000);
  return tokens;
}

TEST(PageHasher, IsPolyvalAsRfc8452HasIt) {
  const std::array<uint8_t, 32> text = {0x4f, 0x4f, 0x95, 0x66, 0x8c, 0x83, 0xdf, 0xb6, 0x40, 0x17, 0x62,
                                        0xbb, 0x2d, 0x01, 0xa2, 0x62, 0xd1, 0xa2, 0x4d, 0xdd, 0x27, 0x21,
                                        0xd0, 0x06, 0xbb, 0xe4, 0x5f, 0x20, 0xd3, 0xc9, 0xf3, 0x62};
  const PageHash result =
      bytes16({0xf7, 0xa3, 0xb4, 0x7b, 0x84, 0x61, 0x19, 0xfa, 0xe5, 0xb7, 0x86, 0x6c, 0xf5, 0xe5, 0xb7, 0x7e});
  std::vector<int32_t> tokens(8);
  std::memcpy(tokens.data(), text.data(), text.size());
  for (const Path path : kPaths) {
    const PageHasher hasher(kKey, path);
    EXPECT_EQ(hashes_of(hasher, {}, tokens, 8).back(), result) << "appendix A, the example of section 7";
    EXPECT_EQ(hashes_of(hasher, {}, tokens, 4).back(), result) << "chaining by page changes nothing";
  }
}

TEST(PageHasher, EveryPathGivesTheSame) {
  const PageHasher portable(kKey, Path::portable);
  for (const int32_t page_size : {1, 2, 3, 4, 5, 16, 20, 32, 48, 64, 67, 96, 128, 256, 300}) {
    const std::vector<int32_t> tokens = many_tokens(static_cast<size_t>(3 * page_size));
    const std::vector<PageHash> wanted = hashes_of(portable, {1, 2}, tokens, page_size);
    for (const Path path : kPaths) {
      EXPECT_EQ(hashes_of(PageHasher(kKey, path), {1, 2}, tokens, page_size), wanted) << page_size;
    }
  }
}

TEST(PageHasher, DependsOnEveryTokenOnTheParentAndOnTheKey) {
  const PageHasher hasher(kKey);
  const std::vector<int32_t> tokens = many_tokens(64);
  std::set<std::pair<uint64_t, uint64_t>> seen;
  const auto is_new = [&](const PageHash &hash) { return seen.emplace(hash.head, hash.tail).second; };
  EXPECT_TRUE(is_new(hashes_of(hasher, {}, tokens, 64)[0]));
  for (size_t i = 0; i < tokens.size(); ++i) {
    std::vector<int32_t> other = tokens;
    other[i] ^= 1;
    EXPECT_TRUE(is_new(hashes_of(hasher, {}, other, 64)[0])) << i;
    if (i == 0) continue;
    other = tokens;
    std::swap(other[0], other[i]);
    EXPECT_TRUE(is_new(hashes_of(hasher, {}, other, 64)[0])) << i;
  }
  EXPECT_TRUE(is_new(hashes_of(hasher, hasher.root(""), tokens, 64)[0]));
  EXPECT_TRUE(is_new(hashes_of(PageHasher({1, 0}), {}, tokens, 64)[0]));
}

TEST(PageHasher, TextsOfZerosDifferByTheirLength) {
  const PageHasher hasher(kKey);
  const std::vector<PageHash> hashes = hashes_of(hasher, hasher.root(""), std::vector<int32_t>(640), 64);
  std::set<std::pair<uint64_t, uint64_t>> seen;
  for (const PageHash &hash : hashes) EXPECT_TRUE(seen.emplace(hash.head, hash.tail).second);
}

TEST(PageHasher, SaltsDoNotShareARoot) {
  const PageHasher hasher(kKey);
  EXPECT_NE(hasher.root(""), PageHash{});
  EXPECT_NE(hasher.root(""), hasher.root("a"));
  EXPECT_NE(hasher.root("a"), hasher.root("b"));
  EXPECT_EQ(hasher.root("a"), hasher.root("a"));
}

TEST(PageHasher, EachIsKeyedAnew) { EXPECT_NE(page_hasher().root(""), PageHasher(kKey).root("")); }

}  // namespace
}  // namespace ts
