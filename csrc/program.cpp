#include "program.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "gpu_target.h"
#include "in_flight.h"
#include "json.h"
#include "launch_abi.h"
#include "program_fields.h"
#include "text.h"

namespace ts {
namespace {

constexpr int64_t kMaxTokens = 1 << 20;
constexpr int64_t kMaxPageSize = 4096;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxGroups = 16;               // of layers
constexpr int64_t kMaxBytes = int64_t{1} << 46;  // of the arena, and of a page: no sum of a few leaves 64 bits
constexpr size_t kMaxBuffers = 100'000;
constexpr size_t kMaxBuckets = 32;
constexpr size_t kMaxLaunches = 100'000;  // of a bucket
constexpr size_t kMaxArguments = 64;
constexpr size_t kMaxSymbolBytes = 200;
constexpr int64_t kAlignment = 64;
constexpr size_t kMaxAxes = 8;

Limits parse_limits(const JsonNode &node, const ModelInfo &model) {
  node.expect_keys({"max_context", "max_seqs", "max_tokens", "page_size", "vocab_size"});
  Limits limits;
  limits.max_tokens = static_cast<int32_t>(node["max_tokens"].integer(1, kMaxTokens));
  limits.max_seqs =
      static_cast<int32_t>(node["max_seqs"].integer(1, limits.max_tokens));  // a sequence of a step has a token
  limits.max_context = static_cast<int32_t>(node["max_context"].integer(1, model.max_context));
  limits.page_size = static_cast<int32_t>(multiple(node["page_size"], 32, kMaxPageSize, 32));
  const JsonNode vocab = node["vocab_size"];
  limits.vocab_size = static_cast<int32_t>(vocab.integer(1, std::numeric_limits<int32_t>::max()));
  if (limits.vocab_size != model.vocab_size) {
    fail(TS_BAD_PLAN, vocab.where(), " is ", limits.vocab_size, ", the manifest's model has ", model.vocab_size);
  }
  return limits;
}

std::vector<Buffer> parse_buffers(const JsonNode &node, int64_t arena_bytes) {
  check_count(node, 1, kMaxBuffers);
  std::vector<Buffer> buffers;
  for (size_t i = 0; i < node.size(); ++i) {
    const JsonNode item = node.at(i);
    item.expect_keys({"bytes", "name", "offset"});
    Buffer buffer;
    buffer.name = item["name"].text();
    buffer.offset = static_cast<uint64_t>(multiple(item["offset"], 0, kMaxBytes, kAlignment));
    buffer.bytes = static_cast<uint64_t>(item["bytes"].integer(1, kMaxBytes));
    if (buffer.offset + buffer.bytes > static_cast<uint64_t>(arena_bytes)) {
      fail(TS_BAD_PLAN, item.where(), " (", in_quotes(buffer.name), ") ends at byte ", buffer.offset + buffer.bytes,
           " of an arena of ", arena_bytes);
    }
    buffers.push_back(std::move(buffer));
  }
  return buffers;
}

/// The entry of this rank's part of a weight that is sharded over `axes`: NAME@tp=1, or NAME@ep=0,tp=1, in the mesh's order.
std::string shard_name(const std::string &name, const JsonNode &axes, const Mesh &mesh, int32_t rank) {
  check_count(axes, 1, kMaxAxes);
  std::string coordinates;
  int32_t last = -1;
  for (size_t i = 0; i < axes.size(); ++i) {
    const JsonNode item = axes.at(i);
    const int32_t axis = parse_axis(item, mesh);
    if (axis <= last) fail(TS_BAD_PLAN, item.where(), " is ", in_quotes(item.text()), ", not in the order of the mesh");
    last = axis;
    coordinates += (i == 0 ? "@" : ",") + item.text() + "=" + std::to_string(mesh.coordinate(rank, axis));
  }
  return name + coordinates;
}

Argument parse_weight(const JsonNode &node, const Plan &plan, int32_t rank) {
  node.expect_keys({"bytes", "weight"}, {"axes"});
  const auto axes = node.find("axes");
  const std::string &base = node["weight"].text();
  const std::string name = axes ? shard_name(base, *axes, plan.mesh(), rank) : base;
  const Entry *entry = name.starts_with("tsp/") ? nullptr : plan.find(name);
  if (entry == nullptr)
    fail(TS_BAD_PLAN, node.where(), " names the weight ", in_quotes(name), ", which the plan lacks");
  const JsonNode bytes = node["bytes"];
  if (const int64_t wanted = bytes.integer(0, kMaxBytes); static_cast<uint64_t>(wanted) != entry->bytes.size()) {
    fail(TS_BAD_PLAN, bytes.where(), " is ", wanted, ", the weight ", in_quotes(name), " has ", entry->bytes.size());
  }
  return {Argument::Kind::weight, 0, entry->bytes.data(), name};
}

Argument parse_argument(const JsonNode &node, const Plan &plan, const Program &program) {
  if (const auto buffer = node.find("buffer")) {
    node.expect_keys({"buffer"});
    const int64_t last = static_cast<int64_t>(program.buffers.size()) - 1;
    return {Argument::Kind::buffer, static_cast<int32_t>(buffer->integer(0, last)), nullptr};
  }
  if (const auto layer = node.find("kv")) {
    node.expect_keys({"kv"});
    return {Argument::Kind::kv, static_cast<int32_t>(layer->integer(0, program.num_layers - 1)), nullptr};
  }
  if (is_gpu_target(program.target)) {
    if (const auto argument = parse_gpu_argument(node)) return *argument;
  }
  return parse_weight(node, plan, program.rank);
}

/// Buffers of one launch are in use together: they are the same memory from the same start (in place), or apart.
void check_overlap(const JsonNode &node, const Launch &launch, const std::vector<Buffer> &buffers) {
  for (size_t i = 0; i < launch.arguments.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      const Argument &x = launch.arguments[i], &y = launch.arguments[j];
      if (x.kind != Argument::Kind::buffer || y.kind != Argument::Kind::buffer) continue;
      const Buffer &a = buffers[x.index], &b = buffers[y.index];
      if (a.offset == b.offset || a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset) continue;
      fail(TS_BAD_PLAN, node.where(), ": buffers ", y.index, " and ", x.index, " overlap: bytes ", b.offset, " to ",
           b.offset + b.bytes, " and ", a.offset, " to ", a.offset + a.bytes, " of the arena");
    }
  }
}

/// The stage that alone runs a launch.
int32_t parse_stage(const JsonNode &node, const Mesh &mesh) {
  const auto stage = node.find("stage");
  if (!stage) return Launch::kEveryStage;
  if (mesh.num_stages() == 1) {
    fail(TS_BAD_PLAN, stage->where(), " is ", stage->integer(0, kMaxLayers), ", but the mesh ", mesh.text(),
         " has no stages");
  }
  return static_cast<int32_t>(stage->integer(0, mesh.num_stages() - 1));
}

/// The buffer holds outer * run elements, at the most rows that a step may have.
void check_collective_buffer(const JsonNode &node, const Buffer &buffer, int64_t element_bytes, int64_t outer,
                             int64_t run) {  // outer: below 2^20 * 2^26
  const auto wanted =
      static_cast<unsigned __int128>(outer) * static_cast<uint64_t>(run) * static_cast<uint64_t>(element_bytes);
  if (wanted <= buffer.bytes) return;
  fail(TS_BAD_PLAN, node.where(), " (", in_quotes(buffer.name), ") has ", buffer.bytes, " bytes, but ", outer,
       " times ", run, " elements of ", element_bytes, " bytes do not fit");
}

constexpr std::array<std::pair<std::string_view, Launch::Phase>, 1> kStart = {{{"start", Launch::Phase::start}}};

Launch parse_collective(const JsonNode &node, const Plan &plan, const Program &program, const Limits &limits) {
  const Collective c = parse_collective_fields(node, plan.mesh());
  Launch launch;
  launch.stage = parse_stage(node, plan.mesh());
  if (const auto phase = node.find("phase")) launch.phase = word_of(*phase, kStart);
  launch.op = node["op"].text();
  const JsonNode args = node["args"];
  const bool ragged = c.kind == Collective::Kind::ragged_all_to_all;
  const size_t num_args = ragged ? 3 : 2;
  check_count(args, num_args, num_args);
  const Mesh &mesh = plan.mesh();
  for (size_t i = 0; i < num_args; ++i) {
    const Argument argument = parse_argument(args.at(i), plan, program);
    if (argument.kind != Argument::Kind::buffer) fail(TS_BAD_PLAN, args.at(i).where(), " is no buffer");
    const Buffer &buffer = program.buffers[argument.index];
    if (ragged && i == 1) {
      check_collective_buffer(args.at(i), buffer, sizeof(int32_t), c.num_ranks, c.experts);
    } else if (ragged) {
      check_collective_buffer(args.at(i), buffer, c.element_bytes, 1,
                              i == 0 ? c.most_taken(limits, mesh) : c.most_given(limits, mesh));
    } else {
      const int64_t all = limits.max_tokens, mine = c.most_tokens(limits, mesh);
      check_collective_buffer(args.at(i), buffer, c.element_bytes, c.most_outer(limits, mesh),
                              i == 0 ? c.in_run(mine, all) : c.out_run(mine, all));
    }
    launch.arguments.push_back(argument);
  }
  const Buffer &out = program.buffers[launch.arguments.back().index];
  for (size_t i = 0; i + 1 < num_args; ++i) {
    const Buffer &in = program.buffers[launch.arguments[i].index];
    if (in.offset >= out.offset + out.bytes || out.offset >= in.offset + in.bytes) continue;
    fail(TS_BAD_PLAN, args.where(), ": input and output overlap: bytes ", in.offset, " to ", in.offset + in.bytes,
         " and ", out.offset, " to ", out.offset + out.bytes, " of the arena");
  }
  launch.collective = c;
  return launch;
}

/// Of the layers whose caches a launch takes.
int32_t group_of(const JsonNode &node, const Launch &launch, const Program &program) {
  int32_t group = -1;
  for (const Argument &argument : launch.arguments) {
    if (argument.kind != Argument::Kind::kv) continue;
    const int32_t of = program.layer_groups[static_cast<size_t>(argument.index)];
    if (group >= 0 && of != group) {
      fail(TS_BAD_PLAN, node.where(), " takes caches of the groups ", group, " and ", of,
           ", wanted one: it sees one page table");
    }
    group = of;
  }
  return std::max(group, 0);
}

/// A launch of a CPU's kernel, but for its arguments.
Launch parse_cpu_launch(const JsonNode &node, const Plan &plan) {
  node.expect_keys({"args", "kernel", "op"}, {"stage", "tokens"});
  Launch launch;
  launch.stage = parse_stage(node, plan.mesh());
  if (const auto axis = node.find("tokens")) launch.tokens_axis = parse_axis(*axis, plan.mesh());
  const JsonNode kernel = node["kernel"];
  launch.kernel = kernel.text();
  const auto is_word = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  };
  const bool is_symbol = !launch.kernel.empty() && launch.kernel.size() <= kMaxSymbolBytes &&
                         std::ranges::all_of(launch.kernel, is_word) &&
                         !(launch.kernel[0] >= '0' && launch.kernel[0] <= '9');
  if (!is_symbol) fail(TS_BAD_PLAN, kernel.where(), " is ", in_quotes(launch.kernel), ", wanted a C identifier");
  return launch;
}

Launch parse_launch(const JsonNode &node, const Plan &plan, const Program &program, const Limits &limits) {
  const bool on_gpu = is_gpu_target(program.target);
  if (!on_gpu && node.find("collective")) return parse_collective(node, plan, program, limits);
  Launch launch = on_gpu ? parse_gpu_launch(node, program) : parse_cpu_launch(node, plan);
  launch.op = node["op"].text();
  const JsonNode args = node["args"];
  check_count(args, 0, kMaxArguments);
  if (on_gpu) {
    const size_t num_params = program.kernels.find(launch.kernel)->second.params.size();
    if (args.size() != num_params) {
      fail(TS_BAD_PLAN, args.where(), " has ", args.size(), " items, but the kernel ", in_quotes(launch.kernel),
           " takes ", num_params, " parameters");
    }
  }
  for (size_t i = 0; i < args.size(); ++i) launch.arguments.push_back(parse_argument(args.at(i), plan, program));
  check_overlap(node, launch, program.buffers);
  launch.group = group_of(node, launch, program);
  return launch;
}

constexpr std::array<std::pair<std::string_view, CacheGroup::Kind>, 3> kGroupKinds = {
    {{"full", CacheGroup::Kind::full},
     {"window", CacheGroup::Kind::window},
     {"recurrent", CacheGroup::Kind::recurrent}}};

/// The cache groups, and which one each layer is of.
void parse_groups(const JsonNode &node, const JsonNode &layers, Program &program) {
  check_count(node, 1, kMaxGroups);
  for (size_t i = 0; i < node.size(); ++i) {
    const JsonNode item = node.at(i);
    CacheGroup &group = program.groups.emplace_back();
    group.kind = word_of(item["kind"], kGroupKinds);
    if (group.kind == CacheGroup::Kind::window) {
      item.expect_keys({"kind", "window"});
      group.window = static_cast<int32_t>(item["window"].integer(1, std::numeric_limits<int32_t>::max()));
    } else {
      item.expect_keys({"kind"});
    }
  }
  check_count(layers, 1, kMaxLayers);
  program.num_layers = static_cast<int32_t>(layers.size());
  program.layer_stages.assign(layers.size(), Launch::kEveryStage);
  for (size_t i = 0; i < layers.size(); ++i) {
    program.layer_groups.push_back(
        static_cast<int32_t>(layers.at(i).integer(0, static_cast<int64_t>(node.size()) - 1)));
  }
  for (size_t i = 0; i < node.size(); ++i) {
    if (std::ranges::count(program.layer_groups, static_cast<int32_t>(i)) > 0) continue;
    fail(TS_BAD_PLAN, node.at(i).where(), " has no layers");
  }
}

/// A layer's cache is on one stage, or on every.
void place_layers(const JsonNode &node, const Bucket &bucket, Program &program) {
  for (size_t i = 0; i < bucket.launches.size(); ++i) {
    const Launch &launch = bucket.launches[i];
    for (const Argument &argument : launch.arguments) {
      if (argument.kind != Argument::Kind::kv || launch.stage == Launch::kEveryStage) continue;
      int32_t &stage = program.layer_stages[static_cast<size_t>(argument.index)];
      if (stage != Launch::kEveryStage && stage != launch.stage) {
        fail(TS_BAD_PLAN, node["launches"].at(i).where(), " of stage ", launch.stage, " takes the cache of layer ",
             argument.index, ", which is on stage ", stage);
      }
      stage = launch.stage;
    }
  }
}

void parse_logits(const JsonNode &node, const Program &program, Bucket &bucket) {
  node.expect_keys({"buffer", "stride"});
  const JsonNode index = node["buffer"];
  bucket.logits_buffer = static_cast<int32_t>(index.integer(0, static_cast<int64_t>(program.buffers.size()) - 1));
  bucket.logits_stride = node["stride"].integer(bucket.limits.vocab_size, kMaxBytes / kMaxTokens);
  const uint64_t wanted = sizeof(float) * static_cast<uint64_t>(bucket.logits_stride) * bucket.limits.max_seqs;
  const Buffer &buffer = program.buffers[bucket.logits_buffer];
  if (buffer.bytes < wanted) {
    fail(TS_BAD_PLAN, index.where(), " (", in_quotes(buffer.name), ") has ", buffer.bytes, " bytes, but ",
         bucket.limits.max_seqs, " rows of ", bucket.logits_stride, " f32 take ", wanted);
  }
}

Bucket parse_bucket(const JsonNode &node, const Plan &plan, const Program &program, int32_t least) {
  node.expect_keys({"launches", "logits", "max_tokens"});
  Bucket bucket;
  bucket.limits = program.limits;
  bucket.limits.max_tokens = static_cast<int32_t>(node["max_tokens"].integer(least, program.limits.max_tokens));
  bucket.limits.max_seqs = std::min(bucket.limits.max_seqs, bucket.limits.max_tokens);  // each has a token
  const JsonNode launches = node["launches"];
  check_count(launches, 1, kMaxLaunches);
  InFlight in_flight(program.buffers);
  for (size_t i = 0; i < launches.size(); ++i) {
    const JsonNode item = launches.at(i);
    if (item.find("phase") && !item.find("collective")) {
      bucket.launches.push_back(in_flight.finish(item, parse_stage(item, plan.mesh())));
    } else {
      bucket.launches.push_back(parse_launch(item, plan, program, bucket.limits));
      in_flight.take(item, bucket.launches.back());
    }
  }
  in_flight.end(launches);
  parse_logits(node["logits"], program, bucket);
  return bucket;
}

/// In the order of their tokens; the last one's are all that the limits allow.
void parse_buckets(const JsonNode &node, const Plan &plan, Program &program) {
  check_count(node, 1, kMaxBuckets);
  for (size_t i = 0; i < node.size(); ++i) {
    const int32_t least = i == 0 ? 1 : program.buckets.back().limits.max_tokens + 1;
    program.buckets.push_back(parse_bucket(node.at(i), plan, program, least));
    place_layers(node.at(i), program.buckets.back(), program);
  }
  if (const int32_t most = program.buckets.back().limits.max_tokens; most != program.limits.max_tokens) {
    fail(TS_BAD_PLAN, node.at(node.size() - 1).where(), ".max_tokens is ", most, ", the limits have ",
         program.limits.max_tokens);
  }
}

}  // namespace

Program parse_program(const Plan &plan, std::string_view target, int32_t rank) {
  const std::string name = "tsp/program/" + std::string(target);
  const Entry *entry = plan.find(name);
  if (entry == nullptr) fail(TS_BAD_PLAN, "the plan lacks ", in_quotes(name));
  const nlohmann::json json = parse_canonical_json(entry->bytes, name);
  const JsonNode root(json, name);
  const bool on_gpu = is_gpu_target(target);
  const int32_t own_abi = on_gpu ? kGpuAbi : TS_LAUNCH_ABI;
  if (const int64_t abi = root["abi"].integer(0, std::numeric_limits<int32_t>::max()); abi != own_abi) {
    fail(TS_BAD_PLAN, name, ".abi is ", abi, ", this tsruntime has ", own_abi,
         abi > own_abi ? ": update tsruntime" : ": rebuild the plan with this tscompile");
  }
  if (on_gpu) {
    root.expect_keys({"abi", "arena_bytes", "buckets", "buffers", "kernels", "kv", "limits", "target"});
  } else {
    root.expect_keys({"abi", "arena_bytes", "buckets", "buffers", "kv", "limits", "target"});
  }
  Program program;
  program.rank = rank;
  program.stage = plan.mesh().stage(rank);
  program.target = root["target"].text();
  if (program.target != target)
    fail(TS_BAD_PLAN, name, ".target is ", in_quotes(program.target), ", wanted ", in_quotes(target));
  if (on_gpu) {
    if (plan.mesh().num_ranks() > 1) {
      fail(TS_BAD_PLAN, name, " is of a GPU, and the plan for ", plan.mesh().num_ranks(), " ranks, wanted one");
    }
    const std::string library = "tsp/kernels/" + std::string(target);
    const Entry *kernels = plan.find(library);
    if (kernels == nullptr) fail(TS_BAD_PLAN, "the plan lacks ", in_quotes(library));
    program.kernels = parse_gpu_kernels(root["kernels"], kernels->bytes);
  }
  program.limits = parse_limits(root["limits"], plan.model());
  program.arena_bytes = static_cast<uint64_t>(multiple(root["arena_bytes"], kAlignment, kMaxBytes, kAlignment));
  program.buffers = parse_buffers(root["buffers"], static_cast<int64_t>(program.arena_bytes));
  const JsonNode kv = root["kv"];
  kv.expect_keys({"groups", "layers", "page_bytes"});
  parse_groups(kv["groups"], kv["layers"], program);
  program.page_bytes = static_cast<uint64_t>(multiple(kv["page_bytes"], kAlignment, kMaxBytes, kAlignment));
  parse_buckets(root["buckets"], plan, program);
  return program;
}

}  // namespace ts
