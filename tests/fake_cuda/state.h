// The state of the fake driver: settings, log, memory, streams, modules and graphs.
#pragma once

#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "cubin.h"
#include "cuda_api.h"
#include "fake_cuda.h"

namespace fake_cuda {

using ts::cuda::Result;

/// A call that names what it was given: {"call":"cuMemAlloc","bytes":64}.
class Line {
 public:
  explicit Line(const char *call) : text_(std::string("{\"call\":\"") + call + '"') {}
  template <class Value>
  Line &number(const char *key, Value value) {
    text_ += std::string(",\"") + key + "\":" + std::to_string(value);
    return *this;
  }
  Line &text(const char *key, const std::string &value) {
    text_ += std::string(",\"") + key + "\":\"" + value + '"';
    return *this;
  }
  std::string finish() const { return text_ + "}"; }

 private:
  std::string text_;
};

struct Settings {
  int32_t version = 13000, major = 9, minor = 0, devices = 1, init = 0;
  int64_t total = int64_t{8} << 30;     // bytes of the device's memory
  int64_t oom_at = 0, host_oom_at = 0;  // which allocation fails; 0: none
  int64_t lose_at = 0;                  // which graph is never finished, since the device is lost
  std::string missing;                  // a symbol that is not there
  std::string refused;                  // a kernel whose module is not loaded
  std::string kernels;                  // a shared object with kernels for the host
  std::string log;                      // a file; none: only in memory
};

/// Memory of the device, or pinned memory of the host, between two guards.
struct Block {
  static constexpr size_t kGuard = 256;
  static constexpr uint8_t kGuardByte = 0xA5, kPoison = 0xFF;
  uint8_t *data = nullptr;
  size_t bytes = 0;
  int64_t number = 0;  // in the order of allocation
  std::unique_ptr<uint8_t[]> storage;

  Block(size_t bytes, int64_t number);
  bool intact() const;
};

struct FunctionState {
  std::string name;
  std::vector<Cubin::Param> params;
  int32_t most_shared = 48 << 10;
  struct ModuleState *module = nullptr;
};

struct ModuleState {
  std::list<FunctionState> functions;  // addresses stay
  Cubin cubin;
};

struct Node {
  FunctionState *function = nullptr;
  std::string name;
  uint32_t grid[3] = {};
  uint32_t threads = 0, shared = 0;
  std::vector<void *> params = {};
  bool programmatic = false;  // the edge from the node before
};

struct GraphState {
  std::vector<Node> nodes;
};

struct EventState {
  int64_t after = 0;  // it is done once its stream has done so much
  struct StreamState *stream = nullptr;
};

/// Work is done when somebody waits for it, not before: what does not wait sees old bytes.
struct StreamState {
  std::deque<std::function<void()>> work;
  int64_t num_queued = 0, num_done = 0;
  bool capturing = false;
  GraphState captured;

  void push(std::function<void()> job);
  void run(int64_t until);
};

struct State {
  std::mutex mutex;
  Settings settings;
  std::vector<std::string> lines;
  int64_t num_violations = 0;
  FILE *file = nullptr;
  Runner runner = nullptr;
  bool started = false;
  Result lost = 0;  // what every call says once the device is lost
  int32_t retained = 0;
  int64_t num_allocations = 0, num_host_allocations = 0, num_graph_launches = 0, used = 0;
  std::map<uintptr_t, Block> device, host;  // by address
  std::set<ModuleState *> modules;
  std::set<GraphState *> graphs, execs;
  std::set<StreamState *> streams;
  std::set<EventState *> events;
  void *kernels = nullptr;

  void log(const Line &line);
  void violation(const std::string &what);
  const Block *device_block(uint64_t address, size_t bytes) const;
  const Block *host_block(const void *address, size_t bytes) const;
  void check_guards();
  void check_pointers(const GraphState &graph, const char *when);
  void run(const Node &node);
};

State &state();
void reset(const std::string &settings);

}  // namespace fake_cuda
