// What this machine can do at most, as one line of JSON: reads from memory, and products by each instruction set that it has.
// Usage: machine [threads]. Each figure is the best of several tries of about 0.2 s.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

namespace {

constexpr int kTries = 7;
constexpr size_t kReadBytes = size_t{1} << 30;  // far beyond any cache, all threads together
constexpr int kPasses = 4;                      // over those bytes, a try
constexpr int64_t kSteps = 60'000'000;          // of a peak loop, a try

double seconds(const std::function<void()> &work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// The best rate of `amount` a run, all threads running `work(thread)` at once.
double best_rate(int threads, double amount, const std::function<void(int)> &work) {
  double best = 0;
  for (int i = 0; i < kTries; ++i) {
    const double time = seconds([&] {
      std::vector<std::thread> all;
      for (int t = 0; t < threads; ++t) all.emplace_back(work, t);
      for (std::thread &thread : all) thread.join();
    });
    best = std::max(best, amount / time);
  }
  return best;
}

volatile float sink;  // keeps results alive

__attribute__((target("avx2"))) void read_all(const uint8_t *data, size_t size) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (size_t i = 0; i < size; i += 128) {
    const auto *p = reinterpret_cast<const __m256i *>(data + i);
    a = _mm256_xor_si256(a, _mm256_load_si256(p));
    b = _mm256_xor_si256(b, _mm256_load_si256(p + 1));
    c = _mm256_xor_si256(c, _mm256_load_si256(p + 2));
    d = _mm256_xor_si256(d, _mm256_load_si256(p + 3));
  }
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
  sink = static_cast<float>(_mm256_extract_epi32(all, 0));
}

// Twelve named accumulators: an array of them would spill.
#define TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

__attribute__((target("avx2,fma"))) void fma_avx2(int64_t steps) {
  const __m256 x = _mm256_set1_ps(0.999F), y = _mm256_set1_ps(0.001F);
#define X(i) __m256 c##i = _mm256_set1_ps(float(i));
  TWELVE(X)
#undef X
  for (int64_t step = 0; step < steps; ++step) {
#define X(i) c##i = _mm256_fmadd_ps(c##i, x, y);
    TWELVE(X)
#undef X
  }
  __m256 sum = x;
#define X(i) sum = _mm256_add_ps(sum, c##i);
  TWELVE(X)
#undef X
  sink = _mm256_cvtss_f32(sum);
}

__attribute__((target("avx512f"))) void fma_avx512(int64_t steps) {
  const __m512 x = _mm512_set1_ps(0.999F), y = _mm512_set1_ps(0.001F);
#define X(i) __m512 c##i = _mm512_set1_ps(float(i));
  TWELVE(X)
#undef X
  for (int64_t step = 0; step < steps; ++step) {
#define X(i) c##i = _mm512_fmadd_ps(c##i, x, y);
    TWELVE(X)
#undef X
  }
  __m512 sum = x;
#define X(i) sum = _mm512_add_ps(sum, c##i);
  TWELVE(X)
#undef X
  sink = _mm512_cvtss_f32(sum);
}

// Four accumulator tiles, two of A, two of B: 2 x 2 products a round.
__attribute__((target("amx-tile,amx-bf16"))) void amx_bf16(int64_t rounds) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_a_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  alignas(64) static const uint8_t zeros[1024] = {};
  asm volatile("" ::: "memory");  // gcc 12 thinks that the next line reads eight bytes
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

bool has_amx() {
  // AMX is asked for once a process: ARCH_REQ_XCOMP_PERM, XTILEDATA.
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

}  // namespace

int main(int argc, char **argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : static_cast<int>(std::thread::hardware_concurrency());
  if (threads < 1 || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::fprintf(stderr, "wanted: a positive number of threads, and a machine with AVX2 and FMA\n");
    return 1;
  }
  const size_t part = kReadBytes / static_cast<size_t>(threads) / 4096 * 4096;
  std::vector<uint8_t *> parts;
  for (int i = 0; i < threads; ++i) {
    parts.push_back(static_cast<uint8_t *>(std::aligned_alloc(4096, part)));
    std::fill_n(parts.back(), part, static_cast<uint8_t>(i + 1));
  }
  const auto bytes = static_cast<double>(part) * threads * kPasses;
  const auto read = [&](int t) {
    for (int pass = 0; pass < kPasses; ++pass) read_all(parts[static_cast<size_t>(t)], part);
  };
  std::printf("{\"threads\":%d,\"read_bytes_per_s\":%.0f", threads, best_rate(threads, bytes, read));
  const auto flops = [&](int lanes) { return 12.0 * 2 * lanes * kSteps * threads; };
  std::printf(",\"avx2_f32_flops_per_s\":%.0f", best_rate(threads, flops(8), [](int) { fma_avx2(kSteps); }));
  if (__builtin_cpu_supports("avx512f")) {
    std::printf(",\"avx512_f32_flops_per_s\":%.0f", best_rate(threads, flops(16), [](int) { fma_avx512(kSteps); }));
  }
  if (has_amx()) {
    constexpr double kTile = 2.0 * 16 * 16 * 32;
    std::printf(",\"amx_bf16_flops_per_s\":%.0f",
                best_rate(threads, 4 * kTile * (kSteps / 10) * threads, [](int) { amx_bf16(kSteps / 10); }));
  }
  std::printf("}\n");
  for (uint8_t *p : parts) std::free(p);
  return 0;
}
