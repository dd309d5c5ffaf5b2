#pragma once

#include <array>
#include <charconv>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace ts {

/// A GPU's compute capability, such as 9.0.
struct Capability {
  int32_t major = 0, minor = 0;
  bool operator==(const Capability &) const = default;
  std::string text() const { return std::to_string(major) + "." + std::to_string(minor); }
};

/// Of a target's name: sm_90a's is 9.0, and only a GPU of this very capability runs it. Nothing of a target that is no NVIDIA GPU.
inline std::optional<Capability> capability_of(std::string_view target) {
  constexpr std::string_view kPrefix = "sm_";
  if (!target.starts_with(kPrefix)) return {};
  int32_t number = 0;
  const char *begin = target.data() + kPrefix.size(), *end = target.data() + target.size();
  if (std::from_chars(begin, end, number).ec != std::errc() || number < 10) return {};
  return Capability{number / 10, number % 10};
}

inline bool is_gpu_target(std::string_view target) { return capability_of(target).has_value(); }

/// Of AMD's GPUs, such as gfx950: a plan may hold them, nothing here runs them.
inline bool is_amd_target(std::string_view target) { return target.starts_with("gfx"); }

/// Targets of GPUs that a plan can be built for and this engine runs, for errors to name.
inline constexpr std::array<std::string_view, 2> kGpuTargets = {"sm_90a", "sm_100a"};

}  // namespace ts
