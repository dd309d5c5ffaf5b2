#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>

namespace ts {

/// Names a full page by everything that its content depends on: its token ids, those of all pages before it, and the
/// salt of whoever may find it.
struct PageHash {
  uint64_t head = 0;
  uint64_t tail = 0;

  /// The name of what a cache group keeps of the page. Texts collide no more often than before: for two groups too the hashes
  /// differ by a polynomial of the key that is not zero.
  PageHash of_group(int32_t group) const { return {head, tail ^ static_cast<uint64_t>(group)}; }

  friend bool operator==(const PageHash &, const PageHash &) = default;
};

/// POLYVAL (RFC 8452, section 3) under a secret key, over a root and then the token ids (int32, little-endian, a page
/// padded with zeros to a multiple of 16 bytes). A page's hash is the sum so far, so that chaining by page costs nothing.
///
/// Two different texts of at most n 16-byte blocks have the same hash with a probability of at most (n + 1) / 2^128
/// over the choice of the key, because the difference of their polynomials has no more roots than that: 2^-114 for
/// 50,000 tokens, whatever they are. That is no collision resistance: who knows the key finds collisions at will. So the
/// key is drawn at start, stays in the process, and no hash leaves it; what callers can see is whether a page was found.
class PageHasher {
 public:
  enum class Path : uint8_t { best, narrow, portable };  ///< all but best, which the CPU decides, for tests

  explicit PageHasher(const PageHash &key, Path path = Path::best);

  /// What a first page continues. Different salts never share pages; the empty one is a salt like others.
  PageHash root(std::string_view salt) const;

  /// hashes[i] names the page of tokens [i * page_size, (i + 1) * page_size) behind `parent`.
  void pages(const PageHash &parent, std::span<const int32_t> tokens, int32_t page_size,
             std::span<PageHash> hashes) const;

 private:
  static constexpr size_t kMostBlocks = 16;  // of 16 bytes, reduced at once: a page of 64 tokens
  using Absorb = PageHash (*)(const std::array<PageHash, kMostBlocks> &powers, PageHash sum, const int32_t *tokens,
                              size_t num_tokens);

  std::array<PageHash, kMostBlocks> powers_;  // of the key, the 16th first
  Absorb absorb_;
};

/// This process's, with a key of its own.
const PageHasher &page_hasher();

}  // namespace ts
