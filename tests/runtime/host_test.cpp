#include "host.h"

#include <gtest/gtest.h>
#include <immintrin.h>
#include <sched.h>

#include <fstream>
#include <limits>
#include <thread>

namespace ts {
namespace {

using Names = std::vector<std::string>;

/// A machine with everything: Sapphire Rapids.
CpuFeatures full() {
  CpuFeatures features;
  features.leaf1_ecx = 1U << 12 | 1U << 27 | 1U << 28;
  features.leaf7_ebx = 1U << 5 | 1U << 16 | 1U << 17 | 1U << 30 | 1U << 31;
  features.leaf7_edx = 1U << 22 | 1U << 24;
  features.xcr0 = 0x600E7;
  return features;
}

TEST(Host, NamesTargetsBestFirst) {
  EXPECT_EQ(targets_of(full(), true), (Names{"cpu-amx", "cpu-avx512", "cpu-avx2"}));
  EXPECT_EQ(targets_of(full(), false), (Names{"cpu-avx512", "cpu-avx2"}));
  EXPECT_EQ(targets_of(CpuFeatures{}, true), Names{});
}

TEST(Host, EveryFeatureOfATargetIsNeeded) {
  for (const int bit : {22, 24}) {
    CpuFeatures f = full();
    f.leaf7_edx &= ~(1U << bit);
    EXPECT_EQ(targets_of(f, true), (Names{"cpu-avx512", "cpu-avx2"})) << bit;
  }
  for (const int bit : {16, 17, 30, 31}) {
    CpuFeatures f = full();
    f.leaf7_ebx &= ~(1U << bit);
    EXPECT_EQ(targets_of(f, true), Names{"cpu-avx2"}) << bit;
  }
  for (const int bit : {12, 27, 28}) {
    CpuFeatures f = full();
    f.leaf1_ecx &= ~(1U << bit);
    EXPECT_EQ(targets_of(f, true), Names{}) << bit;
  }
}

TEST(Host, AnOperatingSystemThatSavesLessRunsLess) {
  CpuFeatures f = full();
  f.xcr0 = 0x400E7;  // half of the tile state
  EXPECT_EQ(targets_of(f, true), (Names{"cpu-avx512", "cpu-avx2"}));
  f.xcr0 = 0x67;
  EXPECT_EQ(targets_of(f, true), Names{"cpu-avx2"});
  f.xcr0 = 0x3;
  EXPECT_EQ(targets_of(f, true), Names{});
}

TEST(Host, AgreesWithTheKernelAboutThisMachine) {
  std::ifstream file("/proc/cpuinfo");
  std::string flags;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("flags")) {
      flags = line + " ";
      break;
    }
  }
  const auto has = [&](const char *flag) { return flags.find(" " + std::string(flag) + " ") != std::string::npos; };
  Names wanted;
  const bool avx2 = has("avx2") && has("fma");
  const bool avx512 = avx2 && has("avx512f") && has("avx512bw") && has("avx512vl") && has("avx512dq");
  if (avx512 && has("amx_tile") && has("amx_bf16")) wanted.emplace_back("cpu-amx");
  if (avx512) wanted.emplace_back("cpu-avx512");
  if (avx2) wanted.emplace_back("cpu-avx2");
  EXPECT_EQ(host_targets(), wanted);
}

TEST(Host, CountsTheCoresOfTheAffinity) {
  const int all = usable_cores();
  EXPECT_GE(all, 1);
  std::thread([] {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(sched_getcpu(), &set);
    ASSERT_EQ(sched_setaffinity(0, sizeof(set), &set), 0);
    EXPECT_EQ(usable_cores(), 1);
  }).join();
}

TEST(Host, ReadsQuotas) {
  EXPECT_EQ(cores_of_quota("max 100000\n"), 0);
  EXPECT_EQ(cores_of_quota("400000 100000\n"), 4);
  EXPECT_EQ(cores_of_quota("150000 100000\n"), 1);
  EXPECT_EQ(cores_of_quota("50000 100000\n"), 1);
  EXPECT_EQ(cores_of_quota(""), 0);
  EXPECT_EQ(cores_of_quota("100000 0"), 0);
  EXPECT_EQ(cores_of_quota("-1 5"), 0);
}

TEST(Host, KnowsFreeMemory) {
  EXPECT_GT(available_memory(), uint64_t{16} << 20);
  EXPECT_LT(available_memory(), std::numeric_limits<uint64_t>::max());
}

TEST(Host, FloatModeFlushesDenormalsAndGoesAway) {
  const uint32_t before = _mm_getcsr();
  _mm_setcsr(before | 0x6000);  // round towards zero: a caller's own mode
  volatile float smallest = std::numeric_limits<float>::min();
  EXPECT_GT(smallest * 0.5F, 0.0F);
  {
    const FloatMode mode(Denormals::flush);
    EXPECT_EQ(smallest * 0.5F, 0.0F);  // FTZ
    volatile float denormal = std::numeric_limits<float>::denorm_min();
    EXPECT_EQ(denormal * 1e30F, 0.0F);  // DAZ
    EXPECT_EQ(_mm_getcsr() & 0x6000, 0U);
  }
  EXPECT_EQ(_mm_getcsr() & 0xFFC0, (before | 0x6000) & 0xFFC0);
  _mm_setcsr(before);
}

}  // namespace
}  // namespace ts
