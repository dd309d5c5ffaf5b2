// The fuzz target: whatever the bytes, a plan is opened and read, or refused with a message. Under libFuzzer where clang is the
// compiler, else under driver.cpp.
#include "plan_fuzz.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "error.h"
#include "plan.h"
#include "program.h"
#include "safetensors.h"
#include "sha256.h"
#include "text.h"

namespace ts::fuzz {
namespace {

void require(bool holds, const char *what) {
  if (holds) return;
  std::fprintf(stderr, "plan_fuzz: %s\n", what);
  std::abort();
}

/// A refusal is one line of clean UTF-8 with the status for bad plans.
void check_refusal(const Error &error) {
  const std::string_view message = error.what();
  require(error.status() == TS_BAD_PLAN, "refused with another status");
  require(!message.empty() && message.size() < 4000, "a message that is empty or endless");
  const auto is_control = [](char c) { return static_cast<uint8_t>(c) < 0x20 || c == 0x7F; };
  require(std::ranges::none_of(message, is_control), "a message with control characters");
  require(nlohmann::json(message).dump().size() > 2, "a message that is not UTF-8");  // dump throws
}

void check_bucket(const Bucket &bucket, const Program &program, const Mesh &mesh) {
  for (const Launch &launch : bucket.launches) {
    for (const Argument &argument : launch.arguments) {
      const auto index = static_cast<size_t>(argument.index);
      if (argument.kind == Argument::Kind::buffer) require(index < program.buffers.size(), "a buffer that is none");
      if (argument.kind == Argument::Kind::kv) require(argument.index < program.num_layers, "a layer that is none");
      if (argument.kind == Argument::Kind::weight) require(argument.weight != nullptr, "a weight that is none");
    }
    if (!launch.collective) continue;
    const Collective &c = *launch.collective;
    require(launch.arguments.size() == 2, "a collective without input or output");
    const auto outer = static_cast<uint64_t>(c.most_outer(bucket.limits, mesh));
    const int64_t all = bucket.limits.max_tokens, mine = c.most_tokens(bucket.limits, mesh);
    for (const auto &[argument, run] : {std::pair(0, c.in_run(mine, all)), std::pair(1, c.out_run(mine, all))}) {
      const Buffer &buffer = program.buffers.at(launch.arguments[static_cast<size_t>(argument)].index);
      require(outer * static_cast<uint64_t>(run * c.element_bytes) <= buffer.bytes, "a collective beyond its buffer");
    }
  }
  const uint64_t logits = uint64_t{4} * bucket.limits.max_seqs * bucket.logits_stride;
  require(logits <= program.buffers.at(bucket.logits_buffer).bytes, "logits beyond their buffer");
}

/// What every accepted program promises to the executor.
void check_program(const Program &program, const Mesh &mesh) {
  for (const Buffer &buffer : program.buffers) {
    require(buffer.offset % 64 == 0 && buffer.offset + buffer.bytes <= program.arena_bytes,
            "a buffer outside the arena");
  }
  for (const Bucket &bucket : program.buckets) check_bucket(bucket, program, mesh);
  require(program.buckets.back().limits.max_tokens == program.limits.max_tokens, "steps that no bucket runs");
}

void go_through(std::span<const uint8_t> bytes, Stage &stage) {
  parse_safetensors(bytes, bytes.size());
  stage = Stage::contents;
  const auto plan = Plan::from_memory(bytes);
  stage = Stage::weights;
  plan->verify_weights();
  stage = Stage::program;
  for (const std::string &target : plan->targets()) {
    for (const int32_t rank : {0, plan->mesh().num_ranks() - 1})
      check_program(parse_program(*plan, target, rank), plan->mesh());
  }
  stage = Stage::whole;
}

}  // namespace

Stage try_plan(std::span<const uint8_t> bytes) {
  Stage stage = Stage::header;
  try {
    go_through(bytes, stage);
  } catch (const Error &error) {
    check_refusal(error);
  }
  return stage;
}

void mend(std::span<uint8_t> bytes) {
  SafetensorsHeader header;
  try {
    header = parse_safetensors(bytes, bytes.size());
  } catch (const Error &) {
    return;
  }
  const auto find = [&](std::string_view name) { return std::ranges::find(header.tensors, name, &Tensor::name); };
  const auto manifest = find("tsp/manifest"), seal = find("tsp/seal");
  if (manifest == header.tensors.end() || seal == header.tensors.end() || seal->bytes() != 32) return;
  const auto text = bytes.subspan(manifest->begin, manifest->bytes());
  const std::string_view view(reinterpret_cast<const char *>(text.data()), text.size());
  for (const Tensor &tensor : header.tensors) {
    const size_t entry = view.find(nlohmann::json(tensor.name).dump() + ":{");
    const size_t key = entry == std::string_view::npos ? entry : view.find("\"sha256\":\"", entry);
    if (key == std::string_view::npos || key + 10 + 64 > text.size()) continue;
    const std::string hex = to_hex(sha256(bytes.subspan(tensor.begin, tensor.bytes())));
    std::ranges::copy(hex, text.begin() + static_cast<ptrdiff_t>(key + 10));
  }
  Sha256 hash;
  hash.update(bytes.first(header.data_begin));
  hash.update(text);
  std::ranges::copy(hash.finish(), bytes.begin() + static_cast<ptrdiff_t>(seal->begin));
}

}  // namespace ts::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  ts::fuzz::try_plan({data, size});
  std::vector<uint8_t> mended(data, data + size);
  ts::fuzz::mend(mended);
  ts::fuzz::try_plan(mended);
  return 0;
}
