// Programs of GPU targets: what is read of them, and what is refused.
#include <gtest/gtest.h>

#include "expect.h"
#include "make_plan.h"
#include "program.h"
#include "toy_cubin.h"

namespace ts {
namespace {

using namespace ts::testing;  // NOLINT(google-build-using-namespace): helpers of these tests

Program parse(const TestPlan &parts) {
  const Bytes bytes = parts.bytes();
  return parse_program(*Plan::from_memory(bytes), "sm_90a");
}

/// The message for a program that is right but for `edit`.
std::string edited(const std::function<void(Json &)> &edit) {
  TestPlan parts = toy_gpu_plan();
  parts.edit_program("sm_90a", edit);
  return refusal([&] { parse(parts); });
}

TEST(ProgramOfAGpu, IsRead) {
  const Program program = parse(toy_gpu_plan());
  ASSERT_EQ(program.kernels.size(), 5U);
  const GpuKernel &kernel = program.kernels.at("test_logits");
  EXPECT_EQ(kernel.threads, 128U);
  EXPECT_EQ(kernel.shared_bytes, 100U << 10);
  EXPECT_EQ(kernel.registers, 32U);
  EXPECT_EQ(kernel.params.size(), 7U);
  EXPECT_EQ(kernel.param_bytes(), 56U);
  ASSERT_EQ(program.buckets.size(), 2U);
  const Launch &launch = program.buckets[0].launches[2];
  EXPECT_EQ(launch.kernel, "test_write");
  EXPECT_EQ(launch.grid, (std::array<uint32_t, 3>{8, 1, 1}));
  EXPECT_EQ(launch.arguments[2].kind, Argument::Kind::batch);
  EXPECT_EQ(launch.arguments[3].index, static_cast<int32_t>(BatchArray::slots));
  EXPECT_EQ(launch.arguments[5].kind, Argument::Kind::null);
}

TEST(ProgramOfAGpu, IsOfThisAbi) {
  expect_in(edited([](Json &p) { p["abi"] = 2; }), {"tsp/program/sm_90a.abi is 2, this tsruntime has 1: update"});
  expect_in(edited([](Json &p) { p.erase("kernels"); }), {"lacks the key 'kernels'"});
  TestPlan ranks = toy_gpu_plan();
  ranks.mesh = tp(2);
  expect_in(refusal([&] { parse(ranks); }), {"is of a GPU, and the plan for 2 ranks, wanted one"});
}

TEST(ProgramOfAGpu, KeepsKernelsInTheLibrary) {
  const auto kernel = [](const char *key, const Json &value) {
    return edited([&](Json &p) { p["kernels"]["test_mix"][key] = value; });
  };
  expect_in(kernel("offset", 1), {"kernels.test_mix.offset is 1, wanted a multiple of 64"});
  expect_in(kernel("offset", int64_t{1} << 40), {"kernels.test_mix.offset is"});
  expect_in(kernel("bytes", int64_t{1} << 40), {"kernels.test_mix is 1099511627776 bytes from byte"});
  expect_in(kernel("bytes", INT64_MAX), {"kernels.test_mix is"});
  expect_in(kernel("bytes", 63), {"kernels.test_mix is 63 bytes, too short for a cubin"});
  expect_in(kernel("bytes", 64), {"is cut off: its tables end beyond its 64 bytes"});
  expect_in(kernel("threads", 48), {"threads is 48, wanted a multiple of 32"});
  expect_in(kernel("threads", 2048), {"threads is '2048', wanted an integer from 32 to 1024"});
  expect_in(kernel("shared_bytes", (227 << 10) + 1), {"shared_bytes is '232449'"});
  expect_in(kernel("registers", 256), {"registers is '256'"});
  expect_in(kernel("params", {{0, 8}, {16, 8}}), {"params[1][0] is '16', wanted an integer from 8 to 8"});
  expect_in(kernel("params", {{0, 4}}), {"params[0][1] is '4', wanted an integer from 8 to 8"});
  expect_in(kernel("more", 1), {"unknown key 'more'"});
  expect_in(edited([](Json &p) { p["kernels"] = Json::object(); }), {"kernels has 0 kernels"});
  TestPlan other = toy_gpu_plan();
  other.reserved["tsp/kernels/sm_90a"] = std::string(other.reserved["tsp/kernels/sm_90a"].size(), 'x');
  expect_in(refusal([&] { parse(other); }), {"is no cubin, an ELF file for CUDA's machine"});
}

TEST(ProgramOfAGpu, ChecksLaunches) {
  const auto launch = [](const std::function<void(Json &)> &edit) {
    return edited([&](Json &p) { edit(p["buckets"][0]["launches"][1]); });
  };
  expect_in(launch([](Json &l) { l["kernel"] = "test_none"; }), {"is 'test_none', which is none of the program's"});
  expect_in(launch([](Json &l) { l.erase("grid"); }), {"lacks the key 'grid'"});
  expect_in(launch([](Json &l) { l["grid"] = {1, 1}; }), {"grid has 2 items, wanted 3 to 3"});
  expect_in(launch([](Json &l) { l["grid"] = {0, 1, 1}; }), {"grid[0] is '0'"});
  expect_in(launch([](Json &l) { l["grid"] = {1, 65536, 1}; }),
            {"grid[1] is '65536', wanted an integer from 1 to 65535"});
  expect_in(launch([](Json &l) { l["args"].erase(2); }), {"args has 4 items, but the kernel 'test_mix' takes 5"});
  expect_in(launch([](Json &l) { l["args"][2] = {{"batch", "tokens"}}; }),
            {"is 'tokens', wanted one of sizes, token_ids"});
  expect_in(launch([](Json &l) { l["args"][3] = {{"null", 0}}; }), {"args[3].null"});
  expect_in(launch([](Json &l) { l["stage"] = 0; }), {"unknown key 'stage'"});
  expect_in(launch([](Json &l) { l["collective"] = "all_reduce"; }), {"unknown key 'collective'"});
  TestPlan cpu = test_plan();
  cpu.edit_program("cpu-avx2", [](Json &p) { p["buckets"][0]["launches"][1]["args"][0] = {{"batch", "sizes"}}; });
  const Bytes bytes = cpu.bytes();
  expect_in(refusal([&] { parse_program(*Plan::from_memory(bytes), "cpu-avx2"); }), {"args[0] lacks the key"});
}

}  // namespace
}  // namespace ts
