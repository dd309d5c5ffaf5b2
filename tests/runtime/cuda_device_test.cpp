// The CUDA device against the fake driver: what it asks the driver for, in which order, with which addresses, and what it says when
// the driver refuses.
#include "cuda_device.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "cuda_upload.h"
#include "expect.h"
#include "fake_driver.h"
#include "steps.h"
#include "toy_cubin.h"

namespace ts {
namespace {

using namespace ts::testing;  // NOLINT(google-build-using-namespace): helpers of these tests

constexpr int32_t kPages = 16;

struct Toy {
  explicit Toy(const TestPlan &parts = toy_gpu_plan(), const std::string &target = "sm_90a")
      : loaded(parts), program(parse_program(*loaded.plan, target)) {}

  std::unique_ptr<CudaDevice> open() const {
    return std::make_unique<CudaDevice>(std::make_unique<CudaContext>(FakeDriver::library(), program.target),
                                        *loaded.plan, program, kPages);
  }

  Loaded loaded;
  Program program;
};

void run(CudaDevice &device, Step &step) {
  device.launch(step.take());
  device.wait();
}

Step step_of(int num_tokens, int first = 0) {
  Step step;
  std::vector<int32_t> ids(static_cast<size_t>(num_tokens));
  for (int i = 0; i < num_tokens; ++i) ids[static_cast<size_t>(i)] = (7 * i + first) % kVocab;
  step.add(ids, first, {3, 9, 10});
  return step;
}

TEST(CudaDevice, ComputesWhatTheProgramSays) {
  const FakeDriver fake;
  const Toy toy;
  const auto device = toy.open();
  Reference reference;
  std::mt19937 random(11);
  std::vector<int> lengths(3);
  for (int round = 0; round < 8; ++round) {  // steps of both buckets
    Step step;
    std::vector<int> sequences;
    for (int s = 0; s < 3; ++s) {
      std::vector<int32_t> ids(1 + random() % (round % 2 == 0 ? 8 : 2));
      for (int32_t &id : ids) id = static_cast<int32_t>(random() % kVocab);
      step.add(ids, lengths[s], {3 + s, 9 - s, 10 + s});
      lengths[s] += static_cast<int>(ids.size());
      sequences.push_back(s);
    }
    run(*device, step);
    expect_logits(*device, reference.run(step, sequences));
  }
}

TEST(CudaDevice, HasOneOrderOfAStep) {
  const FakeDriver fake;
  const Toy toy;
  const auto device = toy.open();
  Step step = step_of(4);
  const size_t before = fake.names().size();
  run(*device, step);
  step.logit_rows.clear();
  run(*device, step);
  std::vector<std::string> names = fake.names();
  names.erase(names.begin(), names.begin() + static_cast<ptrdiff_t>(before));
  EXPECT_EQ(names, (std::vector<std::string>{"cuCtxSetCurrent", "cuMemcpyHtoDAsync", "cuGraphLaunch",
                                             "cuMemcpyDtoHAsync", "cuStreamSynchronize", "cuCtxSetCurrent",
                                             "cuMemcpyHtoDAsync", "cuGraphLaunch", "cuStreamSynchronize"}));
  // one row of logits; and of the batch no more than the step has
  EXPECT_EQ(fake.calls("cuMemcpyDtoHAsync").back()["bytes"], kLogitsStride * 4);
  EXPECT_EQ(fake.calls("cuMemcpyHtoDAsync").back()["bytes"],
            CudaBatch({8, kMaxSeqs, 128, kPageSize, kVocab}, 1, 4).offset(BatchArray::page_table, 0) + 4);
}

TEST(CudaDevice, LogitsAreThereOnceTheHostHasWaited) {
  const FakeDriver fake;
  const Toy toy;
  const auto device = toy.open();
  Reference reference;
  Step step = step_of(4);
  const auto wanted = reference.run(step, {0});
  device->launch(step.take());
  EXPECT_NE(device->logits()[0], wanted[0][0]);  // the fake does nothing before it must
  std::ranges::fill(step.token_ids, 0);          // the batch was packed: its arrays are free
  device->wait();
  expect_logits(*device, wanted);
}

TEST(CudaDevice, CapturesAGraphForEachBucketWithProgrammaticEdges) {
  const FakeDriver fake;
  const Toy toy;
  const auto device = toy.open();
  const std::vector<Json> launches = fake.calls("cuLaunchKernelEx"), graphs = fake.calls("instantiated");
  ASSERT_EQ(graphs.size(), 2U);
  ASSERT_EQ(launches.size(), 16U);
  for (size_t bucket = 0; bucket < 2; ++bucket) {
    EXPECT_EQ(graphs[bucket]["nodes"], 8);
    for (size_t i = 0; i < 8; ++i) {
      const Json &found = launches[8 * bucket + i];
      const Launch &wanted = toy.program.buckets[bucket].launches[i];
      EXPECT_EQ(found["kernel"], wanted.kernel);
      EXPECT_EQ(found["x"], wanted.grid[0]);
      EXPECT_EQ(found["threads"], 128);
      EXPECT_EQ(found["shared"], wanted.kernel == "test_logits" ? 100 << 10 : 0);
      EXPECT_EQ(found["programmatic"], i == 0 ? 0 : 1);
    }
  }
  EXPECT_EQ(fake.calls("cuFuncSetAttribute").size(), 1U);  // more than 48 KiB are asked for
  Step one = step_of(3), all = step_of(20);
  run(*device, one);
  run(*device, all);
  run(*device, one);
  std::vector<Json> ran;
  for (const Json &call : fake.calls("cuGraphLaunch")) ran.push_back(call["graph"]);
  EXPECT_EQ(ran, (std::vector<Json>{graphs[0]["graph"], graphs[1]["graph"], graphs[0]["graph"]}));
}

TEST(CudaDevice, PacksParametersAsThePlanSays) {
  const FakeDriver fake;
  const Toy toy;
  const auto device = toy.open();
  const Program &program = toy.program;
  // weights, KV cache, arena, batch
  const std::vector<Json> taken = fake.calls("allocated");
  ASSERT_EQ(taken.size(), 4U);
  const uint64_t slab = kPages * program.page_bytes;
  EXPECT_EQ(taken[0]["bytes"], 3328);  // of 3,200
  EXPECT_EQ(taken[1]["bytes"], 2 * slab);
  EXPECT_EQ(taken[2]["bytes"], program.arena_bytes);
  const std::vector<Json> launches = fake.calls("cuLaunchKernelEx");
  size_t n = 0;
  for (const Bucket &bucket : program.buckets) {
    const CudaBatch batch(bucket.limits, 1, 4);
    for (const Launch &launch : bucket.launches) {
      std::string wanted;
      for (const Argument &argument : launch.arguments) {
        wanted += wanted.empty() ? "" : " ";
        const auto index = static_cast<size_t>(argument.index);
        switch (argument.kind) {
          case Argument::Kind::weight:
            wanted += "1+0";
            break;
          case Argument::Kind::kv:
            wanted += "2+" + std::to_string(index * slab);
            break;
          case Argument::Kind::buffer:
            wanted += "3+" + std::to_string(program.buffers[index].offset);
            break;
          case Argument::Kind::batch:
            wanted += "4+" + std::to_string(batch.offset(static_cast<BatchArray>(index), 0));
            break;
          case Argument::Kind::null:
            wanted += "null";
            break;
        }
      }
      EXPECT_EQ(launches.at(n++)["params"], wanted) << launch.op;
    }
  }
}

TEST(CudaDevice, NamesWhatMemoryWasNeededByPart) {
  const Toy toy;
  for (int nth = 1; nth <= 4; ++nth) {
    const FakeDriver fake("oom_at=" + std::to_string(nth));
    expect_in(refusal([&] { toy.open(); }, TS_NO_MEMORY),
              {"Fake GPU has not enough memory for what is needed, ",
               "weights take 3.2 KiB, activations and work space 6.5 KiB", "batch 704 bytes, KV cache 64.0 KiB",
               "were left when", "fewer pages of KV cache"});
  }
  const FakeDriver small("total=70000");
  expect_in(refusal([&] { toy.open(); }, TS_NO_MEMORY), {"KV cache 64.0 KiB", "1.1 KiB were left when 6.5 KiB"});
  for (int nth = 1; nth <= 4; ++nth) {
    const FakeDriver fake("host_oom_at=" + std::to_string(nth));
    expect_in(refusal([&] { toy.open(); }, TS_NO_MEMORY),
              {"getting pinned memory for", " of the host's, failed: CUDA_ERROR_OUT_OF_MEMORY"});
  }
}

TEST(CudaDevice, IsLostForGood) {
  const FakeDriver fake("lose_at=2");
  const Toy toy;
  const auto device = toy.open();
  Step step = step_of(4);
  run(*device, step);
  expect_in(refusal([&] { run(*device, step); }, TS_LOST_RANK),
            {"Fake GPU is lost: a step failed: CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure)"});
  EXPECT_THROW(run(*device, step), Error);
}

TEST(CudaDevice, NamesAKernelThatTheDriverRefuses) {
  const FakeDriver fake("refused=test_mix");
  const Toy toy;
  expect_in(
      refusal([&] { toy.open(); }, TS_NO_TARGET),
      {"loading the kernel 'test_mix' on Fake GPU failed: CUDA_ERROR_INVALID_IMAGE", "the driver is for CUDA 13.0"});
}

TEST(CudaDevice, RefusesACubinOfAnotherGpu) {
  const FakeDriver fake;
  const Toy toy(toy_gpu_plan("sm_90a", 100));
  expect_in(refusal([&] { toy.open(); }, TS_NO_TARGET), {"the kernel 'test_attend'", "CUDA_ERROR_NO_BINARY_FOR_GPU"});
}

TEST(CudaUpload, CopiesInParts) {
  const FakeDriver fake;
  const CudaContext context(FakeDriver::library(), "sm_90a");
  context.make_current();
  std::vector<uint8_t> bytes((40 << 20) + 3);
  for (size_t i = 0; i < bytes.size(); i += 64) bytes[i] = static_cast<uint8_t>(i / 64 * 2654435761U >> 13);
  const CudaStream stream = make_stream(context);
  cuda::Address address = 0;
  context.check(context.cuda().memory_allocate(&address, bytes.size()), "test");
  const DeviceMemory memory(context, address);
  CudaUpload upload(context, stream.get());
  upload.copy(address, bytes);
  upload.finish();
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), reinterpret_cast<const uint8_t *>(address)));
  EXPECT_EQ(fake.calls("cuMemcpyHtoDAsync").size(), 3U);
}

TEST(CudaBatch, GivesEachGroupItsSlotsAndPages) {
  const Limits limits{8, 4, 256, 32, kVocab};
  CudaBatch batch(limits, 2, 8);
  std::vector<uint8_t> memory(batch.bytes());
  const std::vector<int32_t> ids = {5, 6, 7}, positions = {40, 41, 9}, slots = {1, 2, 3, 11, 12, 13},
                             starts = {0, 2, 3}, lengths = {42, 10}, rows = {1, 2},
                             pages = {4, 5, 0, 0, 0, 0, 0, 0, 14, 15, 0, 0, 0, 0, 0, 0,  // of the first sequence
                                      6, 0, 0, 0, 0, 0, 0, 0, -1, 0,  0, 0, 0, 0, 0, 0};
  const ts_batch step{
      3,          2, 2, 16, ids.data(), positions.data(), slots.data(), starts.data(), lengths.data(), pages.data(),
      rows.data()};
  const std::span<const CudaBatch::Range> ranges = batch.pack(step, memory);
  const auto ints = [&](BatchArray array, int group, size_t count) {
    const auto *begin = reinterpret_cast<const int32_t *>(memory.data() + batch.offset(array, group));
    return std::vector<int32_t>(begin, begin + count);
  };
  using Ints = std::vector<int32_t>;
  EXPECT_EQ(ints(BatchArray::sizes, 0, 4), (Ints{3, 2, 2, 2}));  // the longest context has two pages
  EXPECT_EQ(ints(BatchArray::token_ids, 1, 3), ids);
  EXPECT_EQ(ints(BatchArray::positions, 0, 3), positions);
  EXPECT_EQ(ints(BatchArray::query_start, 0, 3), starts);
  EXPECT_EQ(ints(BatchArray::context_len, 0, 2), lengths);
  EXPECT_EQ(ints(BatchArray::logit_rows, 0, 2), rows);
  EXPECT_EQ(ints(BatchArray::slots, 0, 3), (Ints{1, 2, 3}));
  EXPECT_EQ(ints(BatchArray::slots, 1, 3), (Ints{11, 12, 13}));
  EXPECT_EQ(ints(BatchArray::page_table, 0, 3), (Ints{4, 5, 6}));
  EXPECT_EQ(ints(BatchArray::page_table, 1, 3), (Ints{14, 15, -1}));
  ASSERT_EQ(ranges.size(), 2U);
  EXPECT_EQ(ranges[0].offset, 0U);
  EXPECT_EQ(ranges[0].bytes, batch.offset(BatchArray::page_table, 0) + 16);
  EXPECT_EQ(ranges[1].offset, batch.offset(BatchArray::page_table, 1));
  EXPECT_EQ(ranges[1].bytes, 16U);
  for (int array = 0; array < 8; ++array) {
    for (int group = 0; group < 2; ++group) EXPECT_EQ(batch.offset(static_cast<BatchArray>(array), group) % 64, 0U);
  }
}

}  // namespace
}  // namespace ts
