#include "sha256.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "make_plan.h"

namespace ts {
namespace {

using testing::as_bytes;

std::string hex(std::span<const uint8_t> bytes, Sha256::Path path) {
  Sha256 hash(path);
  hash.update(bytes);
  return to_hex(hash.finish());
}

class Sha256Paths : public ::testing::TestWithParam<Sha256::Path> {};
INSTANTIATE_TEST_SUITE_P(All, Sha256Paths, ::testing::Values(Sha256::Path::best, Sha256::Path::portable));

// FIPS 180-4 examples and NIST's CAVP short messages.
TEST_P(Sha256Paths, AgreesWithNist) {
  const std::pair<std::string, const char *> vectors[] = {
      {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
      {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
      {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
       "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
      {"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrst"
       "u",
       "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"},
      {"\xd3", "28969cdfa74a12c82f3bad960b0b000aca2ac329deea5c2328ebc6f2ba9802c1"},
      {"\x11\xaf", "5ca7133fa735326081558ac312c620eeca9970d1e70a4b95533d956f072d1f98"},
      {std::string(1'000'000, 'a'), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"}};
  for (const auto &[text, wanted] : vectors) EXPECT_EQ(hex(as_bytes(text), GetParam()), wanted) << text.size();
}

TEST_P(Sha256Paths, PiecesMakeTheWhole) {
  std::mt19937 random(7);
  std::vector<uint8_t> bytes(5000);
  for (uint8_t &byte : bytes) byte = static_cast<uint8_t>(random());
  const std::string wanted = hex(bytes, Sha256::Path::portable);
  for (int round = 0; round < 200; ++round) {
    Sha256 hash(GetParam());
    for (std::span<const uint8_t> rest = bytes; !rest.empty();) {
      const size_t take = std::min<size_t>(rest.size(), random() % 200);
      hash.update(rest.first(take));
      rest = rest.subspan(take);
    }
    ASSERT_EQ(to_hex(hash.finish()), wanted) << round;
  }
}

// Lengths around every edge of a block, against Python's hashlib.
TEST(Sha256, AgreesWithPython) {
  const std::string command =
      std::string(TS_TEST_PYTHON) +
      " -c \"import hashlib\nfor n in range(300): print(hashlib.sha256(bytes(i * 37 % 251 for i in "
      "range(n))).hexdigest())\"";
  FILE *pipe = popen(command.c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  char line[80];
  std::vector<uint8_t> bytes;
  size_t length = 0;
  for (; fgets(line, sizeof(line), pipe) != nullptr; ++length) {
    const std::string wanted(line, 64);
    ASSERT_EQ(hex(bytes, Sha256::Path::best), wanted) << length;
    ASSERT_EQ(hex(bytes, Sha256::Path::portable), wanted) << length;
    bytes.push_back(static_cast<uint8_t>(length * 37 % 251));
  }
  EXPECT_EQ(pclose(pipe), 0);
  EXPECT_EQ(length, 300U);
}

TEST(Sha256, HexGoesBothWays) {
  const Digest digest = sha256(as_bytes("abc"));
  EXPECT_EQ(from_hex(to_hex(digest)), digest);
  const std::string good = to_hex(digest);
  EXPECT_EQ(from_hex(good.substr(1)), std::nullopt);
  EXPECT_EQ(from_hex(good + "0"), std::nullopt);
  EXPECT_EQ(from_hex("BA" + good.substr(2)), std::nullopt);  // one spelling
  EXPECT_EQ(from_hex("g" + good.substr(1)), std::nullopt);
}

}  // namespace
}  // namespace ts
