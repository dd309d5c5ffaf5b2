#include "cuda_driver.h"

#include <gtest/gtest.h>

#include "expect.h"
#include "fake_driver.h"

namespace ts {
namespace {

using namespace ts::testing;  // NOLINT(google-build-using-namespace): helpers of these tests

/// What opening a GPU for a target is refused with, and whether another target might do.
std::string opening(const std::string &target, bool no_gpu) {
  try {
    const CudaContext context(FakeDriver::library(), target);
  } catch (const NoGpu &e) {
    EXPECT_TRUE(no_gpu) << e.what();
    return e.what();
  } catch (const Error &e) {
    EXPECT_FALSE(no_gpu) << e.what();
    EXPECT_EQ(e.status(), TS_NO_TARGET);
    return e.what();
  }
  ADD_FAILURE() << "nothing was refused";
  return {};
}

TEST(GpuTarget, HasACapability) {
  EXPECT_EQ(capability_of("sm_90a"), (Capability{9, 0}));
  EXPECT_EQ(capability_of("sm_100a"), (Capability{10, 0}));
  EXPECT_EQ(capability_of("sm_121"), (Capability{12, 1}));
  for (const char *none : {"cpu-avx2", "gfx950", "sm_", "sm_a", "", "sm_9"}) EXPECT_FALSE(is_gpu_target(none)) << none;
}

TEST(CudaDriver, OpensTheGpuOfATarget) {
  const FakeDriver fake;
  {
    const CudaContext context(FakeDriver::library(), "sm_90a");
    context.make_current();
    EXPECT_EQ(context.name(), "Fake GPU");
    EXPECT_EQ(context.most_shared_bytes(), 227 << 10);
    EXPECT_EQ(context.free_memory(), uint64_t{8} << 30);
    EXPECT_EQ(context.driver().version(), 13000);
  }
  EXPECT_EQ(fake.calls("cuDevicePrimaryCtxRetain").size(), 1U);
  EXPECT_EQ(fake.calls("cuDevicePrimaryCtxRelease").size(), 1U);
}

TEST(CudaDriver, MayBeMissing) {
  try {
    const CudaContext context("/nowhere/libcuda.so.1", "sm_90a");
    ADD_FAILURE() << "nothing was refused";
  } catch (const NoGpu &e) {
    expect_in(e.what(), {"there is no NVIDIA driver (/nowhere/libcuda.so.1: cannot open", "TSRUNTIME_LIBCUDA"});
  }
}

TEST(CudaDriver, MayBeAnythingElse) {
  try {
    const CudaDriver driver(TS_TEST_KERNELS, 12030);
    ADD_FAILURE() << "nothing was refused";
  } catch (const Error &e) {
    EXPECT_EQ(e.status(), TS_NO_TARGET);
    expect_in(e.what(), {"has no cuDriverGetVersion: it is no NVIDIA driver of CUDA 12.3 or later"});
  }
}

TEST(CudaDriver, MayBeTooOld) {
  const FakeDriver hopper("version=12020");
  expect_in(opening("sm_90a", false), {"the NVIDIA driver is for CUDA 12.2, wanted 12.3 or later: update the driver"});
  EXPECT_TRUE(hopper.calls().empty());  // it is not even started
  const FakeDriver blackwell("version=12060;major=10");
  expect_in(opening("sm_100a", false), {"is for CUDA 12.6, wanted 12.8 or later"});
}

TEST(CudaDriver, MayLackAFunction) {
#define TS_CUDA_NAME(name, symbol, ...) symbol,
  for (const char *symbol : {TS_CUDA_FUNCTIONS(TS_CUDA_NAME)}) {
    const FakeDriver fake(std::string("missing=") + symbol);
    const std::string wanted = std::string("of CUDA 13.0, has no ") + symbol + " in the form that CUDA 12.3 has";
    expect_in(opening("sm_90a", false), {wanted.c_str()});
  }
#undef TS_CUDA_NAME
}

TEST(CudaDriver, MaySeeNoGpu) {
  const FakeDriver fake("devices=0");
  expect_in(opening("sm_90a", true), {"the NVIDIA driver sees no GPU: CUDA_ERROR_NO_DEVICE (no CUDA-capable device"});
}

TEST(CudaDriver, MayNotStart) {
  const FakeDriver fake("init=803");
  expect_in(opening("sm_90a", false),
            {"starting the NVIDIA driver failed: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (system has unsupported"});
}

TEST(CudaDriver, NamesBothCapabilities) {
  const FakeDriver fake("major=8;minor=6;devices=2");
  expect_in(opening("sm_90a", true),
            {"sm_90a runs on GPUs of compute capability 9.0, and here is Fake GPU of 8.6, Fake GPU of 8.6"});
  const FakeDriver blackwell("major=10");
  expect_in(opening("sm_90a", true), {"and here is Fake GPU of 10.0: build the plan with --target sm_100a"});
}

TEST(CudaDriver, NamesWhatItDoesNotKnow) {
  const FakeDriver fake;
  const CudaDriver driver(FakeDriver::library(), 12030);
  EXPECT_EQ(driver.text(12345), "CUDA error 12345");
  EXPECT_EQ(CudaDriver::version_text(12080), "12.8");
  expect_in(refusal([&] { driver.check(cuda::kOutOfMemory, "taking memory", TS_NO_MEMORY); }, TS_NO_MEMORY),
            {"taking memory failed: CUDA_ERROR_OUT_OF_MEMORY (out of memory)"});
}

}  // namespace
}  // namespace ts
