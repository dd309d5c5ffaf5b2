#include "manifest.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "json.h"
#include "text.h"

namespace ts {
namespace {

constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxContext = 1 << 26;
constexpr size_t kMaxTargets = 16;
constexpr size_t kMaxAxes = 8;
constexpr size_t kMaxAxisBytes = 15;
constexpr int64_t kMaxRanks = 256;
constexpr size_t kMaxTargetBytes = 31;  // ts_stats.target
constexpr std::string_view kReserved = "tsp/";
constexpr std::string_view kProgram = "tsp/program/";
constexpr std::string_view kKernels = "tsp/kernels/";
constexpr std::string_view kText = "tsp/text/";

constexpr std::array<std::pair<std::string_view, EntryKind>, 5> kKinds = {{{"weight", EntryKind::weight},
                                                                           {"program", EntryKind::program},
                                                                           {"kernels", EntryKind::kernels},
                                                                           {"text", EntryKind::text},
                                                                           {"report", EntryKind::report}}};

EntryKind kind_of_name(std::string_view name) {
  if (name.starts_with(kProgram)) return EntryKind::program;
  if (name.starts_with(kKernels)) return EntryKind::kernels;
  if (name.starts_with(kText)) return EntryKind::text;
  return name.starts_with(kReserved) ? EntryKind::report : EntryKind::weight;
}

ModelInfo parse_model(const JsonNode &node) {
  ModelInfo model;
  model.name = node["name"].text();
  model.vocab_size = static_cast<int32_t>(node["vocab_size"].integer(1, kMaxVocab));
  model.max_context = static_cast<int32_t>(node["max_context"].integer(1, kMaxContext));
  const JsonNode ends = node["eos_token_ids"];
  for (size_t i = 0; i < ends.size(); ++i) {
    model.eos_token_ids.push_back(static_cast<int32_t>(ends.at(i).integer(0, model.vocab_size - 1)));
  }
  return model;
}

/// Axes of different names whose sizes have a product of at most kMaxRanks.
Mesh parse_mesh(const JsonNode &node) {
  if (node.size() == 0 || node.size() > kMaxAxes) {
    fail(TS_BAD_PLAN, node.where(), " has ", node.size(), " axes, wanted 1 to ", kMaxAxes);
  }
  Mesh mesh;
  for (size_t i = 0; i < node.size(); ++i) {
    const JsonNode item = node.at(i);
    if (item.size() != 2) fail(TS_BAD_PLAN, item.where(), " has ", item.size(), " items, wanted a name and a size");
    const JsonNode name = item.at(0);
    const std::string &word = name.text();
    const bool plain = std::ranges::all_of(word, [](char c) { return (c >= 'a' && c <= 'z') || c == '_'; });
    if (word.empty() || word.size() > kMaxAxisBytes || !plain) {
      fail(TS_BAD_PLAN, name.where(), " is ", in_quotes(word), ", wanted 1 to ", kMaxAxisBytes,
           " lowercase letters and _");
    }
    if (mesh.find(word) >= 0) fail(TS_BAD_PLAN, name.where(), " repeats ", in_quotes(word));
    const int64_t most = kMaxRanks / mesh.num_ranks();
    mesh.axes.push_back({word, static_cast<int32_t>(item.at(1).integer(1, most))});
  }
  return mesh;
}

std::vector<std::string> parse_targets(const JsonNode &node) {
  std::vector<std::string> targets;
  if (node.size() == 0 || node.size() > kMaxTargets) {
    fail(TS_BAD_PLAN, node.where(), " has ", node.size(), " targets, wanted 1 to ", kMaxTargets);
  }
  for (size_t i = 0; i < node.size(); ++i) {
    const JsonNode item = node.at(i);
    const std::string &name = item.text();
    const bool plain = std::ranges::all_of(
        name, [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_'; });
    if (name.empty() || name.size() > kMaxTargetBytes || !plain) {
      fail(TS_BAD_PLAN, item.where(), " is ", in_quotes(name), ", wanted 1 to ", kMaxTargetBytes,
           " lowercase letters, digits, - and _");
    }
    if (std::ranges::find(targets, name) != targets.end())
      fail(TS_BAD_PLAN, item.where(), " repeats ", in_quotes(name));
    targets.push_back(name);
  }
  return targets;
}

ManifestEntry parse_entry(const std::string &name, const JsonNode &node) {
  if (name == "tsp/manifest" || name == "tsp/seal")
    fail(TS_BAD_PLAN, "manifest: ", in_quotes(name), " is listed, but cannot be");
  node.expect_keys({"bytes", "dtype", "kind", "sha256", "shape"});
  ManifestEntry entry;
  entry.dtype = node["dtype"].text();
  const JsonNode shape = node["shape"];
  for (size_t i = 0; i < shape.size(); ++i) {
    entry.shape.push_back(shape.at(i).integer(0, std::numeric_limits<int64_t>::max()));
  }
  entry.bytes = static_cast<uint64_t>(node["bytes"].integer(0, std::numeric_limits<int64_t>::max()));
  entry.sha256 = node["sha256"].digest();
  const JsonNode kind = node["kind"];
  const EntryKind wanted = kind_of_name(name);
  const auto *word = std::ranges::find(kKinds, wanted, &std::pair<std::string_view, EntryKind>::second);
  if (kind.text() != word->first) {
    fail(TS_BAD_PLAN, kind.where(), " is ", in_quotes(kind.text()), ", but its name makes it ", in_quotes(word->first));
  }
  entry.kind = wanted;
  return entry;
}

/// Each target has a program and kernels, and nothing else does.
void check_targets(const Manifest &manifest) {
  for (const std::string &target : manifest.targets) {
    for (const std::string_view prefix : {kProgram, kKernels}) {
      const std::string name = std::string(prefix) + target;
      if (!manifest.entries.contains(name))
        fail(TS_BAD_PLAN, "manifest: target ", in_quotes(target), " lacks ", in_quotes(name));
    }
  }
  for (const auto &[name, entry] : manifest.entries) {
    if (entry.kind != EntryKind::program && entry.kind != EntryKind::kernels) continue;
    const std::string_view target = std::string_view(name).substr(kProgram.size());  // both prefixes are as long
    if (std::ranges::find(manifest.targets, target) == manifest.targets.end()) {
      fail(TS_BAD_PLAN, "manifest: ", in_quotes(name), " belongs to no listed target");
    }
  }
}
static_assert(kProgram.size() == kKernels.size());

}  // namespace

void check_schema(int64_t found, std::string_view where) {
  if (found == kPlanSchema) return;
  fail(TS_BAD_PLAN, where, " is ", found, ", this tsruntime reads ", kPlanSchema,
       found > kPlanSchema ? ": update tsruntime" : ": rebuild the plan with this tscompile");
}

Manifest parse_manifest(std::span<const uint8_t> bytes) {
  const nlohmann::json json = parse_canonical_json(bytes, "manifest");
  const JsonNode root(json, "manifest");
  check_schema(root["schema"].integer(std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()),
               "manifest.schema");
  root.expect_keys({"entries", "mesh", "model", "producer", "schema", "targets"});
  Manifest manifest;
  manifest.model = parse_model(root["model"]);
  manifest.mesh = parse_mesh(root["mesh"]);
  manifest.targets = parse_targets(root["targets"]);
  root["entries"].members(
      [&](const std::string &name, const JsonNode &node) { manifest.entries.emplace(name, parse_entry(name, node)); });
  check_targets(manifest);
  return manifest;
}

}  // namespace ts
