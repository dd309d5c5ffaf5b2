#pragma once

#include <bit>
#include <cstdint>

/// exp and log in double arithmetic, made of +, -, *, / alone: the same bits on every host, whatever its libm. Compile
/// without contraction of a * b + c (-ffp-contract=off). Errors stay below 1e-15, relative.
namespace ts::detmath {

inline constexpr double kLog2e = 0x1.71547652b82fep+0;
inline constexpr double kLn2High = 0x1.62e42feep-1;       // 32 bits, so that its product with an exponent is exact
inline constexpr double kLn2Low = 0x1.a39ef35793c76p-33;  // ln 2 = high + low
inline constexpr double kRound = 0x1.8p+52;               // adding it rounds to an integer, held in the low bits

/// Two lanes of SSE2, which every x86-64 has.
using Pair = double __attribute__((vector_size(16)));
using PairBits = uint64_t __attribute__((vector_size(16)));

constexpr Pair pair_of(double x) { return Pair{x, x}; }

/// e^x in each lane, for x <= 709; 0 below -708.
inline Pair exp(Pair x) {
  const auto vanishes = x < -708.0;
  const Pair clamped = vanishes ? pair_of(-708.0) : x;
  const Pair shifted = clamped * kLog2e + kRound;
  const Pair k = shifted - kRound;
  const Pair r = (clamped - k * kLn2High) - k * kLn2Low;  // |r| <= ln 2 / 2
  Pair p = pair_of(1.0 / 6227020800.0);                   // Taylor's series to r^13; the next term is below 5e-18
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const PairBits scaled = std::bit_cast<PairBits>(p) + (std::bit_cast<PairBits>(shifted) << 52);  // p * 2^k
  return vanishes ? pair_of(0.0) : std::bit_cast<Pair>(scaled);
}

inline double exp(double x) { return exp(pair_of(x))[0]; }

/// The natural logarithm of a positive normal number.
inline double log(double x) {
  uint64_t bits = std::bit_cast<uint64_t>(x);
  auto exponent = static_cast<int64_t>(bits >> 52) - 1023;
  bits = (bits & 0x000fffffffffffff) | 0x3ff0000000000000;
  double m = std::bit_cast<double>(bits);  // [1, 2)
  if (m > 0x1.6a09e667f3bcdp+0) {          // sqrt(2): so that |s| <= 0.172
    m *= 0.5;
    ++exponent;
  }
  const double s = (m - 1.0) / (m + 1.0);  // log m = 2 (s + s^3/3 + s^5/5 + ...)
  const double z = s * s;
  double p = 1.0 / 23.0;
  for (const double n : {21.0, 19.0, 17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0}) p = p * z + 1.0 / n;
  const double log_m = 2.0 * s + 2.0 * s * z * p;
  const auto e = static_cast<double>(exponent);
  return e * kLn2High + (log_m + e * kLn2Low);
}

}  // namespace ts::detmath
