#include "workers.h"

#include <gtest/gtest.h>
#include <immintrin.h>
#include <sys/resource.h>

#include <chrono>
#include <csignal>
#include <ctime>
#include <numeric>
#include <vector>

namespace ts {
namespace {

class WorkerCounts : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Threads, WorkerCounts, ::testing::Values(1, 2, 3, 4, 7, 16));

TEST_P(WorkerCounts, EveryThreadRunsEveryJobOnce) {
  Workers workers(GetParam());
  std::vector<int> counts(GetParam());
  for (int step = 1; step <= 500; ++step) {
    auto job = [&](int thread, int num_threads, Barrier &) {
      EXPECT_EQ(num_threads, GetParam());
      ++counts[thread];
    };
    workers.run(job);
    for (const int count : counts) ASSERT_EQ(count, step);
  }
}

// Plain, unsynchronised numbers: a thread sees all that the others wrote before the barrier, and nobody runs ahead.
TEST_P(WorkerCounts, BarriersOrderWhatLiesBetween) {
  const int num_threads = GetParam();
  constexpr int kRounds = 2000;
  Workers workers(num_threads);
  std::vector<int64_t> numbers(num_threads), sums(num_threads);
  auto job = [&](int thread, int threads, Barrier &barrier) {
    for (int64_t round = 1; round <= kRounds; ++round) {
      numbers[thread] = round * (thread + 1);
      barrier.wait();
      sums[thread] += std::accumulate(numbers.begin(), numbers.end(), int64_t{0}) - round * threads * (threads + 1) / 2;
      barrier.wait();
    }
  };
  workers.run(job);
  for (const int64_t sum : sums) EXPECT_EQ(sum, 0);
}

TEST_P(WorkerCounts, KernelsFloatModeIsOnEverywhereAndRestored) {
  Workers workers(GetParam());
  const uint32_t before = _mm_getcsr();
  std::vector<uint32_t> modes(GetParam());
  auto job = [&](int thread, int, Barrier &) { modes[thread] = _mm_getcsr(); };
  workers.run(job);
  for (const uint32_t mode : modes) EXPECT_EQ(mode & 0xFFC0, 0x9FC0U);  // FTZ, DAZ, all traps masked, to nearest
  EXPECT_EQ(_mm_getcsr(), before);
}

// Threads that sleep between jobs, while the caller takes its time, lose no wake-up.
TEST(Workers, WakeAfterSleeping) {
  Workers workers(4);
  std::atomic<int> num_calls = 0;
  for (int step = 0; step < 40; ++step) {
    auto job = [&](int thread, int, Barrier &barrier) {
      if (thread == step % 4) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      barrier.wait();
      ++num_calls;
    };
    workers.run(job);
    if (step % 2 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  EXPECT_EQ(num_calls, 160);
}

TEST(Workers, IdleThreadsTakeNoTime) {
  Workers workers(4);
  auto job = [](int, int, Barrier &) {};
  workers.run(job);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // they go to sleep
  const auto cpu_seconds = [] {
    struct timespec time{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_LT(cpu_seconds() - before, 0.03);
}

TEST(Workers, TakeNoSignals) {
  Workers workers(3);
  std::vector<int> blocked(3);
  auto job = [&](int thread, int, Barrier &) {
    sigset_t set;
    pthread_sigmask(SIG_BLOCK, nullptr, &set);
    blocked[thread] = sigismember(&set, SIGTERM);
  };
  workers.run(job);
  EXPECT_EQ(blocked, (std::vector<int>{0, 1, 1}));  // the caller's own mask is left alone
}

TEST(Workers, ComeAndGo) {
  for (int i = 0; i < 200; ++i) {
    const Workers idle(1 + i % 5);  // never given a job
    Workers used(1 + i % 3);
    auto job = [](int, int, Barrier &) {};
    used.run(job);
  }
}

}  // namespace
}  // namespace ts
