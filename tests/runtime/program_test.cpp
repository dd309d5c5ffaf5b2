#include "program.h"

#include <gtest/gtest.h>

#include "expect.h"
#include "make_plan.h"

namespace ts {
namespace {

using namespace ts::testing;  // NOLINT(google-build-using-namespace): helpers of these tests

Program parse(const TestPlan &parts, int32_t rank = 0) {
  const Bytes bytes = parts.bytes();
  return parse_program(*Plan::from_memory(bytes), "cpu-avx2", rank);
}

/// The message for a program that is right but for `edit`.
std::string edited(const std::function<void(Json &)> &edit) {
  TestPlan parts = test_plan();
  parts.edit_program("cpu-avx2", edit);
  return refusal([&] { parse(parts); });
}

TEST(Program, IsRead) {
  const Program program = parse(test_plan());
  EXPECT_EQ(program.target, "cpu-avx2");
  EXPECT_EQ(program.limits.max_tokens, kMaxTokens);
  EXPECT_EQ(program.limits.max_seqs, kMaxSeqs);
  EXPECT_EQ(program.num_layers, 2);
  EXPECT_EQ(program.page_bytes, uint64_t{kPageSize} * kWidth * 4);
  ASSERT_EQ(program.buffers.size(), 4U);
  EXPECT_EQ(program.buffers[3].name, "logits");
  EXPECT_EQ(program.buffers[1].offset, uint64_t{kMaxTokens} * kWidth * 4);
  ASSERT_EQ(program.buckets[0].launches.size(), 8U);
  EXPECT_EQ(program.buckets[0].launches[0].kernel, "test_embed");
  EXPECT_EQ(program.buckets[0].launches[0].op, "op.test_embed");
  EXPECT_EQ(program.buckets[0].launches[0].arguments[0].kind, Argument::Kind::weight);
  EXPECT_NE(program.buckets[0].launches[0].arguments[0].weight, nullptr);
  EXPECT_EQ(program.buckets[0].launches[6].arguments[0].kind, Argument::Kind::kv);
  EXPECT_EQ(program.buckets[0].launches[6].arguments[0].index, 1);
  EXPECT_EQ(program.buckets[0].launches[6].arguments[1].index, 1);
  EXPECT_EQ(program.buckets[0].logits_buffer, 3);
  EXPECT_EQ(program.buckets[0].logits_stride, kLogitsStride);
}

TEST(Program, IsOfThisAbiAndTarget) {
  expect_in(edited([](Json &p) { p["abi"] = 3; }),
            {"tsp/program/cpu-avx2.abi is 3, this tsruntime has 2: update tsruntime"});
  expect_in(edited([](Json &p) { p["abi"] = 0; }),
            {".abi is 0, this tsruntime has 2: rebuild the plan with this tscompile"});
  expect_in(edited([](Json &p) { p["abi"] = "1"; }), {".abi is '\"1\"', wanted an integer"});
  expect_in(edited([](Json &p) { p["target"] = "cpu-amx"; }), {".target is 'cpu-amx', wanted 'cpu-avx2'"});
  expect_in(edited([](Json &p) { p = Json::array(); }), {"is an array, wanted an object"});
  expect_in(edited([](Json &p) { p["more"] = 1; }), {"unknown key 'more'"});
  for (const char *key : {"arena_bytes", "buffers", "buckets", "kv", "limits", "target"}) {
    expect_in(edited([&](Json &p) { p.erase(key); }), {"lacks the key", key});
  }
  TestPlan spaced = test_plan();
  spaced.reserved["tsp/program/cpu-avx2"] += ' ';
  expect_in(refusal([&] { parse(spaced); }), {"tsp/program/cpu-avx2 is not canonical JSON"});
  const Bytes bytes = test_plan().bytes();
  expect_in(refusal([&] { parse_program(*Plan::from_memory(bytes), "cpu-amx"); }), {"lacks 'tsp/program/cpu-amx'"});
}

TEST(Program, HasSaneLimits) {
  const auto limit = [](const char *key, const Json &value) {
    return edited([&](Json &p) { p["limits"][key] = value; });
  };
  expect_in(limit("max_tokens", 0), {"limits.max_tokens is '0', wanted an integer from 1"});
  expect_in(limit("max_tokens", int64_t{1} << 40), {"limits.max_tokens"});
  expect_in(limit("max_tokens", 24.5), {"limits.max_tokens is '24.5'"});
  expect_in(limit("max_seqs", kMaxTokens + 1), {"limits.max_seqs is '25', wanted an integer from 1 to 24"});
  expect_in(limit("max_context", 129), {"limits.max_context is '129', wanted an integer from 1 to 128"});
  expect_in(limit("page_size", 48), {"limits.page_size is 48, wanted a multiple of 32"});
  expect_in(limit("page_size", 0), {"limits.page_size is '0'"});
  expect_in(limit("vocab_size", 51), {"limits.vocab_size is 51, the manifest's model has 50"});
  expect_in(limit("more", 1), {"unknown key 'more'"});
}

TEST(Program, KeepsBuffersInTheArena) {
  const auto buffer = [](const char *key, const Json &value) {
    return edited([&](Json &p) { p["buffers"][3][key] = value; });
  };
  expect_in(buffer("offset", 4672), {"buffers[3] ('logits') ends at byte 5696 of an arena of 5632"});
  expect_in(buffer("bytes", int64_t{1} << 46), {"ends at byte", "of an arena of 5632"});
  expect_in(buffer("bytes", INT64_MAX), {"buffers[3].bytes"});
  expect_in(buffer("bytes", 0), {"buffers[3].bytes is '0'"});
  expect_in(buffer("offset", -64), {"buffers[3].offset is '-64'"});
  expect_in(buffer("offset", 4609), {"buffers[3].offset is 4609, wanted a multiple of 64"});
  expect_in(buffer("offset", UINT64_MAX - 63), {"buffers[3].offset"});
  expect_in(edited([](Json &p) { p["arena_bytes"] = 5633; }), {"arena_bytes is 5633, wanted a multiple of 64"});
  expect_in(edited([](Json &p) { p["arena_bytes"] = 0; }), {"arena_bytes is '0'"});
  expect_in(edited([](Json &p) { p["buffers"] = Json::array(); }), {"buffers has 0 items"});
}

TEST(Program, ChecksArguments) {
  const auto argument = [](const Json &value) {
    return edited([&](Json &p) { p["buckets"][0]["launches"][0]["args"][0] = value; });
  };
  expect_in(argument({{"buffer", 4}}), {"buckets[0].launches[0].args[0].buffer is '4', wanted an integer from 0 to 3"});
  expect_in(argument({{"buffer", -1}}), {"args[0].buffer is '-1'"});
  expect_in(argument({{"kv", 2}}), {"buckets[0].launches[0].args[0].kv is '2', wanted an integer from 0 to 1"});
  expect_in(argument({{"weight", "absent"}, {"bytes", 64}}),
            {"buckets[0].launches[0].args[0] names the weight 'absent', which the plan lacks"});
  expect_in(argument({{"weight", "tsp/graph"}, {"bytes", 7}}), {"names the weight 'tsp/graph', which the plan lacks"});
  expect_in(argument({{"weight", "table"}, {"bytes", 3136}}), {"args[0].bytes is 3136, the weight 'table' has 3200"});
  expect_in(argument({{"weight", "table"}}), {"args[0] lacks the key 'bytes'"});
  expect_in(argument({{"buffer", 0}, {"kv", 0}}), {"args[0] has an unknown key 'kv'"});
  expect_in(argument(Json::object()), {"args[0] lacks the key"});
  expect_in(argument(7), {"args[0] is '7', wanted an object"});
  expect_in(edited([](Json &p) { p["buckets"][0]["launches"][0]["args"] = Json(65, {{"buffer", 0}}); }),
            {"args has 65 items, wanted 0 to 64"});
}

TEST(Program, ChecksLaunches) {
  const auto kernel = [](const std::string &name) {
    return edited([&](Json &p) { p["buckets"][0]["launches"][1]["kernel"] = name; });
  };
  for (const char *name : {"", "9lives", "a-b", "a b", "a\nb", "über", "a.b"}) {
    expect_in(kernel(name), {"buckets[0].launches[1].kernel is", "wanted a C identifier"});
  }
  expect_in(kernel(std::string(201, 'k')), {"wanted a C identifier"});
  expect_in(edited([](Json &p) { p["buckets"][0]["launches"] = Json::array(); }), {"buckets[0].launches has 0 items"});
  expect_in(edited([](Json &p) { p["buckets"][0]["launches"][1].erase("op"); }),
            {"buckets[0].launches[1] lacks the key 'op'"});
}

TEST(Program, RefusesBucketsThatDoNotCoverTheSteps) {
  const auto buckets = [](const std::vector<int> &tokens) {
    return edited([&](Json &p) {
      const Json one = p["buckets"][0];
      p["buckets"] = Json::array();
      for (const int most : tokens) {
        p["buckets"].push_back(one);
        p["buckets"].back()["max_tokens"] = most;
      }
    });
  };
  expect_in(buckets({}), {"buckets has 0 items"});
  expect_in(buckets({8}), {"buckets[0].max_tokens is 8, the limits have 24"});
  expect_in(buckets({8, 8, 24}), {"buckets[1].max_tokens is '8', wanted an integer from 9 to 24"});
  expect_in(buckets({0, 24}), {"buckets[0].max_tokens is '0', wanted an integer from 1 to 24"});
  expect_in(buckets({25}), {"buckets[0].max_tokens is '25', wanted an integer from 1 to 24"});
}

TEST(Program, OfFewTokensNeedsLessRoom) {
  const std::string many = edited([](Json &p) {
    Json few = p["buckets"][0];
    few["max_tokens"] = 2;
    p["buffers"][3]["bytes"] = 2 * kLogitsStride * 4;
    p["buckets"].insert(p["buckets"].begin(), few);
  });
  expect_in(many, {"buckets[1].logits.buffer ('logits') has 512 bytes, but 4 rows of 64 f32 take 1024"});
}

TEST(Program, RefusesOverlapWithinALaunch) {
  expect_in(edited([](Json &p) { p["buffers"][1]["offset"] = 64; }),
            {"buckets[0].launches[1]: buffers 0 and 1 overlap: bytes 0 to 1536 and 64 to 1600 of the arena"});
  TestPlan in_place = test_plan();
  in_place.edit_program("cpu-avx2", [](Json &p) { p["buffers"][1]["offset"] = 0; });
  EXPECT_NO_THROW(parse(in_place));
}

TEST(Program, ChecksCacheAndLogits) {
  expect_in(edited([](Json &p) { p["kv"]["layers"] = Json::array(); }), {"kv.layers has 0 items, wanted 1 to 1024"});
  expect_in(edited([](Json &p) { p["kv"]["layers"] = {0}; }), {"args[1].kv is '1', wanted an integer from 0 to 0"});
  expect_in(edited([](Json &p) { p["kv"]["layers"] = {0, 1}; }),
            {"kv.layers[1] is '1', wanted an integer from 0 to 0"});
  expect_in(edited([](Json &p) { p["kv"]["groups"][1] = {{"kind", "recurrent"}}; }), {"kv.groups[1] has no layers"});
  expect_in(edited([](Json &p) { p["kv"]["groups"][0]["kind"] = "half"; }),
            {"groups[0].kind is 'half', wanted one of full, window, recurrent"});
  expect_in(edited([](Json &p) { p["kv"]["groups"][0]["kind"] = "window"; }), {"kv.groups[0]", "window"});
  expect_in(edited([](Json &p) { p["kv"]["groups"][0] = {{"kind", "window"}, {"window", 0}}; }),
            {"groups[0].window is '0', wanted an integer from 1"});
  expect_in(edited([](Json &p) {
              p["kv"] = {{"groups", {{{"kind", "full"}}, {{"kind", "window"}, {"window", 9}}}},
                         {"layers", {0, 1}},
                         {"page_bytes", p["kv"]["page_bytes"]}};
              p["buckets"][0]["launches"][3]["args"].push_back({{"kv", 1}});
            }),
            {"launches[3] takes caches of the groups 0 and 1, wanted one"});
  expect_in(edited([](Json &p) { p["kv"]["page_bytes"] = 2049; }), {"kv.page_bytes is 2049, wanted a multiple of 64"});
  expect_in(edited([](Json &p) { p["kv"]["page_bytes"] = int64_t{1} << 62; }), {"kv.page_bytes"});
  expect_in(edited([](Json &p) { p["buckets"][0]["logits"]["buffer"] = 4; }), {"logits.buffer is '4'"});
  expect_in(edited([](Json &p) { p["buckets"][0]["logits"]["stride"] = 49; }),
            {"logits.stride is '49', wanted an integer from 50"});
  expect_in(edited([](Json &p) { p["buckets"][0]["logits"]["stride"] = 65; }),
            {"logits.buffer ('logits') has 1024 bytes, but 4 rows of 65 f32 take 1040"});
}

}  // namespace
}  // namespace ts
