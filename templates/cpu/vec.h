// Sixteen f32 lanes on every target: one AVX-512 register, or two of AVX2. Kernels are written once, in these words, and so give the
// same bits everywhere (ARCHITECTURE.md, "One order of arithmetic"). TS_AVX512 chooses; TS_EMULATE takes the AVX-512 and AMX
// intrinsics from the tests' emulate.h, for hosts that lack them.
#pragma once

#include <stdint.h>
#ifdef TS_EMULATE
#include "emulate.h"
#define TS_INLINE inline __attribute__((unused))  // thousands of inlined emulations would compile for a minute
#else
#include <immintrin.h>
#define TS_INLINE inline __attribute__((always_inline, unused))
#endif
#define TS_NOINLINE static __attribute__((noinline, unused))
#define TS_KERNEL extern "C" __attribute__((visibility("default"))) void

namespace {

struct bf16 {
  uint16_t bits;
};

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
TS_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TS_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/// The part of n units that `thread` of `threads` takes: units first..last - 1.
struct Share {
  int64_t first, last;
  Share(int64_t n, int thread, int threads) : first(n * thread / threads), last(n * (thread + 1) / threads) {}
};

// ---- one 8-lane half, shared by both: the fixed tree 8 -> 4 -> 2 -> 1, lane i with i + half -----------------------------------------

TS_INLINE float tree_add(__m256 v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}

TS_INLINE float tree_max(__m256 v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

#if TS_AVX512

typedef __m512 f32x16;
typedef __m512i u32x16;
typedef __mmask16 mask16;

TS_INLINE f32x16 zero() { return _mm512_setzero_ps(); }
TS_INLINE f32x16 splat(float x) { return _mm512_set1_ps(x); }
TS_INLINE f32x16 load(const float *p) { return _mm512_loadu_ps(p); }
TS_INLINE void store(float *p, f32x16 v) { _mm512_storeu_ps(p, v); }
TS_INLINE f32x16 add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
TS_INLINE f32x16 sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
TS_INLINE f32x16 mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
TS_INLINE f32x16 div(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
TS_INLINE f32x16 sqrt(f32x16 a) { return _mm512_sqrt_ps(a); }
TS_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
/// The second operand if either is NaN, as the instruction has it. The same for min.
TS_INLINE f32x16 max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
TS_INLINE f32x16 min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
TS_INLINE f32x16 nearest(f32x16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

TS_INLINE mask16 less(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
TS_INLINE mask16 is_nan(f32x16 a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
/// Lanes first..last - 1.
TS_INLINE mask16 lanes(int64_t first, int64_t last) {
  const uint32_t below = last >= 16 ? 0xffff : last <= 0 ? 0 : (1u << last) - 1;
  return (mask16)(first >= 16 ? 0 : first <= 0 ? below : below & (~0u << first));
}
TS_INLINE f32x16 select(mask16 m, f32x16 yes, f32x16 no) { return _mm512_mask_blend_ps(m, no, yes); }

TS_INLINE u32x16 bits(f32x16 v) { return _mm512_castps_si512(v); }
TS_INLINE f32x16 floats(u32x16 v) { return _mm512_castsi512_ps(v); }
TS_INLINE u32x16 splat_bits(uint32_t x) { return _mm512_set1_epi32((int)x); }
TS_INLINE u32x16 load_bits(const void *p) { return _mm512_loadu_si512(p); }
TS_INLINE void store_bits(void *p, u32x16 v) { _mm512_storeu_si512(p, v); }
TS_INLINE u32x16 add_bits(u32x16 a, u32x16 b) { return _mm512_add_epi32(a, b); }
TS_INLINE u32x16 and_bits(u32x16 a, u32x16 b) { return _mm512_and_si512(a, b); }
TS_INLINE u32x16 select_bits(mask16 m, u32x16 yes, u32x16 no) { return _mm512_mask_blend_epi32(m, no, yes); }
template <int N>
TS_INLINE u32x16 shift_left(u32x16 a) {
  return _mm512_slli_epi32(a, N);
}
template <int N>
TS_INLINE u32x16 shift_right(u32x16 a) {
  return _mm512_srli_epi32(a, N);
}
TS_INLINE u32x16 to_integer(f32x16 a) { return _mm512_cvtps_epi32(a); }
TS_INLINE u32x16 widen(const bf16 *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
TS_INLINE void narrow(bf16 *p, u32x16 v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(v)); }

TS_INLINE float reduce_add(f32x16 v) {
  return tree_add(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}
TS_INLINE float reduce_max(f32x16 v) {
  return tree_max(_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}

// The first n of 16, 0 < n <= 16; lanes past n read as zero and are not written.
TS_INLINE f32x16 load_n(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(lanes(0, n), p); }
TS_INLINE void store_n(float *p, f32x16 v, int64_t n) { _mm512_mask_storeu_ps(p, lanes(0, n), v); }

#else  // AVX2

struct f32x16 {
  __m256 lo, hi;
};
struct u32x16 {
  __m256i lo, hi;
};
struct mask16 {
  __m256 lo, hi;
};

TS_INLINE f32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
TS_INLINE f32x16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
TS_INLINE f32x16 load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TS_INLINE void store(float *p, f32x16 v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
TS_INLINE f32x16 add(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
TS_INLINE f32x16 sub(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
TS_INLINE f32x16 mul(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
TS_INLINE f32x16 div(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
TS_INLINE f32x16 sqrt(f32x16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
TS_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
TS_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
TS_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
TS_INLINE f32x16 nearest(f32x16 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}

TS_INLINE mask16 less(f32x16 a, f32x16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
TS_INLINE mask16 is_nan(f32x16 a) {
  return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
}
TS_INLINE __m256i lanes_of_half(int64_t first, int64_t last, __m256i lane) {
  const __m256i from = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32((int)first - 1));
  return _mm256_and_si256(from, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)last), lane));
}
TS_INLINE mask16 lanes(int64_t first, int64_t last) {
  const int64_t start = least(most(first, 0), 16), stop = least(most(last, 0), 16);
  return {_mm256_castsi256_ps(lanes_of_half(start, stop, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))),
          _mm256_castsi256_ps(lanes_of_half(start, stop, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)))};
}
TS_INLINE f32x16 select(mask16 m, f32x16 yes, f32x16 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}

TS_INLINE u32x16 bits(f32x16 v) { return {_mm256_castps_si256(v.lo), _mm256_castps_si256(v.hi)}; }
TS_INLINE f32x16 floats(u32x16 v) { return {_mm256_castsi256_ps(v.lo), _mm256_castsi256_ps(v.hi)}; }
TS_INLINE u32x16 splat_bits(uint32_t x) { return {_mm256_set1_epi32((int)x), _mm256_set1_epi32((int)x)}; }
TS_INLINE u32x16 load_bits(const void *p) {
  return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
TS_INLINE void store_bits(void *p, u32x16 v) {
  _mm256_storeu_si256((__m256i *)p, v.lo);
  _mm256_storeu_si256((__m256i *)p + 1, v.hi);
}
TS_INLINE u32x16 add_bits(u32x16 a, u32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
TS_INLINE u32x16 and_bits(u32x16 a, u32x16 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
TS_INLINE u32x16 select_bits(mask16 m, u32x16 yes, u32x16 no) { return bits(select(m, floats(yes), floats(no))); }
template <int N>
TS_INLINE u32x16 shift_left(u32x16 a) {
  return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)};
}
template <int N>
TS_INLINE u32x16 shift_right(u32x16 a) {
  return {_mm256_srli_epi32(a.lo, N), _mm256_srli_epi32(a.hi, N)};
}
TS_INLINE u32x16 to_integer(f32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
TS_INLINE u32x16 widen(const bf16 *p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)),
          _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p + 1))};
}
TS_INLINE void narrow(bf16 *p, u32x16 v) {
  // packus works within 128-bit lanes: put the four quarters in order
  _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(v.lo, v.hi), 0xd8));
}

TS_INLINE float reduce_add(f32x16 v) { return tree_add(_mm256_add_ps(v.lo, v.hi)); }
TS_INLINE float reduce_max(f32x16 v) { return tree_max(_mm256_max_ps(v.lo, v.hi)); }

TS_INLINE f32x16 load_n(const float *p, int64_t n) {
  const mask16 m = lanes(0, n);
  return {_mm256_maskload_ps(p, _mm256_castps_si256(m.lo)), _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.hi))};
}
TS_INLINE void store_n(float *p, f32x16 v, int64_t n) {
  const mask16 m = lanes(0, n);
  _mm256_maskstore_ps(p, _mm256_castps_si256(m.lo), v.lo);
  _mm256_maskstore_ps(p + 8, _mm256_castps_si256(m.hi), v.hi);
}

#endif

// ---- bf16: a load is exact, a store rounds to nearest even; any NaN becomes 0x7fc0 -------------------------------------------------

/// The bits of v rounded to bf16, in the upper half of each lane; the lower half is zero.
TS_INLINE u32x16 rounded(f32x16 v) {
  const u32x16 u = bits(v);
  const u32x16 last = and_bits(shift_right<16>(u), splat_bits(1));
  const u32x16 sum = add_bits(u, add_bits(last, splat_bits(0x7fff)));
  return and_bits(select_bits(is_nan(v), splat_bits(0x7fc00000), sum), splat_bits(0xffff0000));
}

TS_INLINE f32x16 load(const bf16 *p) { return floats(shift_left<16>(widen(p))); }
TS_INLINE void store(bf16 *p, f32x16 v) { narrow(p, shift_right<16>(rounded(v))); }

TS_INLINE f32x16 load_n(const bf16 *p, int64_t n) {
  if (n >= 16) return load(p);
  bf16 whole[16] = {};
  for (int64_t i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}
TS_INLINE void store_n(bf16 *p, f32x16 v, int64_t n) {
  if (n >= 16) return store(p, v);
  bf16 whole[16];
  store(whole, v);
  for (int64_t i = 0; i < n; ++i) p[i] = whole[i];
}

/// v as a T would hold it.
template <class T>
TS_INLINE f32x16 round_to(f32x16 v);
template <>
TS_INLINE f32x16 round_to<float>(f32x16 v) {
  return v;
}
template <>
TS_INLINE f32x16 round_to<bf16>(f32x16 v) {
  return floats(rounded(v));
}

/// One element, for scattered reads: exact.
TS_INLINE float load_one(const float *p) { return *p; }
TS_INLINE float load_one(const bf16 *p) {
  const uint32_t u = (uint32_t)p->bits << 16;
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

// ---- a pair of rows of a product's right operand: elements k and k + 1 of 16 columns ------------------------------------------------

/// bf16: sixteen times (k, k + 1). f32: sixteen of k, and `half` elements further sixteen of k + 1.
TS_INLINE f32x16 load_even(const bf16 *p, int64_t) { return floats(shift_left<16>(load_bits(p))); }
TS_INLINE f32x16 load_odd(const bf16 *p, int64_t) { return floats(and_bits(load_bits(p), splat_bits(0xffff0000))); }
TS_INLINE f32x16 load_even(const float *p, int64_t) { return load(p); }
TS_INLINE f32x16 load_odd(const float *p, int64_t half) { return load(p + half); }

}  // namespace
