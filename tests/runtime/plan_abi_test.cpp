// The plan part of the C ABI.

#include <gtest/gtest.h>

#include <cstring>
#include <stdexcept>

#include "abi.h"
#include "expect.h"
#include "make_plan.h"
#include "text.h"

namespace ts {
namespace {

using namespace ts::testing;  // NOLINT(google-build-using-namespace): helpers of these tests

/// Opens with any number for `verify`, as C may.
__attribute__((no_sanitize("undefined"))) ts_status open_with(int verify, const std::string &path, ts_plan **plan,
                                                              ts_error *error) {
  ts_verify mode = TS_VERIFY_AUTO;
  std::memcpy(&mode, &verify, sizeof(mode));
  return ts_plan_open(path.c_str(), mode, plan, error);
}

TEST(PlanAbi, OpensReadsAndCloses) {
  const Folder folder;
  write_file(folder / "plan.tsp", test_plan().bytes());
  ts_plan *plan = nullptr;
  ts_error error{};
  ASSERT_EQ(ts_plan_open((folder / "plan.tsp").c_str(), TS_VERIFY_ALWAYS, &plan, &error), TS_OK) << error.message;
  EXPECT_STREQ(error.message, "");
  const uint8_t *data = nullptr;
  size_t size = 0;
  ASSERT_EQ(ts_plan_entry(plan, "tsp/text/tokenizer", &data, &size), TS_OK);
  EXPECT_EQ(std::string(reinterpret_cast<const char *>(data), size), "a tokenizer");
  EXPECT_EQ(ts_plan_entry(plan, "tsp/manifest", &data, &size), TS_OK);
  EXPECT_EQ(ts_plan_entry(plan, "tsp/text/template", &data, &size), TS_BAD_REQUEST);
  EXPECT_EQ(ts_plan_entry(plan, nullptr, &data, &size), TS_BAD_REQUEST);
  ts_plan_close(plan);
  ts_plan_close(nullptr);
}

TEST(PlanAbi, AnswersWithStatusAndMessage) {
  const Folder folder;
  ts_plan *plan = nullptr;
  ts_error error{};
  EXPECT_EQ(ts_plan_open((folder / "absent").c_str(), TS_VERIFY_AUTO, &plan, &error), TS_IO);
  EXPECT_EQ(plan, nullptr);
  expect_in(error.message, {"absent': cannot open the file: No such file"});
  write_file(folder / "text", {'h', 'i'});
  EXPECT_EQ(ts_plan_open((folder / "text").c_str(), TS_VERIFY_AUTO, &plan, &error), TS_BAD_PLAN);
  expect_in(error.message, {"2 bytes"});
  EXPECT_EQ(ts_plan_open((folder / "text").c_str(), TS_VERIFY_AUTO, &plan, nullptr), TS_BAD_PLAN);
  EXPECT_EQ(open_with(5, folder / "text", &plan, &error), TS_BAD_REQUEST);
  expect_in(error.message, {"verify is 5"});
  EXPECT_EQ(ts_plan_open(nullptr, TS_VERIFY_AUTO, &plan, &error), TS_INTERNAL);
}

TEST(PlanAbi, NoExceptionCrosses) {
  ts_error error{};
  EXPECT_EQ(guarded(&error, [] { throw std::bad_alloc(); }), TS_NO_MEMORY);
  EXPECT_EQ(guarded(&error, [] { throw std::runtime_error("oh"); }), TS_INTERNAL);
  EXPECT_STREQ(error.message, "oh");
  EXPECT_EQ(guarded(&error, [] { throw 5; }), TS_INTERNAL);  // NOLINT(bugprone-std-exception-baseclass)
}

TEST(PlanAbi, MessagesEndAtACharacter) {
  ts_error error{};
  std::string message(997, 'a');
  message += "\xE2\x82\xAC and more";  // three bytes that do not fit any more
  set_error(&error, message);
  EXPECT_EQ(std::string(error.message), std::string(997, 'a'));
}

TEST(Text, QuotesForTerminals) {
  EXPECT_EQ(in_quotes("plain \xE2\x82\xAC"), "'plain \xE2\x82\xAC'");
  EXPECT_EQ(in_quotes("a\n\x1B\x7F"), "'a\\x0a\\x1b\\x7f'");
  EXPECT_EQ(in_quotes("\xFF\xC0\xAF\xED\xA0\x80\xE2\x82"), R"('\xff\xc0\xaf\xed\xa0\x80\xe2\x82')");
  const std::string shortened = in_quotes(std::string(5000, 'x') + "end");
  EXPECT_LT(shortened.size(), 150U);
  expect_in(shortened, {"...", "end'"});
  EXPECT_EQ(human_bytes(1023), "1023 bytes");
  EXPECT_EQ(human_bytes(1536), "1.5 KiB");
  EXPECT_EQ(human_bytes(uint64_t{3} << 40), "3.0 TiB");
}

}  // namespace
}  // namespace ts
