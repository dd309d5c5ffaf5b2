// What a program of a GPU target has that a CPU's has not: its kernels, their grids, and arguments of the batch.
#include <elf.h>

#include <array>
#include <cstring>
#include <limits>
#include <utility>

#include "program_fields.h"

namespace ts {
namespace {

constexpr size_t kMaxKernels = 10'000;
constexpr size_t kMaxParams = 64;
constexpr int64_t kPointerBytes = 8;
constexpr int64_t kWarp = 32;
// CUDA C++ Programming Guide, technical specifications: of compute capabilities 9.0 and 10.0.
constexpr int64_t kMaxThreads = 1024, kMaxSharedBytes = 227 << 10, kMaxRegisters = 255;
constexpr int64_t kMaxGridX = std::numeric_limits<int32_t>::max(), kMaxGridYZ = 65535;

constexpr std::array<std::pair<std::string_view, BatchArray>, 8> kArrays = {{{"sizes", BatchArray::sizes},
                                                                             {"token_ids", BatchArray::token_ids},
                                                                             {"positions", BatchArray::positions},
                                                                             {"slots", BatchArray::slots},
                                                                             {"query_start", BatchArray::query_start},
                                                                             {"context_len", BatchArray::context_len},
                                                                             {"page_table", BatchArray::page_table},
                                                                             {"logit_rows", BatchArray::logit_rows}}};

/// Pointers, one after the other.
std::vector<GpuKernel::Param> parse_params(const JsonNode &node) {
  check_count(node, 1, kMaxParams);
  std::vector<GpuKernel::Param> params;
  for (size_t i = 0; i < node.size(); ++i) {
    const JsonNode item = node.at(i);
    check_count(item, 2, 2);
    const auto offset = static_cast<int64_t>(i) * kPointerBytes;
    params.push_back({static_cast<uint32_t>(item.at(0).integer(offset, offset)),
                      static_cast<uint32_t>(item.at(1).integer(kPointerBytes, kPointerBytes))});
  }
  return params;
}

/// The driver is not told how long an image is: its header must not lead out of it.
void check_cubin(const JsonNode &node, std::span<const uint8_t> cubin) {
  constexpr uint16_t kMachineCuda = 190;  // EM_CUDA
  Elf64_Ehdr header{};
  if (cubin.size() < sizeof(header)) {
    fail(TS_BAD_PLAN, node.where(), " is ", cubin.size(), " bytes, too short for a cubin");
  }
  std::memcpy(&header, cubin.data(), sizeof(header));
  const bool good = std::memcmp(header.e_ident, ELFMAG, SELFMAG) == 0 && header.e_ident[EI_CLASS] == ELFCLASS64 &&
                    header.e_ident[EI_DATA] == ELFDATA2LSB && header.e_machine == kMachineCuda;
  if (!good) fail(TS_BAD_PLAN, node.where(), " is no cubin, an ELF file for CUDA's machine");
  const auto ends_within = [&](uint64_t offset, uint64_t count, uint64_t each) {
    return offset <= cubin.size() && count * each <= cubin.size() - offset;  // both factors have 16 bits
  };
  if (!ends_within(header.e_shoff, header.e_shnum, header.e_shentsize) ||
      !ends_within(header.e_phoff, header.e_phnum, header.e_phentsize)) {
    fail(TS_BAD_PLAN, node.where(), " is cut off: its tables end beyond its ", cubin.size(), " bytes");
  }
}

GpuKernel parse_kernel(const std::string &name, const JsonNode &node, std::span<const uint8_t> library) {
  node.expect_keys({"bytes", "offset", "params", "registers", "shared_bytes", "threads"});
  const auto size = static_cast<int64_t>(library.size());
  GpuKernel kernel;
  kernel.name = name;
  kernel.offset = static_cast<uint64_t>(multiple(node["offset"], 0, size, 64));
  kernel.bytes = static_cast<uint64_t>(node["bytes"].integer(1, std::numeric_limits<int64_t>::max()));
  if (kernel.bytes > library.size() - kernel.offset) {
    fail(TS_BAD_PLAN, node.where(), " is ", kernel.bytes, " bytes from byte ", kernel.offset, " of ", size,
         " bytes of kernels");
  }
  check_cubin(node, library.subspan(kernel.offset, kernel.bytes));
  kernel.threads = static_cast<uint32_t>(multiple(node["threads"], kWarp, kMaxThreads, kWarp));
  kernel.shared_bytes = static_cast<uint32_t>(node["shared_bytes"].integer(0, kMaxSharedBytes));
  kernel.registers = static_cast<uint32_t>(node["registers"].integer(1, kMaxRegisters));
  kernel.params = parse_params(node["params"]);
  return kernel;
}

}  // namespace

std::map<std::string, GpuKernel, std::less<>> parse_gpu_kernels(const JsonNode &node,
                                                                std::span<const uint8_t> library) {
  std::map<std::string, GpuKernel, std::less<>> kernels;
  node.members(
      [&](const std::string &name, const JsonNode &item) { kernels.emplace(name, parse_kernel(name, item, library)); });
  if (kernels.empty() || kernels.size() > kMaxKernels) {
    fail(TS_BAD_PLAN, node.where(), " has ", kernels.size(), " kernels, wanted 1 to ", kMaxKernels);
  }
  return kernels;
}

std::optional<Argument> parse_gpu_argument(const JsonNode &node) {
  if (const auto array = node.find("batch")) {
    node.expect_keys({"batch"});
    return Argument{Argument::Kind::batch, static_cast<int32_t>(word_of(*array, kArrays))};
  }
  if (!node.find("null")) return {};
  node.expect_keys({"null"});
  static_cast<void>(node["null"].text());
  return Argument{Argument::Kind::null};
}

Launch parse_gpu_launch(const JsonNode &node, const Program &program) {
  node.expect_keys({"args", "grid", "kernel", "op"});
  Launch launch;
  const JsonNode kernel = node["kernel"];
  launch.kernel = kernel.text();
  if (!program.kernels.contains(launch.kernel)) {
    fail(TS_BAD_PLAN, kernel.where(), " is ", in_quotes(launch.kernel), ", which is none of the program's kernels");
  }
  const JsonNode grid = node["grid"];
  check_count(grid, launch.grid.size(), launch.grid.size());
  for (size_t i = 0; i < launch.grid.size(); ++i) {
    launch.grid[i] = static_cast<uint32_t>(grid.at(i).integer(1, i == 0 ? kMaxGridX : kMaxGridYZ));
  }
  return launch;
}

}  // namespace ts
