#include "state.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <utility>

namespace fake_cuda {

Block::Block(size_t bytes_, int64_t number_)
    : bytes(bytes_), number(number_), storage(new uint8_t[bytes_ + 3 * kGuard]) {  // not set: tests are many
  const auto begin = reinterpret_cast<uintptr_t>(storage.get());
  data = storage.get() + kGuard + (kGuard - begin % kGuard) % kGuard;
  std::fill(storage.get(), data, kGuardByte);
  std::fill_n(data, bytes, kPoison);
  std::fill(data + bytes, storage.get() + bytes + 3 * kGuard, kGuardByte);
}

bool Block::intact() const {
  const auto is_guard = [](uint8_t byte) { return byte == kGuardByte; };
  return std::all_of<const uint8_t *>(storage.get(), data, is_guard) &&
         std::all_of<const uint8_t *>(data + bytes, storage.get() + bytes + 3 * kGuard, is_guard);
}

void StreamState::push(std::function<void()> job) {
  work.push_back(std::move(job));
  ++num_queued;
}

void StreamState::run(int64_t until) {
  while (num_done < until) {
    const auto job = std::move(work.front());
    work.pop_front();
    ++num_done;
    job();
  }
}

void State::log(const Line &line) {
  lines.push_back(line.finish());
  if (file == nullptr) return;
  std::fprintf(file, "%s\n", lines.back().c_str());
  std::fflush(file);
}

void State::violation(const std::string &what) {
  ++num_violations;
  log(Line("violation").text("what", what));
}

namespace {

const Block *block_of(const std::map<uintptr_t, Block> &blocks, uintptr_t address, size_t bytes) {
  auto after = blocks.upper_bound(address);
  if (after == blocks.begin()) return nullptr;
  const Block &block = std::prev(after)->second;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(block.data);
  return address - begin <= block.bytes && bytes <= block.bytes - (address - begin) ? &block : nullptr;
}

}  // namespace

const Block *State::device_block(uint64_t address, size_t bytes) const { return block_of(device, address, bytes); }
const Block *State::host_block(const void *address, size_t bytes) const {
  return block_of(host, reinterpret_cast<uintptr_t>(address), bytes);
}

void State::check_guards() {
  for (const auto *blocks : {&device, &host}) {
    for (const auto &[address, block] : *blocks) {
      if (!block.intact()) violation("bytes beside allocation " + std::to_string(block.number) + " were written");
    }
  }
}

/// Every parameter that is not null points into memory that is there.
void State::check_pointers(const GraphState &graph, const char *when) {
  for (const Node &node : graph.nodes) {
    for (size_t i = 0; i < node.params.size(); ++i) {
      const auto address = reinterpret_cast<uint64_t>(node.params[i]);
      if (address == 0 || device_block(address, 1) != nullptr) continue;
      violation(std::string(when) + ": parameter " + std::to_string(i) + " of " + node.name +
                " points to no memory of the device");
    }
  }
}

void State::run(const Node &node) {
  if (runner != nullptr) return runner(node.name.c_str(), node.grid, node.params.data(), node.params.size());
  if (kernels == nullptr) return;
  using Kernel = void (*)(const uint32_t *grid, void *const *params);
  const auto kernel = reinterpret_cast<Kernel>(dlsym(kernels, node.name.c_str()));
  if (kernel == nullptr) return violation("no kernel " + node.name + " for the host");
  kernel(node.grid, node.params.data());
}

namespace {

Settings parse(const std::string &text) {
  Settings s;
  const std::map<std::string, std::function<void(const std::string &)>> known = {
      {"version", [&](const std::string &v) { s.version = std::stoi(v); }},
      {"major", [&](const std::string &v) { s.major = std::stoi(v); }},
      {"minor", [&](const std::string &v) { s.minor = std::stoi(v); }},
      {"devices", [&](const std::string &v) { s.devices = std::stoi(v); }},
      {"init", [&](const std::string &v) { s.init = std::stoi(v); }},
      {"total", [&](const std::string &v) { s.total = std::stoll(v); }},
      {"oom_at", [&](const std::string &v) { s.oom_at = std::stoll(v); }},
      {"host_oom_at", [&](const std::string &v) { s.host_oom_at = std::stoll(v); }},
      {"lose_at", [&](const std::string &v) { s.lose_at = std::stoll(v); }},
      {"missing", [&](const std::string &v) { s.missing = v; }},
      {"refused", [&](const std::string &v) { s.refused = v; }},
      {"kernels", [&](const std::string &v) { s.kernels = v; }},
      {"log", [&](const std::string &v) { s.log = v; }},
  };
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ';');) {
    const size_t equals = part.find('=');
    const auto found = known.find(part.substr(0, equals));
    if (equals == std::string::npos || found == known.end()) {
      std::fprintf(stderr, "FAKE_CUDA: no setting '%s'\n", part.c_str());
      std::abort();
    }
    found->second(part.substr(equals + 1));
  }
  return s;
}

}  // namespace

State &state() {
  static auto *made = new State;  // never destroyed: calls may come from anybody's destructor
  return *made;
}

namespace {

template <class Object>
void destroy(std::set<Object *> &objects) {
  for (Object *each : objects) delete each;
  objects.clear();
}

/// What a device that was lost held: nobody could take it back.
void forget(State &s) {
  s.device.clear();
  s.host.clear();
  s.used = s.retained = 0;
  destroy(s.execs);
  destroy(s.graphs);
  destroy(s.modules);
  destroy(s.streams);
  destroy(s.events);
}

}  // namespace

void reset(const std::string &settings) {
  State &s = state();
  if (s.lost != 0) forget(s);
  s.settings = parse(settings);
  s.lines.clear();
  s.num_violations = 0;
  if (s.file != nullptr) std::fclose(s.file);
  s.file = s.settings.log.empty() ? nullptr : std::fopen(s.settings.log.c_str(), "a");
  s.runner = nullptr;
  s.lost = 0;
  s.num_allocations = s.num_host_allocations = s.num_graph_launches = 0;
  if (s.kernels != nullptr) dlclose(s.kernels);
  s.kernels = s.settings.kernels.empty() ? nullptr : dlopen(s.settings.kernels.c_str(), RTLD_NOW | RTLD_LOCAL);
}

namespace {

__attribute__((constructor)) void take_environment() {
  const char *settings = std::getenv("FAKE_CUDA");
  reset(settings == nullptr ? "" : settings);
}

}  // namespace
}  // namespace fake_cuda

extern "C" {

void fake_cuda_reset(const char *settings) { fake_cuda::reset(settings); }

const char *fake_cuda_log(void) {
  static std::string joined;
  joined.clear();
  for (const std::string &line : fake_cuda::state().lines) joined += line + "\n";
  return joined.c_str();
}

int64_t fake_cuda_num_violations(void) { return fake_cuda::state().num_violations; }
void fake_cuda_set_runner(fake_cuda_runner runner) { fake_cuda::state().runner = runner; }

}  // extern "C"
