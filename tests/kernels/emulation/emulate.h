// Intrinsics for hosts that lack them, included by templates/cpu/vec.h under TS_EMULATE: AVX-512 by SIMDe, on AVX2 halves, and the AMX
// tile instructions by the pseudo-code of Intel's manual (Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TILESTORED,
// TILEZERO, TDPBF16PS).
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>
#include <string.h>

namespace emulated {

// SIMDe reads and writes all sixteen lanes of a masked load or store; the instructions touch those of the mask alone.
inline __m512 maskz_loadu_ps(__mmask16 mask, const void *from) {
  float lanes[16] = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy(&lanes[i], (const char *)from + 4 * i, 4);
  }
  return _mm512_loadu_ps(lanes);
}
inline void mask_storeu_ps(void *to, __mmask16 mask, __m512 v) {
  float lanes[16];
  _mm512_storeu_ps(lanes, v);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy((char *)to + 4 * i, &lanes[i], 4);
  }
}

/// VPMOVDW, which SIMDe lacks: the lower half of each lane.
inline __m256i cvtepi32_epi16(__m512i v) {
  uint32_t lanes[16];
  uint16_t low[16];
  _mm512_storeu_si512(lanes, v);
  for (int i = 0; i < 16; ++i) low[i] = (uint16_t)lanes[i];
  __m256i result;
  memcpy(&result, low, sizeof result);
  return result;
}

constexpr int kTiles = 8, kMaxRows = 16, kMaxBytes = 64;

struct TileState {
  uint8_t palette = 0, rows[kTiles] = {};
  uint16_t bytes[kTiles] = {};  // of a row
  uint8_t data[kTiles][kMaxRows][kMaxBytes] = {};
};
inline thread_local TileState state;

inline void loadconfig(const void *memory) {
  const uint8_t *config = (const uint8_t *)memory;
  state = TileState();
  state.palette = config[0];
  if (config[0] != 1 || config[1] != 0) __builtin_trap();  // #GP: another palette, or start_row at rest
  for (int t = 0; t < kTiles; ++t) {
    memcpy(&state.bytes[t], config + 16 + 2 * t, 2);
    state.rows[t] = config[48 + t];
    if (state.bytes[t] > kMaxBytes || state.rows[t] > kMaxRows) __builtin_trap();
  }
}
inline void release() { state = TileState(); }

inline void need(int t) {
  if (state.palette != 1 || state.rows[t] == 0 || state.bytes[t] == 0) __builtin_trap();  // #UD: not configured
}

inline void zero(int t) {
  need(t);
  memset(state.data[t], 0, sizeof state.data[t]);
}
inline void loadd(int t, const void *base, long stride) {
  need(t);
  for (int row = 0; row < state.rows[t]; ++row) {
    memset(state.data[t][row], 0, kMaxBytes);
    memcpy(state.data[t][row], (const char *)base + row * stride, state.bytes[t]);
  }
}
inline void stored(int t, void *base, long stride) {
  need(t);
  for (int row = 0; row < state.rows[t]; ++row) memcpy((char *)base + row * stride, state.data[t][row], state.bytes[t]);
}

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}

/// TDPBF16PS: rounds to nearest even, takes denormals for zero and flushes them, whatever MXCSR says.
inline void dpbf16ps(int c, int a, int b) {
  need(a), need(b), need(c);
  if (state.rows[a] != state.rows[c] || state.bytes[a] != 4 * state.rows[b] || state.bytes[b] != state.bytes[c])
    __builtin_trap();
  const unsigned mxcsr = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8000 | 0x0040);
  const int columns = state.bytes[c] / 4;
  for (int m = 0; m < state.rows[c]; ++m) {
    float even[kMaxBytes / 4] = {}, odd[kMaxBytes / 4] = {}, sum[kMaxBytes / 4];
    for (int k = 0; k < state.rows[b]; ++k) {
      uint16_t left[2], right[kMaxBytes / 2];
      memcpy(left, state.data[a][m] + 4 * k, 4);
      memcpy(right, state.data[b][k], kMaxBytes);
      for (int n = 0; n < columns; ++n) {
        even[n] = __builtin_fmaf(from_bf16(left[0]), from_bf16(right[2 * n]), even[n]);
        odd[n] = __builtin_fmaf(from_bf16(left[1]), from_bf16(right[2 * n + 1]), odd[n]);
      }
    }
    memcpy(sum, state.data[c][m], kMaxBytes);
    for (int n = 0; n < columns; ++n) sum[n] += even[n] + odd[n];
    memcpy(state.data[c][m], sum, kMaxBytes);
  }
  _mm_setcsr(mxcsr);
}

}  // namespace emulated

#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::loadconfig
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::loadd
#define _tile_stored emulated::stored
#define _tile_dpbf16ps emulated::dpbf16ps
