#pragma once

#include <chrono>
#include <cstdint>

namespace ts {

/// Of a clock that never goes back, since whenever.
inline uint64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

inline int64_t now_ms() { return static_cast<int64_t>(now_ns() / 1'000'000); }

}  // namespace ts
