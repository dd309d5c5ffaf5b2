// Makes plans for tests: whole ones, and ones with a fault put in on purpose.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "sha256.h"

namespace ts::testing {

using Json = nlohmann::json;
using Bytes = std::vector<uint8_t>;

inline std::span<const uint8_t> as_bytes(const std::string &text) {
  return {reinterpret_cast<const uint8_t *>(text.data()), text.size()};
}

/// A safetensors file of a header's text, padded as plans are, and data.
inline Bytes raw_file(std::string header, const std::string &data) {
  while ((8 + header.size()) % 64 != 0) header += ' ';
  Bytes file(8);
  for (size_t i = 0; i < 8; ++i) file[i] = static_cast<uint8_t>(header.size() >> (8 * i));
  file.insert(file.end(), header.begin(), header.end());
  file.insert(file.end(), data.begin(), data.end());
  return file;
}

/// What a plan is made of. Change what a test is about, then take bytes().
struct TestPlan {
  struct Weight {
    std::string dtype;
    std::vector<int64_t> shape;
    std::string bytes;
  };

  Json model = {{"name", "test"},       {"architecture", "Test"}, {"vocab_size", 50}, {"max_context", 128},
                {"eos_token_ids", {1}}, {"bos_token_id", 0},      {"dtype", "fp32"}};
  Json mesh = Json::array({Json::array({"tp", 1})});
  std::vector<std::string> targets;
  std::map<std::string, Weight> weights;
  std::map<std::string, std::string> reserved;  // tsp/...: the bytes
  Json metadata = {{"format", "tsp"}, {"tsp_schema", "3"}};
  std::function<void(Json &)> edit_manifest = [](Json &) {};
  std::function<void(Json &)> edit_header = [](Json &) {};

  void add_target(const std::string &target, const Json &program, const std::string &kernels) {
    targets.push_back(target);
    reserved["tsp/program/" + target] = program.dump();
    reserved["tsp/kernels/" + target] = kernels;
  }

  void edit_program(const std::string &target, const std::function<void(Json &)> &edit) {
    Json program = Json::parse(reserved.at("tsp/program/" + target));
    edit(program);
    reserved["tsp/program/" + target] = program.dump();
  }

  Bytes bytes() const { return bytes_with_manifest(manifest().dump()); }

  Json manifest() const {
    Json entries = Json::object();
    const auto list = [&](const std::string &name, const std::string &dtype, const std::vector<int64_t> &shape,
                          const std::string &bytes) {
      entries[name] = {{"dtype", dtype},
                       {"shape", shape},
                       {"bytes", bytes.size()},
                       {"sha256", to_hex(sha256(as_bytes(bytes)))},
                       {"kind", kind(name)}};
    };
    for (const auto &[name, weight] : weights) list(name, weight.dtype, weight.shape, weight.bytes);
    for (const auto &[name, bytes] : reserved) list(name, "U8", {static_cast<int64_t>(bytes.size())}, bytes);
    Json manifest = {{"schema", 3},    {"mesh", mesh},       {"producer", {{"tscompile", "test"}}},
                     {"model", model}, {"targets", targets}, {"entries", entries}};
    edit_manifest(manifest);
    return manifest;
  }

  Bytes bytes_with_manifest(const std::string &manifest) const {
    Json header = {{"__metadata__", metadata}};
    std::string data;
    const auto place = [&](const std::string &name, const std::string &dtype, const std::vector<int64_t> &shape,
                           const std::string &bytes) {
      header[name] = {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {data.size(), data.size() + bytes.size()}}};
      data += bytes;
    };
    for (const auto &[name, weight] : weights) place(name, weight.dtype, weight.shape, weight.bytes);
    for (const auto &[name, bytes] : reserved) place(name, "U8", {static_cast<int64_t>(bytes.size())}, bytes);
    place("tsp/manifest", "U8", {static_cast<int64_t>(manifest.size())}, manifest);
    place("tsp/seal", "U8", {32}, std::string(32, '\0'));
    edit_header(header);
    Bytes file = raw_file(header.dump(), data);
    seal(file, file.size() - data.size(), manifest);
    return file;
  }

  static void seal(Bytes &file, size_t data_begin, const std::string &manifest) {
    Sha256 hash;
    hash.update(std::span(file).first(data_begin));
    hash.update(as_bytes(manifest));
    const Digest digest = hash.finish();
    std::memcpy(file.data() + file.size() - digest.size(), digest.data(), digest.size());
  }

  static std::string kind(const std::string &name) {
    if (name.starts_with("tsp/program/")) return "program";
    if (name.starts_with("tsp/kernels/")) return "kernels";
    if (name.starts_with("tsp/text/")) return "text";
    return name.starts_with("tsp/") ? "report" : "weight";
  }
};

constexpr int kWidth = 16, kVocab = 50, kLogitsStride = 64, kPageSize = 32, kMaxTokens = 24, kMaxSeqs = 4;

/// The program over the kernels of kernels.c: embed, mix, write to and read from two layers' caches, logits.
inline Json test_program(const std::string &target) {
  const int rows = kMaxTokens * kWidth * 4;
  const int64_t table_bytes = int64_t{kVocab} * kWidth * 4;
  const auto buffer = [](int i) { return Json{{"buffer", i}}; };
  const auto launch = [](const char *kernel, Json args) {
    return Json{{"kernel", kernel}, {"op", std::string("op.") + kernel}, {"args", std::move(args)}};
  };
  const Json table = {{"weight", "table"}, {"bytes", table_bytes}};
  Json program;
  program["abi"] = 2;
  program["target"] = target;
  program["limits"] = {{"max_tokens", kMaxTokens},
                       {"max_seqs", kMaxSeqs},
                       {"max_context", 128},
                       {"page_size", kPageSize},
                       {"vocab_size", kVocab}};
  program["arena_bytes"] = 3 * rows + kMaxSeqs * kLogitsStride * 4;
  program["buffers"] = {{{"name", "x"}, {"offset", 0}, {"bytes", rows}},
                        {{"name", "y"}, {"offset", rows}, {"bytes", rows}},
                        {{"name", "z"}, {"offset", 2 * rows}, {"bytes", rows}},
                        {{"name", "logits"}, {"offset", 3 * rows}, {"bytes", kMaxSeqs * kLogitsStride * 4}}};
  program["kv"] = {{"groups", {{{"kind", "full"}}}}, {"layers", {0, 0}}, {"page_bytes", kPageSize * kWidth * 4}};
  const Json launches = Json::array(
      {launch("test_embed", {table, buffer(0)}), launch("test_mix", {buffer(0), buffer(1)}),
       launch("test_write", {buffer(1), {{"kv", 0}}}), launch("test_attend", {{{"kv", 0}}, buffer(2)}),
       launch("test_mix", {buffer(2), buffer(0)}), launch("test_write", {buffer(0), {{"kv", 1}}}),
       launch("test_attend", {{{"kv", 1}}, buffer(1)}), launch("test_logits", {buffer(1), table, buffer(3)})});
  const Json logits = {{"buffer", 3}, {"stride", kLogitsStride}};
  program["buckets"] = {{{"max_tokens", kMaxTokens}, {"launches", launches}, {"logits", logits}}};
  return program;
}

/// f32 values, small and exact, so that sums in any order are equal.
inline std::vector<float> test_table() {
  std::vector<float> table;
  for (int i = 0; i < kVocab * kWidth; ++i) table.push_back(static_cast<float>((i * 7919) % 31 - 15) / 16);
  return table;
}

/// A plan with one weight and a target, whose kernels are `kernels` (any bytes, if nothing will run).
inline TestPlan test_plan(const std::string &target = "cpu-avx2", const std::string &kernels = "no kernels") {
  TestPlan plan;
  const std::vector<float> table = test_table();
  std::string bytes(table.size() * sizeof(float), '\0');
  std::memcpy(bytes.data(), table.data(), bytes.size());
  plan.weights["table"] = {"F32", {kVocab, kWidth}, std::move(bytes)};
  plan.reserved["tsp/text/tokenizer"] = "a tokenizer";
  plan.reserved["tsp/graph"] = "a graph";
  plan.add_target(target, test_program(target), kernels);
  return plan;
}

/// The same for the ranks of a mesh, whose last axis divides kWidth: it computes what test_program() does, with collectives of every
/// kind on the way. `parts`, sharded over all axes, is a table whose sum over the ranks is the whole one.
inline Json test_program_of_ranks(const std::string &target, const Json &mesh) {
  const Json axis = mesh.back()[0], size = mesh.back()[1];
  Json program = test_program(target);
  const int rows = kMaxTokens * kWidth * 4, logits = kMaxSeqs * kLogitsStride * 4;
  const auto add_buffer = [&](const char *name, int bytes) {
    const int64_t offset = program["arena_bytes"];
    program["buffers"].push_back({{"name", name}, {"offset", offset}, {"bytes", bytes}});
    program["arena_bytes"] = offset + (bytes + 63) / 64 * 64;
    return static_cast<int>(program["buffers"].size()) - 1;
  };
  const int part = add_buffer("part", rows), part_logits = add_buffer("part_logits", logits);
  const int whole_logits = add_buffer("whole_logits", logits);
  const int64_t num = size;
  const auto collective = [&](const char *kind, int in, int out, const char *dim, int64_t run) {
    return Json{{"collective", kind}, {"op", std::string("op.") + kind},
                {"axis", axis},       {"dtype", "f32"},
                {"rows", dim},        {"times", 1},
                {"run", run},         {"args", {{{"buffer", in}}, {{"buffer", out}}}}};
  };
  Json launches = Json::array();
  Json names = Json::array();
  for (const Json &each : mesh) names.push_back(each[0]);
  const Json kernels = program["buckets"][0]["launches"];
  Json embed = kernels[0];
  embed["args"][0] = {{"weight", "parts"}, {"bytes", int64_t{kVocab} * kWidth * 4}, {"axes", names}};
  launches.push_back(embed);  // -> x, of each rank
  int x = 0;
  for (const Json &each : mesh) {
    Json sum = collective("all_reduce", x, x == 0 ? part : 0, "T", kWidth);
    sum["axis"] = each[0];
    sum["reduce"] = "sum";
    launches.push_back(sum);
    x = x == 0 ? part : 0;
  }
  Json mix = kernels[1];
  mix["args"][0] = {{"buffer", x}};
  launches.push_back(mix);  // -> y
  launches.push_back(collective("slice", 1, part, "T", kWidth / num));
  launches.push_back(collective("all_gather", part, 2, "T", kWidth / num));
  Json write = kernels[2];
  write["args"][0] = {{"buffer", 2}};
  launches.push_back(write);
  launches.push_back({{"kernel", "test_attend"}, {"op", "attend"}, {"args", {{{"kv", 0}}, {{"buffer", 1}}}}});
  Json most = collective("reduce_scatter", 1, part, "T", kWidth / num);
  most["reduce"] = "max";
  launches.push_back(most);
  launches.push_back(collective("all_gather", part, 2, "T", kWidth / num));
  for (size_t i = 4; i < kernels.size(); ++i) launches.push_back(kernels[i]);  // mix, write, attend, logits
  launches.push_back(collective("slice", 3, part_logits, "L", kLogitsStride / num));
  launches.push_back(collective("all_gather", part_logits, whole_logits, "L", kLogitsStride / num));
  program["buckets"][0]["launches"] = launches;
  program["buckets"][0]["logits"]["buffer"] = whole_logits;
  return program;
}

/// The same program with every collective in two, and between them a launch on whose output nothing depends.
inline void put_in_two(Json &program, const Json &mesh) {
  const int64_t offset = program["arena_bytes"];
  const int bytes = kMaxTokens * kWidth * 4, beside = static_cast<int>(program["buffers"].size());
  program["buffers"].push_back({{"name", "beside"}, {"offset", offset}, {"bytes", bytes}});
  program["arena_bytes"] = offset + (bytes + 63) / 64 * 64;
  Json launches = Json::array();
  for (const Json &launch : program["buckets"][0]["launches"]) {
    const auto axis = std::ranges::find(mesh, launch.value("axis", Json()), [](const Json &each) { return each[0]; });
    if (axis == mesh.end() || (*axis)[1] == 1 || launch["collective"] == "slice") {
      launches.push_back(launch);
      continue;
    }
    Json start = launch, meanwhile = launches[0];
    start["phase"] = "start";
    meanwhile["args"].back() = {{"buffer", beside}};
    launches.push_back(start);
    launches.push_back(meanwhile);
    launches.push_back({{"phase", "finish"}, {"op", launch["op"]}, {"args", {launch["args"].back()}}});
  }
  program["buckets"][0]["launches"] = launches;
}

/// A plan for the ranks of a mesh, over test_program_of_ranks().
inline TestPlan test_plan_of_ranks(const Json &mesh, const std::string &target = "cpu-avx2",
                                   const std::string &kernels = "no kernels") {
  TestPlan plan = test_plan(target, kernels);
  plan.mesh = mesh;
  plan.reserved["tsp/program/" + target] = test_program_of_ranks(target, mesh).dump();
  std::vector<std::string> suffixes = {""};  // of every rank, in order
  for (const Json &axis : mesh) {
    std::vector<std::string> longer;
    for (const std::string &suffix : suffixes) {
      for (int i = 0; i < axis[1].get<int>(); ++i) {
        longer.push_back(suffix + (suffix.empty() ? "@" : ",") + axis[0].get<std::string>() + "=" + std::to_string(i));
      }
    }
    suffixes = longer;
  }
  const std::vector<float> table = test_table();
  for (size_t r = 0; r < suffixes.size(); ++r) {
    std::vector<float> part(table.size());
    for (size_t i = r; i < table.size(); i += suffixes.size()) part[i] = table[i];
    std::string bytes(part.size() * sizeof(float), '\0');
    std::memcpy(bytes.data(), part.data(), bytes.size());
    plan.weights["parts" + suffixes[r]] = {"F32", {kVocab, kWidth}, std::move(bytes)};
  }
  return plan;
}

inline Json tp(int size) { return Json::array({Json::array({"tp", size})}); }

inline std::string read_file(const std::string &path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// Writes a new file, whatever was there.
inline void write_file(const std::string &path, const Bytes &bytes) {
  std::remove(path.c_str());
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char *>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

}  // namespace ts::testing
