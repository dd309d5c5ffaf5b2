// Cubins that the fake driver loads, without code; and the test program for a GPU.
#pragma once

#include <elf.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "make_plan.h"

namespace ts::testing {

/// One kernel with so many pointers as parameters, for an arch (10 * major + minor): an ELF file of the CUDA machine, with the
/// sections that say so.
inline std::string toy_cubin(const std::string &name, int num_params, int arch = 90) {
  std::string info;
  const auto put = [&info](auto value) { info.append(reinterpret_cast<const char *>(&value), sizeof(value)); };
  for (int i = 0; i < num_params; ++i) {
    put(uint8_t{4});     // a format with a length
    put(uint8_t{0x17});  // EIATTR_KPARAM_INFO
    put(uint16_t{12});
    put(uint32_t{0});
    put(static_cast<uint16_t>(i));
    put(static_cast<uint16_t>(8 * i));
    put(uint32_t{8} << 18);
  }
  const std::vector<std::pair<std::string, std::string>> contents = {
      {"", ""}, {".shstrtab", ""}, {".text." + name, std::string(128, '\0')}, {".nv.info." + name, info}};
  std::string names, data;
  std::array<Elf64_Shdr, 4> sections{};
  for (size_t i = 0; i < contents.size(); ++i) {
    sections[i].sh_name = static_cast<Elf64_Word>(names.size());
    names += contents[i].first + '\0';
  }
  for (size_t i = 1; i < contents.size(); ++i) {
    const std::string &content = i == 1 ? names : contents[i].second;
    sections[i].sh_type = i == 1 ? SHT_STRTAB : SHT_PROGBITS;
    sections[i].sh_offset = sizeof(Elf64_Ehdr) + data.size();
    sections[i].sh_size = content.size();
    data += content;
  }
  data.resize((data.size() + 7) / 8 * 8);
  Elf64_Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64;
  header.e_ident[EI_DATA] = ELFDATA2LSB;
  header.e_ident[EI_ABIVERSION] = 7;
  header.e_type = ET_EXEC;
  header.e_machine = 190;
  header.e_flags = static_cast<Elf64_Word>(arch);
  header.e_shoff = sizeof(header) + data.size();
  header.e_ehsize = sizeof(header);
  header.e_shentsize = sizeof(Elf64_Shdr);
  header.e_shnum = sections.size();
  header.e_shstrndx = 1;
  std::string file(reinterpret_cast<const char *>(&header), sizeof(header));
  file += data;
  file.append(reinterpret_cast<const char *>(sections.data()), sizeof(sections));
  file.resize((file.size() + 63) / 64 * 64);
  return file;
}

/// test_program() for a GPU: its launches have grids, and name the arrays of the batch that they read. Two buckets, of up to 8
/// tokens and of up to kMaxTokens, whose logits lie apart.
inline TestPlan toy_gpu_plan(const std::string &target = "sm_90a", int arch = 90) {
  TestPlan plan = test_plan(target);
  std::string library;
  Json kernels = Json::object();
  const std::vector<std::pair<std::string, std::vector<std::string>>> arrays = {
      {"test_embed", {"sizes", "token_ids"}},
      {"test_mix", {"sizes"}},
      {"test_write", {"sizes", "slots"}},
      {"test_attend", {"sizes", "query_start", "context_len", "page_table"}},
      {"test_logits", {"sizes", "logit_rows"}}};
  for (const auto &[name, batch] : arrays) {
    const int own = name == "test_mix" || name == "test_write" || name == "test_attend" || name == "test_embed" ? 2 : 3;
    const int num_params = own + static_cast<int>(batch.size()) + 2;
    Json params = Json::array();
    for (int i = 0; i < num_params; ++i) params.push_back({8 * i, 8});
    const std::string cubin = toy_cubin(name, num_params, arch);
    kernels[name] = {{"offset", library.size()}, {"bytes", cubin.size()},
                     {"threads", 128},           {"shared_bytes", name == "test_logits" ? 100 << 10 : 0},
                     {"registers", 32},          {"params", params}};
    library += cubin;
  }
  plan.reserved["tsp/kernels/" + target] = library;
  plan.edit_program(target, [&](Json &program) {
    program["abi"] = 1;
    program["kernels"] = kernels;
    const int64_t end = program["arena_bytes"], bytes = int64_t{kMaxSeqs} * kLogitsStride * 4;
    program["arena_bytes"] = end + bytes;
    program["buffers"].push_back({{"name", "few"}, {"offset", end}, {"bytes", bytes}});
    Json launches = Json::array();
    for (Json launch : program["buckets"][0]["launches"]) {
      const std::string kernel = launch["kernel"];
      const auto found = std::ranges::find(arrays, kernel, [](const auto &each) { return each.first; });
      for (const std::string &array : found->second) launch["args"].push_back({{"batch", array}});
      launch["args"].push_back({{"null", "global_scratch"}});
      launch["args"].push_back({{"null", "profile_scratch"}});
      launch["grid"] = {kernel == "test_attend" || kernel == "test_logits" ? kMaxSeqs : kMaxTokens, 1, 1};
      launches.push_back(launch);
    }
    Json all = program["buckets"][0], few = all;
    all["launches"] = launches;
    for (Json &launch : launches) {
      if (launch["grid"][0] == kMaxTokens) launch["grid"][0] = 8;
    }
    launches.back()["args"][2] = {{"buffer", 4}};
    few["max_tokens"] = 8;
    few["launches"] = launches;
    few["logits"]["buffer"] = 4;
    program["buckets"] = {few, all};
  });
  return plan;
}

}  // namespace ts::testing
