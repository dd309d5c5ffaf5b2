#include "page_hash.h"

#include <immintrin.h>
#include <sys/random.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "check.h"
#include "sha256.h"
#include "text.h"

namespace ts {

static_assert(std::endian::native == std::endian::little, "page hashes are defined over little-endian token ids");

namespace {

constexpr size_t kBlock = 4;  // tokens

PageHash operator^(const PageHash &a, const PageHash &b) { return {a.head ^ b.head, a.tail ^ b.tail}; }

/// a * b * x^-128 in GF(2^128) by x^128 + x^127 + x^126 + x^121 + 1; bit i of head, then tail, is the coefficient of x^i.
PageHash dot(const PageHash &a, const PageHash &b) {
  PageHash r;
  for (int i = 0; i < 128; ++i) {
    if (((i < 64 ? a.head : a.tail) >> (i % 64) & 1) != 0) r = r ^ b;
    const bool odd = (r.head & 1) != 0;  // then + the polynomial, and divide by x
    r.head = r.head >> 1 | r.tail << 63;
    r.tail >>= 1;
    if (odd) r.tail ^= uint64_t{0xE1} << 56;
  }
  return r;
}

PageHash block_of(const int32_t *tokens, size_t num_tokens) {
  PageHash block;
  std::memcpy(static_cast<void *>(&block), tokens, std::min(num_tokens, kBlock) * sizeof(int32_t));
  return block;
}

template <size_t N>
PageHash absorb_portable(const std::array<PageHash, N> &powers, PageHash sum, const int32_t *tokens,
                         size_t num_tokens) {
  for (size_t i = 0; i < num_tokens; i += kBlock) sum = dot(sum ^ block_of(tokens + i, num_tokens - i), powers[N - 1]);
  return sum;
}

#define TS_TARGET(features) __attribute__((target(features)))
#define TS_INLINE inline __attribute__((always_inline))

TS_INLINE __m128i load(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }

/// low + middle x^64 + high x^128, times x^-128: Gueron and Lindell's reduction, as in RFC 8452's references.
TS_TARGET("pclmul,sse4.1") TS_INLINE PageHash reduce(__m128i low, __m128i middle, __m128i high) {
  low = _mm_xor_si128(low, _mm_slli_si128(middle, 8));
  high = _mm_xor_si128(high, _mm_srli_si128(middle, 8));
  const __m128i polynomial = _mm_set_epi64x(static_cast<int64_t>(uint64_t{0xC2} << 56), 0);
  for (int i = 0; i < 2; ++i) {
    low = _mm_xor_si128(_mm_shuffle_epi32(low, 0x4E), _mm_clmulepi64_si128(low, polynomial, 0x10));
  }
  PageHash result;
  _mm_storeu_si128(reinterpret_cast<__m128i *>(&result), _mm_xor_si128(low, high));
  return result;
}

/// A sum of products, reduced once for all of them.
struct Sum {
  __m128i low, middle, high;

  TS_TARGET("pclmul,sse4.1") TS_INLINE void add(__m128i a, __m128i b) {
    low = _mm_xor_si128(low, _mm_clmulepi64_si128(a, b, 0x00));
    high = _mm_xor_si128(high, _mm_clmulepi64_si128(a, b, 0x11));
    middle = _mm_xor_si128(middle, _mm_clmulepi64_si128(a, b, 0x01));
    middle = _mm_xor_si128(middle, _mm_clmulepi64_si128(a, b, 0x10));
  }
};

/// The sum of a vector's four lanes of 128 bits: through memory, where they are for every compiler.
TS_TARGET("avx512f,avx512dq,avx512vl") TS_INLINE __m128i folded(__m512i v) {
  alignas(64) std::array<PageHash, 4> lanes;
  _mm512_store_si512(lanes.data(), v);
  return _mm_xor_si128(_mm_xor_si128(load(&lanes[0]), load(&lanes[1])),
                       _mm_xor_si128(load(&lanes[2]), load(&lanes[3])));
}

template <size_t N>
TS_TARGET("pclmul,sse4.1")
PageHash
    absorb_clmul(const std::array<PageHash, N> &powers, PageHash before, const int32_t *tokens, size_t num_tokens) {
  Sum sum{_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
  const PageHash *power = &powers[N - (num_tokens + kBlock - 1) / kBlock];
  const PageHash first = before ^ block_of(tokens, num_tokens);
  sum.add(load(&first), load(power++));
  size_t i = kBlock;
  for (; i + kBlock <= num_tokens; i += kBlock) sum.add(load(tokens + i), load(power++));
  if (i < num_tokens) {
    const PageHash padded = block_of(tokens + i, num_tokens - i);
    sum.add(load(&padded), load(power));
  }
  return reduce(sum.low, sum.middle, sum.high);
}

/// The same for pages of a multiple of 16 tokens, four blocks at a time.
template <size_t N>
TS_TARGET("pclmul,sse4.1,vpclmulqdq,avx512f,avx512vl,avx512dq")
PageHash absorb_wide(const std::array<PageHash, N> &powers, PageHash before, const int32_t *tokens, size_t num_tokens) {
  if (num_tokens % (4 * kBlock) != 0) return absorb_clmul<N>(powers, before, tokens, num_tokens);
  const PageHash *power = &powers[N - num_tokens / kBlock];
  const __m128i first = load(power);
  __m512i low = _mm512_setzero_si512(), middle = low, high = low;
  for (size_t i = 0; i < num_tokens; i += 4 * kBlock, power += 4) {
    const __m512i a = _mm512_loadu_si512(tokens + i), b = _mm512_loadu_si512(power);
    low = _mm512_xor_si512(low, _mm512_clmulepi64_epi128(a, b, 0x00));
    high = _mm512_xor_si512(high, _mm512_clmulepi64_epi128(a, b, 0x11));
    middle = _mm512_xor_si512(middle, _mm512_clmulepi64_epi128(a, b, 0x01));
    middle = _mm512_xor_si512(middle, _mm512_clmulepi64_epi128(a, b, 0x10));
  }
  Sum sum{folded(low), folded(middle), folded(high)};
  sum.add(load(&before), first);  // last: it waits for the page before
  return reduce(sum.low, sum.middle, sum.high);
}

PageHash random_key() {
  PageHash key;
  while (key == PageHash{}) {
    if (getrandom(&key, sizeof(key), 0) == sizeof(key)) continue;
    if (errno != EINTR) fail(TS_IO, "getrandom: ", std::strerror(errno));
    key = {};
  }
  return key;
}

}  // namespace

PageHasher::PageHasher(const PageHash &key, Path path) : absorb_(absorb_portable<kMostBlocks>) {
  TS_ASSERT(key != PageHash{}, "every text has the same hash under the key 0");
  powers_.back() = key;
  for (size_t i = kMostBlocks - 1; i > 0; --i) powers_[i - 1] = dot(powers_[i], key);
  const bool narrow = __builtin_cpu_supports("pclmul") != 0 && __builtin_cpu_supports("sse4.1") != 0;
  const bool wide = narrow && __builtin_cpu_supports("vpclmulqdq") != 0 && __builtin_cpu_supports("avx512vl") != 0 &&
                    __builtin_cpu_supports("avx512dq") != 0;
  if (narrow && path != Path::portable) absorb_ = absorb_clmul<kMostBlocks>;
  if (wide && path == Path::best) absorb_ = absorb_wide<kMostBlocks>;
}

PageHash PageHasher::root(std::string_view salt) const {
  // Through SHA-256, so that roots are as different as salts, and of one block.
  const Digest digest = sha256({reinterpret_cast<const uint8_t *>(salt.data()), salt.size()});
  PageHash block;
  std::memcpy(static_cast<void *>(&block), digest.data(), sizeof(block));
  return dot(block, powers_.back());
}

void PageHasher::pages(const PageHash &parent, std::span<const int32_t> tokens, int32_t page_size,
                       std::span<PageHash> hashes) const {
  const auto size = static_cast<size_t>(page_size);
  TS_ASSERT(tokens.size() == hashes.size() * size, "only full pages have hashes");
  PageHash sum = parent;
  for (PageHash &hash : hashes) {
    for (size_t i = 0; i < size; i += kMostBlocks * kBlock) {
      sum = absorb_(powers_, sum, tokens.data() + i, std::min(size - i, kMostBlocks * kBlock));
    }
    hash = sum;
    tokens = tokens.subspan(size);
  }
}

const PageHasher &page_hasher() {
  static const PageHasher hasher(random_key());
  return hasher;
}

}  // namespace ts
