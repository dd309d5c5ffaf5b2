#include "plan.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <thread>

#include "expect.h"
#include "make_plan.h"

namespace ts {
namespace {

using namespace ts::testing;  // NOLINT(google-build-using-namespace): helpers of these tests

std::string refused(const Bytes &bytes) {
  return refusal([&] { Plan::from_memory(bytes); });
}

/// Refused with whatever message by the checks of opening or by the weights' hashes.
bool refused_in_all(std::span<const uint8_t> bytes) {
  try {
    Plan::from_memory(bytes)->verify_weights();
  } catch (const Error &e) {
    return e.status() == TS_BAD_PLAN && *e.what() != '\0';
  }
  return false;
}

uint64_t data_begin(const Bytes &file) { return 8 + file[0] + 256U * file[1] + 65536U * file[2]; }

TEST(Plan, OpensAWholeOne) {
  const TestPlan parts = test_plan();
  const Folder folder;
  write_file(folder / "plan.tsp", parts.bytes());
  const auto plan = Plan::open(folder / "plan.tsp", TS_VERIFY_ALWAYS);
  plan->verify_weights();
  EXPECT_EQ(plan->targets(), std::vector<std::string>{"cpu-avx2"});
  EXPECT_EQ(plan->model().name, "test");
  EXPECT_EQ(plan->model().vocab_size, 50);
  EXPECT_EQ(plan->model().max_context, 128);
  EXPECT_EQ(plan->model().eos_token_ids, std::vector<int32_t>{1});
  const Entry *table = plan->find("table");
  ASSERT_NE(table, nullptr);
  EXPECT_EQ(table->dtype, "F32");
  EXPECT_TRUE(std::ranges::equal(table->bytes, as_bytes(parts.weights.at("table").bytes)));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(table->bytes.data()) % 64, 0U);
  const Entry *tokenizer = plan->find("tsp/text/tokenizer");
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_EQ(tokenizer->dtype, "U8");
  EXPECT_TRUE(std::ranges::equal(tokenizer->bytes, as_bytes("a tokenizer")));
  EXPECT_NE(plan->find("tsp/manifest"), nullptr);
  EXPECT_EQ(plan->find("tsp/text/template"), nullptr);
}

TEST(Plan, OpensWhenItIsLargerThanAPage) {
  TestPlan parts = test_plan();
  parts.weights["big"] = {"BF16", {1000, 64}, std::string(128'000, 'w')};
  parts.weights["small"] = {"F4", {64, 2}, std::string(64, 'v')};
  parts.reserved["tsp/text/tokenizer"] = std::string(50'000, 't');
  const Folder folder;
  write_file(folder / "plan.tsp", parts.bytes());
  const auto plan = Plan::open(folder / "plan.tsp", TS_VERIFY_ALWAYS);
  plan->verify_weights();
  EXPECT_TRUE(
      std::ranges::equal(plan->find("tsp/text/tokenizer")->bytes, as_bytes(parts.reserved.at("tsp/text/tokenizer"))));
  EXPECT_TRUE(std::ranges::equal(plan->find("small")->bytes, as_bytes(parts.weights.at("small").bytes)));
}

// ---- damage: nothing that is cut or flipped passes ----

TEST(Plan, RefusesEveryTruncation) {
  for (const TestPlan &plan : {test_plan(), test_plan_of_ranks(tp(2))}) {
    const Bytes whole = plan.bytes();
    for (size_t length = 0; length < whole.size(); ++length) {
      // Copied, so that a read beyond the end is found by the address sanitizer.
      const Bytes cut(whole.begin(), whole.begin() + static_cast<ptrdiff_t>(length));
      ASSERT_TRUE(refused_in_all(cut)) << length << " of " << whole.size();
    }
  }
  const Bytes whole = test_plan().bytes();
  Bytes longer = whole;
  longer.push_back(0);
  expect_in(refused(longer), {"data ends at byte", "the file at"});
}

TEST(Plan, RefusesEveryFlippedByte) {
  for (const TestPlan &plan : {test_plan(), test_plan_of_ranks(tp(2))}) {
    Bytes bytes = plan.bytes();
    ASSERT_FALSE(refused_in_all(bytes));
    for (size_t i = 0; i < bytes.size(); ++i) {
      const auto flip = static_cast<uint8_t>(1 << i % 8);
      bytes[i] ^= flip;
      ASSERT_TRUE(refused_in_all(bytes)) << "byte " << i << " of " << bytes.size() << " ^ " << int{flip};
      bytes[i] ^= flip;
    }
  }
}

TEST(Plan, RefusesDamagedFiles) {
  const Folder folder;
  const std::string path = folder / "plan.tsp";
  const Bytes whole = test_plan().bytes();
  const auto open_all = [&] { Plan::open(path, TS_VERIFY_ALWAYS)->verify_weights(); };
  for (size_t i = 0; i < whole.size(); i += 13) {
    Bytes bytes = whole;
    bytes[i] ^= 0x10;
    write_file(path, bytes);
    expect_in(refusal(open_all), {"plan.tsp': "});
    bytes = whole;
    bytes.resize(i);
    write_file(path, bytes);
    expect_in(refusal(open_all), {"plan.tsp': "});
  }
}

TEST(Plan, SaysWhereTheDamageIs) {
  const Bytes whole = test_plan().bytes();
  const auto flipped = [&](size_t i) {
    Bytes bytes = whole;
    bytes[i] ^= 1;
    return refusal([&] { Plan::from_memory(bytes)->verify_weights(); });
  };
  expect_in(flipped(data_begin(whole) + 5), {"entry 'table' is damaged: its SHA-256 is ", "the manifest says "});
  expect_in(flipped(data_begin(whole) + 3200), {"entry 'tsp/graph' is damaged"});
  expect_in(flipped(whole.size() - 1), {"header or manifest is damaged", "the seal says"});
  expect_in(flipped(whole.size() - 40), {"header or manifest is damaged"});
  expect_in(flipped(3), {"header length is", "cut short"});
  expect_in(flipped(7), {"header length is", "this is no plan"});
}

// ---- files that are none ----

TEST(Plan, RefusesWhatIsNoFile) {
  const Folder folder;
  expect_in(refusal([&] { Plan::open(folder / "absent", TS_VERIFY_AUTO); }, TS_IO),
            {"absent': cannot open", "No such file"});
  expect_in(refusal([&] { Plan::open(folder / "", TS_VERIFY_AUTO); }), {"not a regular file"});
  expect_in(refusal([&] { Plan::open("/dev/zero", TS_VERIFY_AUTO); }), {"not a regular file"});
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  expect_in(refusal([&] { Plan::open(folder / "pipe", TS_VERIFY_AUTO); }),
            {"not a regular file"});  // and does not wait
  write_file(folder / "empty", {});
  expect_in(refusal([&] { Plan::open(folder / "empty", TS_VERIFY_AUTO); }), {"empty"});
}

TEST(Plan, SparseBombsCostNothing) {
  constexpr uint64_t kBomb = uint64_t{256} << 30;  // bytes; the thread sanitizer leaves no room for a TiB
  const Folder folder;
  const std::string path = folder / "bomb";
  const auto bomb = [&](const Bytes &head) {
    write_file(path, head);
    std::filesystem::resize_file(path, kBomb);
    return refusal([&] { Plan::open(path, TS_VERIFY_ALWAYS); });
  };
  expect_in(bomb({}), {"data begins at byte 8"});
  expect_in(bomb({0xF8, 0xE0, 0xF5, 0x05, 0, 0, 0, 0}), {"NUL byte at 0"});  // after a header of 99,999,992
  expect_in(bomb({0xFF, 0xFF, 0xFF, 0xFF, 0x7F}), {"header length is", "at most"});
  const uint64_t size = kBomb - 192;  // a reserved entry of nearly all of it
  const Json header = {{"__metadata__", {{"format", "tsp"}, {"tsp_schema", "3"}}},
                       {"tsp/x", {{"dtype", "U8"}, {"shape", {size}}, {"data_offsets", {0, size}}}}};
  ASSERT_EQ(raw_file(header.dump(), "").size(), 192U);
  expect_in(bomb(raw_file(header.dump(), "")), {"the entries beside the weights are", "at most"});
}

// A file written to after it was opened: what was checked stays as it was, and weights are refused.
TEST(Plan, KeepsWhatItChecked) {
  const Folder folder;
  const std::string path = folder / "plan.tsp";
  const Bytes whole = test_plan().bytes();
  write_file(path, whole);
  const auto plan = Plan::open(path, TS_VERIFY_ALWAYS);
  const auto overwrite = [&](std::string_view bytes) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // the clock of file times ticks
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  };
  overwrite(std::string(whole.size(), 'x'));
  EXPECT_TRUE(std::ranges::equal(plan->find("tsp/text/tokenizer")->bytes, as_bytes("a tokenizer")));
  expect_in(refusal([&] { plan->verify_weights(); }), {"plan.tsp': "});
  overwrite({reinterpret_cast<const char *>(whole.data()),
             whole.size()});  // as it was; but who knows what was read meanwhile
  expect_in(refusal([&] { plan->verify_weights(); }), {"was written to while it was read"});
}

}  // namespace
}  // namespace ts
