#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "json.h"
#include "mesh.h"
#include "program.h"
#include "text.h"

namespace ts {

// What the files that parse a program (tsp/program/<target>) share. All throw TS_BAD_PLAN, naming the node.

/// An integer of [min, max] that is a multiple of `unit`.
inline int64_t multiple(const JsonNode &node, int64_t min, int64_t max, int64_t unit) {
  const int64_t value = node.integer(min, max);
  if (value % unit != 0) fail(TS_BAD_PLAN, node.where(), " is ", value, ", wanted a multiple of ", unit);
  return value;
}

inline int32_t find_axis(const JsonNode &node, std::string_view name, const Mesh &mesh) {
  const int32_t axis = mesh.find(name);
  if (axis < 0) fail(TS_BAD_PLAN, node.where(), " is ", in_quotes(node.text()), ", the mesh has ", mesh.text());
  return axis;
}

inline int32_t parse_axis(const JsonNode &node, const Mesh &mesh) { return find_axis(node, node.text(), mesh); }

/// The one of `words` that the node says.
template <class Value, size_t N>
Value word_of(const JsonNode &node, const std::array<std::pair<std::string_view, Value>, N> &words) {
  const std::string &text = node.text();
  const auto found = std::ranges::find(words, text, [](const auto &pair) { return pair.first; });
  if (found != words.end()) return found->second;
  std::string wanted;
  for (const auto &[word, value] : words) wanted += (wanted.empty() ? "" : ", ") + std::string(word);
  fail(TS_BAD_PLAN, node.where(), " is ", in_quotes(text), ", wanted one of ", wanted);
}

inline void check_count(const JsonNode &node, size_t min, size_t max) {
  if (node.size() < min || node.size() > max) {
    fail(TS_BAD_PLAN, node.where(), " has ", node.size(), " items, wanted ", min, " to ", max);
  }
}

inline constexpr int32_t kGpuAbi =
    1;  ///< of a GPU target's program: raised with every change of what its kernels are given

/// Those of a GPU target's program: `library` is where their cubins lie.
std::map<std::string, GpuKernel, std::less<>> parse_gpu_kernels(const JsonNode &node, std::span<const uint8_t> library);

/// An argument that only a GPU's kernel is given, if the node is one.
std::optional<Argument> parse_gpu_argument(const JsonNode &node);

/// A launch of a GPU target, but for its arguments and what follows from them.
Launch parse_gpu_launch(const JsonNode &node, const Program &program);

/// What a collective's launch does, but for its arguments.
Collective parse_collective_fields(const JsonNode &node, const Mesh &mesh);

}  // namespace ts
