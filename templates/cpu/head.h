// What qkv_write, rope and kv_write do to one head: norm, RoPE, and its way into the KV cache (ARCHITECTURE.md, "The KV cache").
// A head lies in a local row of f32, padded with zeros to a multiple of 32.
#pragma once

#include "math.h"

namespace {

/// from[D] -> row, zeros behind.
template <int D, class T>
TS_INLINE void load_head(const T *from, float *row) {
  constexpr int kPadded = (int)round_up(D, 32), kWhole = D / 16 * 16;
  for (int i = kWhole; i < kPadded; i += 16) store(row + i, zero());
  for (int i = 0; i < kWhole; i += 16) store(row + i, load(from + i));
  if constexpr (kWhole < D) store(row + kWhole, load_n(from + kWhole, D - kWhole));
}

template <int D, class T>
TS_INLINE void store_head(T *to, const float *row) {
  constexpr int kWhole = D / 16 * 16;
  for (int i = 0; i < kWhole; i += 16) store(to + i, load(row + i));
  if constexpr (kWhole < D) store_n(to + kWhole, load(row + kWhole), D - kWhole);
}

/// row = row / sqrt(mean(row^2) + eps) * weight. Both have zeros behind, to a multiple of 16.
template <int D>
TS_INLINE void norm_head(float *row, const float *weight, float eps) {
  f32x16 squares = zero();
  for (int i = 0; i < D; i += 16) squares = fma(load(row + i), load(row + i), squares);
  const f32x16 inverse = div(splat(1.0f), sqrt(splat(reduce_add(squares) / (float)D + eps)));
  for (int i = 0; i < D; i += 16) store(row + i, mul(mul(load(row + i), inverse), load(weight + i)));
}

/// Rotates (i, i + R / 2) for i < R / 2 by the angle whose cosines and sines `angles` holds: cos[R / 2], sin[R / 2]. INTERLEAVED: the
/// pair is (2i, 2i + 1), and goes to (i, i + R / 2).
template <int R, bool INTERLEAVED = false>
TS_INLINE void rotate_head(float *row, const float *angles) {
  constexpr int kHalf = R / 2;
  if constexpr (INTERLEAVED) {
    float pairs[R];
    for (int i = 0; i < R; ++i) pairs[i] = row[i];
    for (int i = 0; i < kHalf; ++i) {
      row[i] = pairs[2 * i];
      row[kHalf + i] = pairs[2 * i + 1];
    }
  }
  for (int i = 0; i < kHalf; i += 16) {
    const int n = kHalf - i < 16 ? kHalf - i : 16;
    const f32x16 cosine = load_n(angles + i, n), sine = load_n(angles + kHalf + i, n);
    const f32x16 x = load_n(row + i, n), y = load_n(row + kHalf + i, n);
    store_n(row + i, sub(mul(x, cosine), mul(y, sine)), n);
    store_n(row + kHalf + i, add(mul(y, cosine), mul(x, sine)), n);
  }
}

template <class T, int D, int PAGE>
struct Cache {
  static constexpr int kPadded = (int)round_up(D, 32);
  static constexpr int64_t kHalf = (int64_t)kPadded * PAGE;  // elements of one head's K, or V, in a page

  /// K of `head` in the page of `slot`; V is kHalf elements on.
  TS_INLINE static T *at(void *cache, int64_t slot, int head, int heads) {
    return (T *)cache + (slot / PAGE * heads + head) * 2 * kHalf;
  }
};

/// Where a token lies in a cache that holds part `part` of the context, for its slot in pages of PARTS * PAGE tokens; negative if it is
/// not of that part.
template <int PAGE, int PARTS>
TS_INLINE int64_t own_slot(int64_t slot, int64_t part) {
  if constexpr (PARTS == 1) {
    return slot;
  } else {
    const int64_t page = slot / (PAGE * PARTS), at = slot % (PAGE * PARTS) - part * PAGE;
    return at >= 0 && at < PAGE ? page * PAGE + at : -1;
  }
}

// bf16: K [D/2][PAGE][2], V [PAGE/2][D][2]. The padding of D is written too: zeros.

template <int D, int PAGE>
TS_INLINE void write_k(bf16 *k, int64_t slot, const float *row) {
  constexpr int kPadded = Cache<bf16, D, PAGE>::kPadded;
  bf16 narrow[kPadded];
  for (int i = 0; i < kPadded; i += 16) store(narrow + i, load(row + i));
  bf16 *to = k + slot % PAGE * 2;
  for (int i = 0; i < kPadded; i += 2, to += 2 * PAGE) {
    to[0] = narrow[i];
    to[1] = narrow[i + 1];
  }
}
template <int D, int PAGE>
TS_INLINE void write_v(bf16 *v, int64_t slot, const float *row) {
  constexpr int kPadded = Cache<bf16, D, PAGE>::kPadded;
  bf16 narrow[kPadded];
  for (int i = 0; i < kPadded; i += 16) store(narrow + i, load(row + i));
  // the neighbour's element between two of ours may be another thread's: nothing wider than ours is written
  bf16 *to = v + slot % PAGE / 2 * (2 * kPadded) + slot % 2;
  for (int i = 0; i < kPadded; ++i) to[2 * i] = narrow[i];
}

// f32: K [D][PAGE], V [PAGE][D].

template <int D, int PAGE>
TS_INLINE void write_k(float *k, int64_t slot, const float *row) {
  for (int i = 0; i < Cache<float, D, PAGE>::kPadded; ++i) k[i * PAGE + slot % PAGE] = row[i];
}
template <int D, int PAGE>
TS_INLINE void write_v(float *v, int64_t slot, const float *row) {
  constexpr int kPadded = Cache<float, D, PAGE>::kPadded;
  for (int i = 0; i < kPadded; i += 16) store(v + slot % PAGE * kPadded + i, load(row + i));
}

}  // namespace
