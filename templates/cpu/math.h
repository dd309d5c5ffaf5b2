// The functions that kernels share: one polynomial for exp, and what is made of it. Sixteen lanes, f32.
#pragma once

#include "vec.h"

namespace {

/// e^x within 1 ulp; 0 below -87.33 (the least normal result), infinity above 88.72, NaN of NaN. exp(0) is 1 exactly.
/// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts (Cody and Waite); the polynomial is Cephes' expf, in FMA.
TS_INLINE f32x16 exp(f32x16 x) {
  const f32x16 lowest = splat(-87.3365402f), highest = splat(88.7228317f);
  const f32x16 clamped = min(highest, max(lowest, x));  // a NaN passes: it is the second operand
  const f32x16 n = nearest(mul(clamped, splat(1.44269504f)));
  const f32x16 r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), clamped));
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), splat(1.0f));
  // n may be 128, which is no exponent: then 2^127, twice
  const f32x16 most = splat(127.0f);
  const f32x16 power = floats(add_bits(splat_bits(0x3f800000), shift_left<23>(to_integer(min(n, most)))));
  const f32x16 y = mul(mul(p, power), select(less(most, n), splat(2.0f), splat(1.0f)));
  return select(less(x, lowest), zero(), select(less(highest, x), splat(__builtin_inff()), y));
}

TS_INLINE f32x16 neg(f32x16 x) { return sub(splat(-0.0f), x); }
TS_INLINE f32x16 sigmoid(f32x16 x) { return div(splat(1.0f), add(splat(1.0f), exp(neg(x)))); }
TS_INLINE f32x16 silu(f32x16 x) { return mul(x, sigmoid(x)); }

/// 0.5 x (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x sigmoid(2 u).
TS_INLINE f32x16 gelu_tanh(f32x16 x) {
  const f32x16 cube = mul(mul(x, x), x);
  return mul(x, sigmoid(mul(splat(1.59576912f), fma(splat(0.044715f), cube, x))));
}

TS_INLINE f32x16 relu(f32x16 x) { return max(zero(), x); }  // NaN of NaN

}  // namespace
