// The cache of latents (ARCHITECTURE.md, "The KV cache"): a page lies as the values of attention do, and its keys are brought into the
// order of keys a block at a time. D is a row's elements, padded to a multiple of 32.
#pragma once

#include "vec.h"

namespace {

/// Four rows of four 64-bit units -> four columns.
TS_INLINE void transpose_units(const __m256i *rows, __m256i *columns) {
  const __m256i a = _mm256_unpacklo_epi64(rows[0], rows[1]), b = _mm256_unpackhi_epi64(rows[0], rows[1]);
  const __m256i c = _mm256_unpacklo_epi64(rows[2], rows[3]), d = _mm256_unpackhi_epi64(rows[2], rows[3]);
  columns[0] = _mm256_permute2x128_si256(a, c, 0x20);
  columns[1] = _mm256_permute2x128_si256(b, d, 0x20);
  columns[2] = _mm256_permute2x128_si256(a, c, 0x31);
  columns[3] = _mm256_permute2x128_si256(b, d, 0x31);
}

/// BLOCK keys of a page from `first` on: [key / 2][D][2] -> [D / 2][BLOCK][2].
template <int D, int BLOCK>
TS_INLINE void key_order(const bf16 *page, int64_t first, bf16 *to) {
  // a unit is two keys of two elements: k0d0 k1d0 k0d1 k1d1, wanted k0d0 k0d1 k1d0 k1d1
  const __m256i swap = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10,
                                        11, 14, 15);
  const bf16 *from = page + first * D;
  for (int d = 0; d < D; d += 8) {
    for (int key = 0; key < BLOCK; key += 8) {
      __m256i rows[4], columns[4];
      for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)(from + (key + 2 * i) * D + 2 * d)), swap);
      }
      transpose_units(rows, columns);
      for (int i = 0; i < 4; ++i) _mm256_storeu_si256((__m256i *)(to + (d + 2 * i) * BLOCK + 2 * key), columns[i]);
    }
  }
}

/// The same for f32: [key][D] -> [D][BLOCK].
template <int D, int BLOCK>
TS_INLINE void key_order(const float *page, int64_t first, float *to) {
  for (int key = 0; key < BLOCK; ++key) {
    for (int d = 0; d < D; ++d) to[d * BLOCK + key] = page[(first + key) * D + d];
  }
}

}  // namespace
