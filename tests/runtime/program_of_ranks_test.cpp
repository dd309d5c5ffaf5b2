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

const Json kMesh = Json::array({Json::array({"ep", 2}), Json::array({"tp", 4})});

/// The message for a program of several ranks that is right but for `edit`. Its launches: an embedding of a sharded table, all_reduce over
/// ep, and over tp, a kernel, slice, all_gather, ...
std::string edited_ranks(const std::function<void(Json &)> &edit) {
  TestPlan parts = test_plan_of_ranks(kMesh);
  parts.edit_program("cpu-avx2", edit);
  return refusal([&] { parse(parts, 5); });
}

TEST(ProgramOfRanks, IsRead) {
  const TestPlan parts = test_plan_of_ranks(kMesh);
  const Program program = parse(parts, 6);
  EXPECT_EQ(program.rank, 6);
  EXPECT_EQ(program.buckets[0].launches[0].arguments[0].entry, "parts@ep=1,tp=2");
  EXPECT_EQ(parse(parts, 0).buckets[0].launches[0].arguments[0].entry, "parts@ep=0,tp=0");
  const auto ep = program.buckets[0].launches[1].collective, tp = program.buckets[0].launches[2].collective;
  ASSERT_TRUE(ep && tp);
  EXPECT_EQ(ep->axis, 0);
  EXPECT_EQ(ep->num_ranks, 2);
  EXPECT_EQ(tp->axis, 1);
  EXPECT_EQ(tp->num_ranks, 4);
  EXPECT_EQ(tp->kind, Collective::Kind::all_reduce);
  EXPECT_EQ(tp->reduce, Collective::Reduce::sum);
  EXPECT_EQ(tp->run, kWidth);
  EXPECT_FALSE(program.buckets[0].launches[3].collective);
  const auto gather = program.buckets[0].launches[5].collective;
  ASSERT_TRUE(gather);
  EXPECT_EQ(gather->kind, Collective::Kind::all_gather);
  EXPECT_EQ(gather->rows, Collective::Rows::tokens);
  EXPECT_EQ(gather->in_run(6, 24), kWidth / 4);
  EXPECT_EQ(gather->out_run(6, 24), kWidth);
  EXPECT_EQ(gather->outer(7, 2), 7);
  EXPECT_EQ(program.buckets[0].launches.back().collective->outer(7, 2), 2);
}

/// The all_gather of the program, as another collective.
Collective with_collective(const std::function<void(Json &)> &edit) {
  TestPlan parts = test_plan_of_ranks(kMesh);
  parts.edit_program("cpu-avx2", [&](Json &p) { edit(p["buckets"][0]["launches"][5]); });
  return parse(parts, 5).buckets[0].launches[5].collective.value();
}

TEST(ProgramOfRanks, ReadsPartsOfTokens) {
  const Collective gather = with_collective([](Json &launch) {
    launch["parts"] = "tokens";
    launch["rows"] = "1";
    launch["run"] = kWidth / 4;  // of one token: 24 at most, of which a rank has 6
  });
  EXPECT_TRUE(gather.tokens);
  EXPECT_EQ(gather.in_run(6, 24), 6 * kWidth / 4);
  EXPECT_EQ(gather.out_run(6, 24), 24 * kWidth / 4);
  // the rank's part of the tokens over another axis: 12 of 24 fit where 24 do not
  const Collective of_part = with_collective([](Json &launch) {
    launch["rows"] = "T/ep";
    launch["run"] = kWidth / 2;
  });
  EXPECT_EQ(of_part.rows_axis, 0);

  const auto all_to_all = [](Json &launch) {
    launch["collective"] = "all_to_all";
    launch["gathers"] = "second";
    launch["parts"] = "tokens";
    launch["rows"] = "1";
    launch["part"] = 2;
    launch["run"] = kWidth / 8;
  };
  const Collective exchange = with_collective(all_to_all);
  EXPECT_FALSE(exchange.gathers_first);
  EXPECT_EQ(exchange.in_run(6, 24), 24 * 2 * kWidth / 8);
  EXPECT_EQ(exchange.out_run(6, 24), 6 * 2 * 4 * kWidth / 8);
  expect_in(refusal([&] {
              with_collective([&](Json &launch) {
                all_to_all(launch);
                launch["part"] = 1 << 26;
              });
            }),
            {"buckets[0].launches[5].args[0] ('", "do not fit"});
  expect_in(refusal([&] {
              with_collective([&](Json &launch) {
                all_to_all(launch);
                launch["part"] = 1 << 26;
                launch["run"] = 257;
              });
            }),
            {"buckets[0].launches[5].run is '257', wanted an integer from 1 to 256"});
}

TEST(ProgramOfRanks, ReadsRowsOfRoutes) {
  // buffers have room for 24 tokens; a rank has 6 of them
  const auto rows = [](Json &launch) {
    const Json op = launch["op"], args = launch["args"];
    launch = {{"collective", "ragged_all_to_all"},
              {"op", op},
              {"axis", "tp"},
              {"dtype", "f32"},
              {"to", "experts"},
              {"experts", 8},
              {"top", 2},
              {"run", kWidth / 2},
              {"args", {args[0], {{"buffer", 0}}, args[1]}}};
  };
  const auto edited = [&](const std::function<void(Json &)> &edit) {
    return refusal([&] {
      with_collective([&](Json &launch) {
        rows(launch);
        edit(launch);
      });
    });
  };
  const auto field = [&](const char *key, const Json &value) {
    return edited([&](Json &launch) { launch[key] = value; });
  };
  const Collective found = with_collective(rows);
  Limits limits;
  limits.max_tokens = 24;
  const Mesh mesh{{{"ep", 2}, {"tp", 4}}};
  EXPECT_TRUE(found.to_experts);
  EXPECT_EQ(found.most_taken(limits, mesh), 6 * 2 * kWidth / 2);
  EXPECT_EQ(found.most_given(limits, mesh), 24 * 2 * kWidth / 2);
  expect_in(edited([](Json &launch) {
              launch["to"] = "tokens";
              launch["top"] = 3;
            }),
            {"launches[5].args[0] (", "1 times 576 elements of 4 bytes do not fit"});
  expect_in(field("top", 3), {"launches[5].args[2] (", "1 times 576 elements of 4 bytes do not fit"});
  expect_in(field("experts", 1 << 10), {"launches[5].args[1] (", "4 times 1024 elements of 4 bytes do not fit"});
  expect_in(field("experts", 10), {"launches[5].experts is 10, wanted a multiple of 4"});
  expect_in(field("top", 0), {"launches[5].top is '0', wanted an integer from 1"});
  expect_in(field("to", "ranks"), {"launches[5].to is 'ranks', wanted one of experts, tokens"});
  expect_in(field("rows", "T"), {"launches[5] has an unknown key 'rows'"});
  expect_in(edited([](Json &launch) { launch["args"].erase(1); }), {"launches[5].args has 2 items, wanted 3 to 3"});
  expect_in(edited([](Json &launch) { launch["args"][1] = launch["args"][2]; }), {"input and output overlap"});
}

const Json kStages = Json::array({Json::array({"pp", 2}), Json::array({"tp", 2})});

/// A program of two stages: layer 0 and what is before it, and the rest. What is summed over pp is sent instead.
void in_stages(Json &program) {
  int stage = 0;
  for (Json &launch : program["buckets"][0]["launches"]) {
    for (const Json &argument : launch["args"]) stage = argument == Json{{"kv", 1}} ? 1 : stage;
    launch["stage"] = stage;
  }
  Json &send = program["buckets"][0]["launches"][1];
  for (const char *key : {"reduce", "stage"}) send.erase(key);
  send["collective"] = "send";
  send["src"] = 0;
  send["dst"] = 1;
}

Program parse_stages(int32_t rank, const std::function<void(Json &)> &edit = [](Json &) {}) {
  TestPlan parts = test_plan_of_ranks(kStages);
  parts.edit_program("cpu-avx2", [&](Json &program) {
    in_stages(program);
    edit(program);
  });
  return parse(parts, rank);
}

TEST(ProgramOfStages, IsRead) {
  const Program first = parse_stages(1), last = parse_stages(2);
  EXPECT_EQ(first.stage, 0);
  EXPECT_EQ(last.stage, 1);
  EXPECT_EQ(first.buckets[0].launches[0].stage, 0);
  EXPECT_TRUE(first.is_here(first.buckets[0].launches[0].stage));
  EXPECT_FALSE(last.is_here(last.buckets[0].launches[0].stage));
  const Collective &send = first.buckets[0].launches[1].collective.value();
  EXPECT_EQ(send.kind, Collective::Kind::send);
  EXPECT_EQ(send.src, 0);
  EXPECT_EQ(send.dst, 1);
  EXPECT_TRUE(first.is_here(first.buckets[0].launches[1].stage) && last.is_here(last.buckets[0].launches[1].stage));
  EXPECT_EQ(first.layer_stages, (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(first.num_slabs(), 1);  // each stage has one layer
  EXPECT_EQ(last.slab_of(1), 0);
  EXPECT_EQ(last.num_slabs(), 1);
  EXPECT_EQ(first.most_slabs(), 1);
  EXPECT_EQ(parse(test_plan()).most_slabs(), 2);
  EXPECT_EQ(parse(test_plan()).slab_of(1), 1);
}

TEST(ProgramOfStages, IsChecked) {
  const auto wrong = [](const std::function<void(Json &)> &edit) { return refusal([&] { parse_stages(0, edit); }); };
  expect_in(edited_ranks([](Json &p) { p["buckets"][0]["launches"][2]["stage"] = 0; }),
            {"buckets[0].launches[2].stage is 0, but the mesh ep=2,tp=4 has no stages"});
  expect_in(wrong([](Json &p) { p["buckets"][0]["launches"][0]["stage"] = 2; }),
            {"buckets[0].launches[0].stage is '2', wanted an integer from 0 to 1"});
  expect_in(wrong([](Json &p) { p["buckets"][0]["launches"].back()["stage"] = -1; }), {".stage is '-1'"});
  expect_in(wrong([](Json &p) {
              for (Json &launch : p["buckets"][0]["launches"]) {
                if (launch["op"] == "attend") launch["stage"] = 1;
              }
            }),
            {" of stage 1 takes the cache of layer 0, which is on stage 0"});
  const auto field = [&](const char *key, const Json &value) {
    return wrong([&](Json &p) { p["buckets"][0]["launches"][1][key] = value; });
  };
  expect_in(field("dst", 0), {"buckets[0].launches[1] sends from 0 to 0, wanted two ranks"});
  expect_in(field("src", 2), {"buckets[0].launches[1].src is '2', wanted an integer from 0 to 1"});
  expect_in(field("stage", 0), {"buckets[0].launches[1] has an unknown key 'stage'"});
  expect_in(field("parts", "tokens"), {"buckets[0].launches[1] has an unknown key 'parts'"});
  expect_in(wrong([](Json &p) { p["buckets"][0]["launches"][1].erase("src"); }),
            {"buckets[0].launches[1] lacks the key 'src'"});
}

TEST(ProgramOfRanks, ChecksShardedWeights) {
  const auto axes = [](const Json &value) {
    return edited_ranks([&](Json &p) { p["buckets"][0]["launches"][0]["args"][0]["axes"] = value; });
  };
  expect_in(axes({"tp"}), {"names the weight 'parts@tp=1', which the plan lacks"});
  expect_in(axes({"tp", "ep"}), {"args[0].axes[1] is 'ep', not in the order of the mesh"});
  expect_in(axes({"ep", "ep"}), {"axes[1] is 'ep', not in the order"});
  expect_in(axes({"ep", "dp"}), {"axes[1] is 'dp', the mesh has ep=2,tp=4"});
  expect_in(axes(Json::array()), {"axes has 0 items"});
  expect_in(axes("tp"), {"axes is"});
  expect_in(edited_ranks([](Json &p) { p["buckets"][0]["launches"][0]["args"][0].erase("axes"); }),
            {"names the weight 'parts', which the plan lacks"});
  expect_in(edited_ranks([](Json &p) { p["buckets"][0]["launches"][0]["args"][0]["bytes"] = 64; }),
            {"args[0].bytes is 64, the weight 'parts@ep=1,tp=1' has 3200"});
}

TEST(ProgramOfRanks, ChecksCollectives) {
  const auto field = [](const char *key, const Json &value) {
    return edited_ranks([&](Json &p) { p["buckets"][0]["launches"][2][key] = value; });
  };
  expect_in(field("collective", "all_to_all"), {"buckets[0].launches[2] lacks the key 'gathers'"});
  expect_in(field("collective", "broadcast"),
            {"buckets[0].launches[2].collective is 'broadcast', wanted one of all_reduce, "
             "reduce_scatter, all_gather, all_to_all, slice, send, ragged_all_to_all"});
  expect_in(field("reduce", "mean"), {"buckets[0].launches[2].reduce is 'mean', wanted one of sum, max"});
  expect_in(field("axis", "dp"), {"buckets[0].launches[2].axis is 'dp', the mesh has ep=2,tp=4"});
  expect_in(field("rows", "S"), {"buckets[0].launches[2].rows is 'S', wanted one of 1, T, L"});
  expect_in(field("rows", "T/dp"), {"buckets[0].launches[2].rows is 'T/dp', the mesh has ep=2,tp=4"});
  expect_in(field("rows", "T/tp"), {"buckets[0].launches[2].rows is 'T/tp', the collective's own axis"});
  expect_in(field("parts", "rows"), {"buckets[0].launches[2].parts is 'rows', wanted one of tokens"});
  expect_in(field("parts", "tokens"), {"buckets[0].launches[2].parts is 'tokens', wanted it of no all_reduce"});
  expect_in(field("dtype", "f64"), {"buckets[0].launches[2].dtype is 'f64', wanted one of f32, bf16, i32"});
  expect_in(field("dtype", "bf16"), {"buckets[0].launches[2].dtype is 'bf16', wanted 'f32', or 'i32' of a sum"});
  expect_in(field("times", 0), {"buckets[0].launches[2].times is '0', wanted an integer from 1"});
  expect_in(field("run", 0), {"buckets[0].launches[2].run is '0', wanted an integer from 1"});
  expect_in(field("run", int64_t{1} << 60), {"buckets[0].launches[2].run"});
  expect_in(field("run", kWidth + 1),
            {"buckets[0].launches[2].args[0] ('part')", "has 1536 bytes, but 24 times 17 elements of 4"});
  expect_in(field("times", 1 << 26), {"has 1536 bytes, but 1610612736 times 16 elements"});
  expect_in(field("kernel", "x"), {"buckets[0].launches[2] has an unknown key 'kernel'"});
  expect_in(field("args", {{{"buffer", 0}}}), {"buckets[0].launches[2].args has 1 items, wanted 2 to 2"});
  expect_in(field("args", {{{"buffer", 0}}, {{"kv", 0}}}), {"buckets[0].launches[2].args[1] is no buffer"});
  expect_in(field("args", {{{"buffer", 0}}, {{"buffer", 0}}}),
            {"buckets[0].launches[2].args: input and output overlap: bytes 0 to 1536 and 0 to 1536"});
  for (const char *key : {"axis", "dtype", "op", "reduce", "rows", "run", "times", "args"}) {
    expect_in(edited_ranks([&](Json &p) { p["buckets"][0]["launches"][2].erase(key); }),
              {"buckets[0].launches[2] lacks the key", key});
  }
  expect_in(edited_ranks([](Json &p) { p["buckets"][0]["launches"][5]["parts"] = "tokens"; }),
            {"with rows '1': tokens come first"});
  expect_in(edited_ranks([](Json &p) { p["buckets"][0]["launches"][3]["tokens"] = "dp"; }),
            {"buckets[0].launches[3].tokens is 'dp', the mesh has ep=2,tp=4"});
  expect_in(edited_ranks([](Json &p) { p["buckets"][0]["launches"][4]["reduce"] = "sum"; }),
            {"buckets[0].launches[4] has an unknown key 'reduce'"});
  expect_in(edited_ranks([](Json &p) { p["buckets"][0]["launches"][5]["run"] = kWidth / 2; }),
            {"buckets[0].launches[5].args[1] ('z')", "24 times 32 elements"});
}

}  // namespace
}  // namespace ts
