#include "executor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "device.h"
#include "expect.h"
#include "host.h"
#include "make_plan.h"
#include "steps.h"

namespace ts {
namespace {

using namespace ts::testing;  // NOLINT(google-build-using-namespace): helpers of these tests

std::string kernels() { return read_file(TS_TEST_KERNELS); }

TestPlan runnable_plan() { return test_plan(best_target(), kernels()); }

ExecutorOptions options(int num_threads, int num_pages = 16) {
  ExecutorOptions options;
  options.num_threads = num_threads;
  options.num_pages = num_pages;
  return options;
}

class ExecutorThreads : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, ExecutorThreads, ::testing::Values(1, 2, 3, 5, 8));

TEST_P(ExecutorThreads, ComputesWhatTheProgramSays) {
  const Loaded loaded(runnable_plan());
  Executor executor(loaded.plan, options(GetParam()));
  EXPECT_EQ(executor.num_threads(), GetParam());
  Reference reference;
  std::mt19937 random(11);
  std::vector<int> lengths(3);
  for (int round = 0; round < 6; ++round) {
    Step step;
    std::vector<int> sequences;
    for (int s = 0; s < 3; ++s) {
      std::vector<int32_t> ids(1 + random() % 8);
      for (int32_t &id : ids) id = static_cast<int32_t>(random() % kVocab);
      step.add(ids, lengths[s], {3 + s, 9 - s, 10 + s});
      lengths[s] += static_cast<int>(ids.size());
      sequences.push_back(s);
    }
    executor.run(step.take());
    expect_logits(executor, reference.run(step, sequences));
  }
}

TEST_P(ExecutorThreads, RunsTheLaunchesOfTheStepsBucket) {
  TestPlan plan = runnable_plan();
  plan.edit_program(best_target(), [](Json &program) {  // up to two tokens: logits elsewhere
    const int64_t end = program["arena_bytes"], bytes = int64_t{2} * kLogitsStride * 4;
    program["arena_bytes"] = end + bytes;
    program["buffers"].push_back({{"name", "few"}, {"offset", end}, {"bytes", bytes}});
    Json few = program["buckets"][0];
    few["max_tokens"] = 2;
    few["launches"].back()["args"][2] = few["logits"] = {{"buffer", 4}};
    few["logits"]["stride"] = kLogitsStride;
    program["buckets"].insert(program["buckets"].begin(), few);
  });
  const Loaded loaded(plan);
  Executor executor(loaded.plan, options(GetParam()));
  Reference reference;
  std::vector<int> lengths(2);
  const float *of_many = nullptr, *of_few = nullptr;
  for (const int size : {5, 1, 2, 3, 1, 7}) {
    Step step;
    std::vector<int32_t> ids(static_cast<size_t>(size));
    for (int32_t &id : ids) id = (size * 7 + lengths[0]) % kVocab;
    step.add(ids, lengths[0], {3, 9});
    lengths[0] += size;
    executor.run(step.take());
    expect_logits(executor, reference.run(step, {0}));
    (size <= 2 ? of_few : of_many) = executor.logits();
    EXPECT_TRUE(of_few == nullptr || of_few != of_many) << size;
  }
}

TEST_P(ExecutorThreads, ThousandsOfStepsAgree) {
  const Loaded loaded(runnable_plan());
  Executor executor(loaded.plan, options(GetParam()));
  Step step;
  step.add({5, 6, 7, 8, 9, 10, 11}, 0, {1, 2});
  step.add({20, 21, 22}, 0, {3, 4});
  Reference reference;
  const auto wanted = reference.run(step, {0, 1});
  for (int i = 0; i < 3000; ++i) {
    executor.run(step.take());
    expect_logits(executor, wanted);
    if (HasFatalFailure()) FAIL() << "step " << i;
  }
}

TEST(Executor, FlushesDenormalsOnEveryThread) {
  TestPlan plan = runnable_plan();
  plan.edit_program(best_target(), [](Json &program) {
    program["buckets"][0]["launches"] =
        Json::array({{{"kernel", "test_denormal"}, {"op", "d"}, {"args", {{{"buffer", 3}}}}}});
  });
  const Loaded loaded(plan);
  Executor executor(loaded.plan, options(4));
  Step step;
  step.add({1}, 0, {0});
  executor.run(step.take());
  for (int i = 0; i < 64; ++i) EXPECT_EQ(executor.logits()[i], 0.0F) << i;
  volatile float smallest = std::numeric_limits<float>::min();
  EXPECT_GT(smallest * 0.5F, 0.0F);  // the caller's own mode is back
}

// Two layers, each of its own group: one slab of memory, in which pages of both lie.
TEST(Executor, EachGroupHasItsPageTable) {
  TestPlan plan = runnable_plan();
  plan.edit_program(best_target(), [](Json &program) {
    program["kv"]["groups"] = {{{"kind", "full"}}, {{"kind", "window"}, {"window", 100}}};
    program["kv"]["layers"] = {0, 1};
  });
  const Loaded loaded(plan);
  ExecutorOptions o = options(2, 0);
  o.kv_bytes = int64_t{5} * kPageSize * kWidth * 4;
  Executor executor(loaded.plan, o);
  EXPECT_EQ(executor.num_pages(), 5) << "a page is of one layer's size: no group has more";
  EXPECT_EQ(executor.groups().size(), 2U);
  Reference reference;
  const std::vector<int32_t> pages = {4, 1}, others = {0, 3};  // of the two groups
  int position = 0;
  for (const int num_tokens : {20, 15, 1}) {
    Step one, two;
    const std::vector<int32_t> ids(static_cast<size_t>(num_tokens), num_tokens);
    one.add(ids, position, pages);
    two.add(ids, position, others);
    Step both = one;
    both.slots.insert(both.slots.end(), two.slots.begin(), two.slots.end());
    both.page_table.insert(both.page_table.end(), two.page_table.begin(), two.page_table.end());
    both.take();
    both.batch.page_table_stride = 8;
    executor.run(both.batch);
    expect_logits(executor, reference.run(one, {0}));
    position += num_tokens;
  }
}

TEST(Executor, TellsItsLimits) {
  const Loaded loaded(runnable_plan());
  const Executor executor(loaded.plan, options(2, 7));
  EXPECT_EQ(executor.limits().max_tokens, kMaxTokens);
  EXPECT_EQ(executor.limits().max_seqs, kMaxSeqs);
  EXPECT_EQ(executor.limits().max_context, 128);
  EXPECT_EQ(executor.limits().page_size, kPageSize);
  EXPECT_EQ(executor.limits().vocab_size, kVocab);
  EXPECT_EQ(executor.num_pages(), 7);
  EXPECT_EQ(executor.target(), best_target());
  EXPECT_EQ(executor.logits_stride(), kLogitsStride);
}

TEST(Executor, SizesTheCache) {
  const Loaded loaded(runnable_plan());
  const int64_t page_bytes = int64_t{2} * kPageSize * kWidth * 4;
  const auto pages = [&](int num_pages, int64_t kv_bytes, int max_seqs) {
    ExecutorOptions o = options(1, num_pages);
    o.kv_bytes = kv_bytes;
    o.max_seqs = max_seqs;
    return Executor(loaded.plan, o).num_pages();
  };
  EXPECT_EQ(pages(0, 5 * page_bytes + 1, 0), 5);
  EXPECT_EQ(pages(9, 5 * page_bytes, 0), 9);               // pages win
  EXPECT_EQ(pages(0, 0, 0), kMaxSeqs * 2048 / kPageSize);  // more than one context
  EXPECT_EQ(pages(0, 0, 1), 2048 / kPageSize);
  EXPECT_EQ(pages(0, 0, 99), kMaxSeqs * 2048 / kPageSize);
  expect_in(refusal([&] { pages(0, page_bytes - 1, 0); }, TS_BAD_REQUEST), {"kv_bytes is", "one page of 32 tokens"});
  expect_in(refusal([&] { pages(-1, 0, 0); }, TS_BAD_REQUEST), {"num_pages is -1"});
  expect_in(refusal([&] { pages(1 << 30, 0, 0); }, TS_BAD_REQUEST), {"num_pages"});
  expect_in(refusal([&] { pages(0, -5, 0); }, TS_BAD_REQUEST), {"kv_bytes is -5"});
  expect_in(refusal([&] { Executor(loaded.plan, options(-2)); }, TS_BAD_REQUEST), {"num_threads is -2"});
}

TEST(Executor, SaysWhatDidNotFit) {
  TestPlan plan = runnable_plan();
  plan.edit_program(best_target(), [](Json &program) { program["arena_bytes"] = int64_t{1} << 45; });
  const Loaded arena(plan);
  expect_in(refusal([&] { Executor(arena.plan, options(1)); }, TS_NO_MEMORY),
            {"the arena takes 32.0 TiB", "the KV cache 64.0 KiB (16 pages of 32 tokens, 4.0 KiB a page)", "is free",
             "not even one page fits; end what else uses this memory, or build the plan for more ranks"});
  plan.edit_program(best_target(), [](Json &program) {
    program["arena_bytes"] = 1 << 20;
    program["kv"]["page_bytes"] = int64_t{1} << 38;
  });
  const Loaded kv(plan);
  expect_in(refusal([&] { Executor(kv.plan, options(1, 0)); }, TS_NO_MEMORY),
            {"the KV cache 512.0 GiB (1 page of 32 tokens"});
}

TEST(Executor, TakesTheBestTargetOrTheForcedOne) {
  TestPlan plan = test_plan("cpu-avx2", kernels());
  for (const char *target : {"cpu-avx512", "cpu-amx", "cuda-sm90a"})
    plan.add_target(target, test_program(target), kernels());
  const Loaded loaded(plan);
  EXPECT_EQ(Executor(loaded.plan, options(1)).target(), best_target());
  ExecutorOptions forced = options(1);
  for (const std::string &target : host_targets()) {
    forced.target = target;
    EXPECT_EQ(Executor(loaded.plan, forced).target(), target);
  }
  forced.target = "cuda-sm90a";
  expect_in(refusal([&] { Executor(loaded.plan, forced); }, TS_NO_TARGET),
            {"'cuda-sm90a' does not run on this host", "the plan has cpu-avx2, cpu-avx512, cpu-amx, cuda-sm90a",
             "this host runs", best_target().c_str()});
  forced.target = "cpu-neon";
  expect_in(refusal([&] { Executor(loaded.plan, forced); }, TS_NO_TARGET), {"'cpu-neon' is not in the plan"});
}

TEST(Executor, RefusesAPlanForOtherHosts) {
  const Loaded loaded(test_plan("cuda-sm90a", kernels()));
  expect_in(refusal([&] { Executor(loaded.plan, options(1)); }, TS_NO_TARGET),
            {"the plan has kernels for cuda-sm90a", "this host runs", best_target().c_str()});
}

TEST(Executor, NamesTheGpusThatItRuns) {
  const Loaded loaded(test_plan("gfx950", kernels()));
  expect_in(refusal([&] { static_cast<void>(open_device(loaded.plan, options(1))); }, TS_NO_TARGET),
            {"the plan has kernels for gfx950, this host runs ", best_target().c_str(),
             "; gfx950: this tsruntime runs no GPUs of AMD yet; of NVIDIA's it runs sm_90a and sm_100a"});
  ExecutorOptions forced = options(1);
  forced.target = "gfx950";
  expect_in(refusal([&] { static_cast<void>(open_device(loaded.plan, forced)); }, TS_NO_TARGET),
            {"target 'gfx950' does not run on this host", "; gfx950: this tsruntime runs no GPUs of AMD yet"});
}

TEST(Executor, RefusesKernelsThatAreNone) {
  const auto message = [&](const std::string &elf) {
    const Loaded loaded(test_plan(best_target(), elf));
    return refusal([&] { Executor(loaded.plan, options(1)); });
  };
  expect_in(message("text"), {"'tsp/kernels/", "is 4 bytes, too short"});
  expect_in(message(std::string(4096, 'x')), {"no ELF shared object for x86-64"});
  std::string other = kernels();
  other[18] = 0x28;  // e_machine: ARM
  expect_in(message(other), {"no ELF shared object for x86-64"});
  expect_in(message(kernels().substr(0, 500)), {"cannot be loaded"});
  expect_in(message(read_file(TS_TEST_DEPENDENT)), {"depends on other libraries"});
}

TEST(Executor, NamesAMissingKernel) {
  TestPlan plan = runnable_plan();
  plan.edit_program(best_target(),
                    [](Json &program) { program["buckets"][0]["launches"][3]["kernel"] = "test_absent"; });
  const Loaded loaded(plan);
  expect_in(refusal([&] { Executor(loaded.plan, options(1)); }), {"lacks the kernel 'test_absent'"});
}

TEST(Executor, VerifiesWeights) {
  Bytes bytes = runnable_plan().bytes();
  const uint64_t data_begin = 8 + bytes[0] + 256U * bytes[1];
  bytes[data_begin + 17] ^= 1;  // the only weight comes first
  const Loaded loaded(bytes);
  expect_in(refusal([&] { Executor(loaded.plan, options(1)); }), {"'table' is damaged"});
}

TEST(Executor, RefusesBatchesBeyondItsLimits) {
  const Loaded loaded(runnable_plan());
  Executor executor(loaded.plan, options(1));
  Step step;
  step.add({1, 2}, 0, {0});
  const ts_batch good = step.take();
  executor.run(good);
  const auto message = [&](auto change) {
    ts_batch batch = good;
    change(batch);
    return refusal([&] { executor.run(batch); }, TS_INTERNAL);
  };
  expect_in(message([](ts_batch &b) { b.num_tokens = kMaxTokens + 1; }), {"25 tokens", "limits of 24 tokens"});
  message([](ts_batch &b) { b.num_tokens = 0; });
  message([](ts_batch &b) { b.num_seqs = kMaxSeqs + 1; });
  message([](ts_batch &b) { b.num_seqs = 0; });
  message([](ts_batch &b) { b.num_logits = kMaxSeqs + 1; });
  message([](ts_batch &b) { b.num_logits = -1; });
}

// Libraries are known to the loader by path: two at once, and one after another, must not be taken for each other.
TEST(Executor, KeepsTheKernelsOfTwoPlansApart) {
  const Loaded one(runnable_plan());
  TestPlan changed = runnable_plan();
  std::string &elf = changed.reserved.at("tsp/kernels/" + best_target());
  const float half = 0.5F, one_and_half = 1.5F;
  const std::string needle(reinterpret_cast<const char *>(&half), 4);
  size_t num_patched = 0;
  for (size_t at = elf.find(needle); at != std::string::npos; at = elf.find(needle, at + 4), ++num_patched) {
    elf.replace(at, 4, std::string(reinterpret_cast<const char *>(&one_and_half), 4));
  }
  ASSERT_GT(num_patched, 0U);
  const Loaded two(changed);
  Step step;
  step.add({5, 6, 7}, 0, {1});
  for (int i = 0; i < 3; ++i) {
    Executor a(one.plan, options(1));
    Executor b(two.plan, options(1));
    a.run(step.take());
    b.run(step.take());
    EXPECT_NE(a.logits()[3], b.logits()[3]);
  }
}

}  // namespace
}  // namespace ts
