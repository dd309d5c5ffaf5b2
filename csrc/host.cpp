#include "host.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <system_error>

namespace ts {
namespace {

constexpr uint32_t bit(int i) { return uint32_t{1} << i; }

// Intel SDM volume 1, 13.1: SSE and AVX; opmask and the two ZMM halves; tile configuration and data.
constexpr uint64_t kAvxState = 0x6;
constexpr uint64_t kAvx512State = 0xE0;
constexpr uint64_t kAmxState = 0x60000;

constexpr uint32_t kFma = bit(12), kOsxsave = bit(27), kAvx = bit(28);                            // leaf 1, ecx
constexpr uint32_t kAvx2 = bit(5), kAvx512f = bit(16), kAvx512dq = bit(17), kAvx512bw = bit(30),  // leaf 7, ebx
    kAvx512vl = bit(31);
constexpr uint32_t kAmxBf16 = bit(22), kAmxTile = bit(24);  // leaf 7, edx

template <class T>
bool has_all(T value, T mask) {
  return (value & mask) == mask;
}

__attribute__((target("xsave"))) uint64_t read_xcr0() { return _xgetbv(0); }

bool request_amx() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

/// Contents of `name` in this process's control group and every group above it (version 2 of the hierarchy).
std::vector<std::string> cgroup_files(const char *name) {
  std::vector<std::string> files;
  std::ifstream self("/proc/self/cgroup");
  for (std::string line; std::getline(self, line);) {
    if (!line.starts_with("0::")) continue;
    std::string group = line.substr(3);
    for (;;) {
      std::ifstream file("/sys/fs/cgroup" + group + "/" + name);
      std::ostringstream text;
      if (file) files.push_back((text << file.rdbuf(), text.str()));
      if (group.size() <= 1) break;
      group.resize(group.rfind('/'));
    }
  }
  return files;
}

/// The number after `key` in text of lines "key value" or "key: value kB"; 0 if it is not there.
uint64_t number_after(const std::string &text, const std::string &key) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with(key)) continue;
    uint64_t value = 0;
    std::istringstream(line.substr(key.size())) >> value;
    return value;
  }
  return 0;
}

/// What the control groups leave: limit - usage, where cached file pages count as free.
uint64_t cgroup_memory() {
  uint64_t least = std::numeric_limits<uint64_t>::max();
  const std::vector<std::string> limits = cgroup_files("memory.max");
  const std::vector<std::string> usages = cgroup_files("memory.current");
  const std::vector<std::string> details = cgroup_files("memory.stat");
  if (limits.size() != usages.size() || limits.size() > details.size()) return least;
  for (size_t i = 0; i < limits.size(); ++i) {
    uint64_t limit = 0;
    if (!(std::istringstream(limits[i]) >> limit)) continue;  // "max"
    uint64_t usage = 0;
    std::istringstream(usages[i]) >> usage;
    usage -= std::min(usage, number_after(details[i], "active_file ") + number_after(details[i], "inactive_file "));
    least = std::min(least, limit - std::min(limit, usage));
  }
  return least;
}

}  // namespace

CpuFeatures read_cpu_features() {
  CpuFeatures features;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) != 0) features.leaf1_ecx = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) != 0) {
    features.leaf7_ebx = b;
    features.leaf7_edx = d;
  }
  if (has_all(features.leaf1_ecx, kOsxsave)) features.xcr0 = read_xcr0();
  return features;
}

std::vector<std::string> targets_of(const CpuFeatures &features, bool amx_granted) {
  const bool avx2 = has_all(features.leaf1_ecx, kFma | kOsxsave | kAvx) && has_all(features.leaf7_ebx, kAvx2) &&
                    has_all(features.xcr0, kAvxState);
  const bool avx512 = avx2 && has_all(features.leaf7_ebx, kAvx512f | kAvx512dq | kAvx512bw | kAvx512vl) &&
                      has_all(features.xcr0, kAvx512State);
  const bool amx =
      avx512 && has_all(features.leaf7_edx, kAmxTile | kAmxBf16) && has_all(features.xcr0, kAmxState) && amx_granted;
  std::vector<std::string> targets;
  if (amx) targets.emplace_back("cpu-amx");
  if (avx512) targets.emplace_back("cpu-avx512");
  if (avx2) targets.emplace_back("cpu-avx2");
  return targets;
}

const std::vector<std::string> &host_targets() {
  static const std::vector<std::string> targets = [] {
    const CpuFeatures features = read_cpu_features();
    return targets_of(features, has_all(features.leaf7_edx, kAmxTile) && request_amx());
  }();
  return targets;
}

int cores_of_quota(std::string_view cpu_max) {
  std::istringstream text{std::string(cpu_max)};
  int64_t quota = 0, period = 0;
  if (!(text >> quota >> period) || quota <= 0 || period <= 0) return 0;
  return static_cast<int>(std::clamp<int64_t>(quota / period, 1, std::numeric_limits<int>::max()));
}

int usable_cores() {
  long cores = 0;
  cpu_set_t set;
  CPU_ZERO(&set);
  // Beyond 1,024 CPUs the fixed set is too small, and the number of online ones has to do.
  cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : sysconf(_SC_NPROCESSORS_ONLN);
  for (const std::string &limit : cgroup_files("cpu.max")) {
    if (const int quota = cores_of_quota(limit); quota > 0) cores = std::min<long>(cores, quota);
  }
  return static_cast<int>(std::max(cores, 1L));
}

std::string host_name() {
  std::array<char, 256> name{};
  gethostname(name.data(), name.size() - 1);
  return name.data();
}

std::string executable_folder() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).parent_path();
}

uint64_t available_memory() {
  std::ifstream file("/proc/meminfo");
  std::ostringstream text;
  text << file.rdbuf();
  const uint64_t machine = number_after(text.str(), "MemAvailable:") * 1024;
  return std::min(machine != 0 ? machine : std::numeric_limits<uint64_t>::max(), cgroup_memory());
}

FloatMode::FloatMode(Denormals denormals) : before_(_mm_getcsr()) {
  constexpr uint32_t kDefault = 0x1F80, kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  _mm_setcsr(denormals == Denormals::flush ? kDefault | kFlushToZero | kDenormalsAreZero : kDefault);
}

FloatMode::~FloatMode() { _mm_setcsr(before_); }

}  // namespace ts
