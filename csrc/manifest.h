#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "mesh.h"
#include "plan.h"
#include "sha256.h"

namespace ts {

inline constexpr int64_t kPlanSchema = 3;

/// Throws Error (TS_BAD_PLAN) that tells who must be newer, unless `found` is kPlanSchema.
void check_schema(int64_t found, std::string_view where);

enum class EntryKind : uint8_t { weight, program, kernels, text, report };

/// What the manifest says of one entry.
struct ManifestEntry {
  std::string dtype;
  std::vector<int64_t> shape;
  uint64_t bytes = 0;
  Digest sha256{};
  EntryKind kind = EntryKind::weight;
};

struct Manifest {
  ModelInfo model;
  Mesh mesh;
  std::vector<std::string> targets;
  std::map<std::string, ManifestEntry, std::less<>> entries;  ///< all but tsp/manifest and tsp/seal
};

/// Parses `tsp/manifest` and checks what can be checked without the file: schema, model facts, names against kinds, and that
/// every target has its program and kernels. Throws Error (TS_BAD_PLAN).
Manifest parse_manifest(std::span<const uint8_t> bytes);

}  // namespace ts
