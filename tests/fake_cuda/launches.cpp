// The fake's modules, launches and graphs.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "call.h"

namespace fake_cuda {

// ---- modules --------------------------------------------------------------------------------------------------------

Result module_load(Module *module, const void *image) {
  return call(Line("cuModuleLoadData"), Needs::context, [&](State &s) {
    const auto cubin = Cubin::read(static_cast<const uint8_t *>(image));
    if (!cubin) return kBadImage;
    if (cubin->arch != 10 * s.settings.major + s.settings.minor) return kNoBinary;
    if (cubin->kernels.contains(s.settings.refused)) return kBadImage;
    auto *made = new ModuleState;
    for (const auto &[name, params] : cubin->kernels) {
      made->functions.push_back({name, params, 48 << 10, made});
      s.log(Line("loaded").text("kernel", name).number("params", params.size()));
    }
    s.modules.insert(made);
    *module = reinterpret_cast<Module>(made);
    return kOk;
  });
}

Result module_unload(Module module) {
  return call(Line("cuModuleUnload"), Needs::context, [&](State &s) {
    auto *found = object<ModuleState>(module);
    if (s.modules.erase(found) != 1) return kInvalidHandle;
    for (GraphState *exec : s.execs) {
      for (const Node &node : exec->nodes) {
        if (node.function->module == found) s.violation("a module was unloaded under a graph");
      }
    }
    delete found;
    return kOk;
  });
}

Result module_get_function(Function *function, Module module, const char *name) {
  return call(Line("cuModuleGetFunction").text("name", name), Needs::context, [&](State &s) {
    if (!s.modules.contains(object<ModuleState>(module))) return kInvalidHandle;
    for (FunctionState &each : object<ModuleState>(module)->functions) {
      if (each.name != name) continue;
      *function = reinterpret_cast<Function>(&each);
      return kOk;
    }
    return kNoFunction;
  });
}

Result function_get_attribute(int32_t *value, int32_t attribute, Function function) {
  const Line line = Line("cuFuncGetAttribute").number("attribute", attribute);
  return call(line, Needs::context, [&](State &) {
    *value = attribute == kMaxDynamicSharedBytes ? object<FunctionState>(function)->most_shared : 32;
    return kOk;
  });
}

Result function_set_attribute(Function function, int32_t attribute, int32_t value) {
  const Line line = Line("cuFuncSetAttribute").number("attribute", attribute).number("value", value);
  return call(line, Needs::context, [&](State &) {
    if (attribute != kMaxDynamicSharedBytes || value < 0 || value > 227 << 10) return kBadValue;
    object<FunctionState>(function)->most_shared = value;
    return kOk;
  });
}

// ---- launches and graphs --------------------------------------------------------------------------------------------

/// The parameters of a launch: from a buffer of their bytes, or from an address of each.
std::vector<void *> params_of(State &s, const FunctionState &function, void **params, void **extra) {
  const uint8_t *buffer = nullptr;
  size_t bytes = 0;
  for (size_t i = 0; extra != nullptr && extra[i] != nullptr; i += 2) {
    if (extra[i] == reinterpret_cast<void *>(kParamBufferPointer)) {
      buffer = static_cast<const uint8_t *>(extra[i + 1]);
    } else if (extra[i] == reinterpret_cast<void *>(kParamBufferSize)) {
      bytes = *static_cast<const size_t *>(extra[i + 1]);
    }
  }
  size_t wanted = 0;
  for (const Cubin::Param &param : function.params) wanted = std::max<size_t>(wanted, param.offset + param.bytes);
  if (extra != nullptr && bytes != wanted) {
    s.violation(function.name + " was given " + std::to_string(bytes) + " bytes of parameters, it takes " +
                std::to_string(wanted));
    return {};
  }
  std::vector<void *> values;
  for (size_t i = 0; i < function.params.size(); ++i) {
    const Cubin::Param &param = function.params[i];
    void *value = nullptr;
    if (param.bytes != sizeof(value)) s.violation(function.name + " takes a parameter that is no pointer");
    std::memcpy(&value, extra != nullptr ? buffer + param.offset : static_cast<const uint8_t *>(params[i]),
                sizeof(value));
    values.push_back(value);
  }
  return values;
}

/// What is wrong with a launch's sizes: the limits are those of the CUDA C++ Programming Guide.
std::string size_fault(const LaunchConfig &c, const FunctionState &function) {
  const bool grid = c.grid_x >= 1 && c.grid_x <= 0x7fffffff && c.grid_y >= 1 && c.grid_y <= 65535 && c.grid_z >= 1 &&
                    c.grid_z <= 65535;
  if (!grid) return "a grid is too large, or empty";
  const uint64_t threads = uint64_t{c.block_x} * c.block_y * c.block_z;
  if (threads == 0 || threads > 1024) return "a thread block of " + std::to_string(threads) + " threads";
  if (c.shared_bytes > static_cast<uint32_t>(function.most_shared)) return "more shared memory than was opted in to";
  return "";
}

Line line_of(const Node &node) {
  Line line("cuLaunchKernelEx");
  line.text("kernel", node.name).number("x", node.grid[0]).number("y", node.grid[1]).number("z", node.grid[2]);
  line.number("threads", node.threads).number("shared", node.shared).number("programmatic", int{node.programmatic});
  std::string params;
  for (const void *param : node.params) {
    const Block *block = state().device_block(reinterpret_cast<Address>(param), 0);
    params += params.empty() ? "" : " ";
    if (block == nullptr) {
      params += "null";
      continue;
    }
    params += std::to_string(block->number) + "+" +
              std::to_string(static_cast<const uint8_t *>(param) - static_cast<const uint8_t *>(block->data));
  }
  return line.text("params", params);
}

Result launch(const LaunchConfig *config, Function handle, void **params, void **extra) {
  State &s = state();
  const std::lock_guard lock(s.mutex);
  if (s.lost != kOk) return s.lost;
  StreamState *stream = stream_of(s, config->stream);
  if (stream == nullptr || (params == nullptr) == (extra == nullptr)) return kBadValue;
  auto *function = object<FunctionState>(handle);
  if (const std::string fault = size_fault(*config, *function); !fault.empty()) {
    s.violation(function->name + ": " + fault);
    return kOutOfResources;
  }
  Node node{function, function->name, {config->grid_x, config->grid_y, config->grid_z}};
  node.threads = config->block_x * config->block_y * config->block_z;
  node.shared = config->shared_bytes;
  node.params = params_of(s, *function, params, extra);
  for (uint32_t i = 0; i < config->num_attributes; ++i) {
    const LaunchAttribute &attribute = config->attributes[i];
    if (attribute.id != kProgrammaticStreamSerialization) return kBadValue;
    // An edge is programmatic only between kernels.
    node.programmatic = attribute.allowed != 0 && !stream->captured.nodes.empty();
  }
  s.log(line_of(node));
  const GraphState alone{{node}};
  s.check_pointers(alone, "at launch");
  if (stream->capturing) {
    stream->captured.nodes.push_back(std::move(node));
  } else {
    stream->push([node] { state().run(node); });
  }
  return kOk;
}

Result graph_instantiate(GraphExec *exec, Graph graph, unsigned long long flags) {
  return call(Line("cuGraphInstantiate").number("flags", flags), Needs::context, [&](State &s) {
    if (!s.graphs.contains(object<GraphState>(graph))) return kInvalidHandle;
    auto *made = new GraphState(*object<GraphState>(graph));
    s.execs.insert(made);
    *exec = reinterpret_cast<GraphExec>(made);
    s.log(Line("instantiated").number("graph", reinterpret_cast<uintptr_t>(made)).number("nodes", made->nodes.size()));
    return kOk;
  });
}

Result graph_destroy(Graph graph) {
  return call(Line("cuGraphDestroy"), Needs::context, [&](State &s) {
    if (s.graphs.erase(object<GraphState>(graph)) != 1) return kInvalidHandle;
    delete object<GraphState>(graph);
    return kOk;
  });
}

GraphState *exec_of(State &s, GraphExec exec) {
  auto *found = object<GraphState>(exec);
  return s.execs.contains(found) ? found : nullptr;
}

Result graph_upload(GraphExec exec, Stream stream) {
  return call(Line("cuGraphUpload"), Needs::context, [&](State &s) {
    return exec_of(s, exec) == nullptr || stream_of(s, stream) == nullptr ? kInvalidHandle : kOk;
  });
}

Result graph_launch(GraphExec exec, Stream stream) {
  const Line line = Line("cuGraphLaunch").number("graph", reinterpret_cast<uintptr_t>(exec));
  return call(line, Needs::context, [&](State &s) {
    GraphState *found = exec_of(s, exec);
    StreamState *on = stream_of(s, stream);
    if (found == nullptr || on == nullptr) return kInvalidHandle;
    const bool is_lost = ++s.num_graph_launches == s.settings.lose_at;
    on->push([found, is_lost] {
      State &now = state();
      if (is_lost) now.lost = kLaunchFailed;
      if (now.lost != kOk) return;
      now.check_pointers(*found, "when a graph runs");
      for (const Node &node : found->nodes) now.run(node);
    });
    return kOk;
  });
}

Result graph_exec_destroy(GraphExec exec) {
  return call(Line("cuGraphExecDestroy"), Needs::context, [&](State &s) {
    GraphState *found = exec_of(s, exec);
    if (found == nullptr) return kInvalidHandle;
    s.execs.erase(found);
    delete found;
    return kOk;
  });
}

}  // namespace fake_cuda
