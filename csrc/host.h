#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace ts {

/// What CPUID and XGETBV say, as far as targets need it.
struct CpuFeatures {
  uint32_t leaf1_ecx = 0;
  uint32_t leaf7_ebx = 0;
  uint32_t leaf7_edx = 0;
  uint64_t xcr0 = 0;  ///< register states that the operating system saves; 0 without OSXSAVE
};

CpuFeatures read_cpu_features();

/// The targets that such a CPU runs, best first, of cpu-amx, cpu-avx512 and cpu-avx2. `amx_granted`: whether the kernel lets this process use tiles.
std::vector<std::string> targets_of(const CpuFeatures &features, bool amx_granted);

/// The targets that this process can run, best first. Asks the kernel for AMX tiles, once.
const std::vector<std::string> &host_targets();

/// Cores that this process may use: its affinity, and the CPU quota of its control group. At least 1.
int usable_cores();

std::string host_name();
std::string executable_folder();  ///< that of the running program; empty if the system does not say

/// Bytes that this process may still take without swapping: of the machine and of its control group.
uint64_t available_memory();

/// For tests: the fields of cpu.max ("max 100000", "150000 100000") as whole cores, 0 if it sets no limit.
int cores_of_quota(std::string_view cpu_max);

enum class Denormals {
  flush,  ///< FTZ and DAZ: what every kernel runs under
  keep    ///< as C++ has it
};

/// Rounding to nearest and no traps, with denormals as said, on this thread while it lives.
class FloatMode {
 public:
  explicit FloatMode(Denormals denormals);
  ~FloatMode();
  FloatMode(const FloatMode &) = delete;
  FloatMode &operator=(const FloatMode &) = delete;

 private:
  uint32_t before_;
};

}  // namespace ts
