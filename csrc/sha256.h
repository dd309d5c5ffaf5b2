#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace ts {

using Digest = std::array<uint8_t, 32>;

/// SHA-256 (FIPS 180-4), with the CPU's SHA instructions where it has them.
class Sha256 {
 public:
  enum class Path : uint8_t { best, portable };  ///< portable: plain C++, for tests

  explicit Sha256(Path path = Path::best);
  void update(std::span<const uint8_t> bytes);
  Digest finish();  ///< once; the object is spent

  static bool accelerated();  ///< whether Path::best uses the SHA instructions

 private:
  using Compress = void (*)(std::array<uint32_t, 8> &state, const uint8_t *blocks, size_t count);

  Compress compress_;
  std::array<uint32_t, 8> state_;
  std::array<uint8_t, 64> pending_{};
  size_t num_pending_ = 0;
  uint64_t num_bytes_ = 0;
};

Digest sha256(std::span<const uint8_t> bytes);
std::string to_hex(const Digest &digest);
std::optional<Digest> from_hex(std::string_view text);  ///< 64 lowercase hexadecimal digits, or nothing

}  // namespace ts
