// What the fake driver reads of a cubin: the GPU that it is for, its kernels, and each one's parameters.
#pragma once

#include <elf.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fake_cuda {

constexpr uint16_t kMachineCuda = 190;  // EM_CUDA

struct Cubin {
  int32_t arch = 0;  // 10 * major + minor
  struct Param {
    uint32_t offset = 0, bytes = 0;
  };
  std::map<std::string, std::vector<Param>> kernels;

  /// Nothing if the image is no cubin. There is no size to check against, as the driver has none.
  static std::optional<Cubin> read(const uint8_t *image) {
    Elf64_Ehdr header{};
    std::memcpy(&header, image, sizeof(header));
    const bool good = std::memcmp(header.e_ident, ELFMAG, SELFMAG) == 0 && header.e_ident[EI_CLASS] == ELFCLASS64 &&
                      header.e_machine == kMachineCuda && header.e_shentsize == sizeof(Elf64_Shdr);
    if (!good) return {};
    Cubin cubin;
    // The field moved with the ABI's version 8, which came with CUDA 13.
    cubin.arch =
        static_cast<int32_t>(header.e_ident[EI_ABIVERSION] >= 8 ? header.e_flags >> 8 & 0xff : header.e_flags & 0xff);
    std::vector<Elf64_Shdr> sections(header.e_shnum);
    std::memcpy(static_cast<void *>(sections.data()), image + header.e_shoff, sections.size() * sizeof(Elf64_Shdr));
    const char *names = reinterpret_cast<const char *>(image) + sections.at(header.e_shstrndx).sh_offset;
    const std::string kText = ".text.", kInfo = ".nv.info.";
    for (const Elf64_Shdr &section : sections) {
      const std::string name = names + section.sh_name;
      if (name.starts_with(kText)) cubin.kernels[name.substr(kText.size())];
    }
    for (const Elf64_Shdr &section : sections) {
      const std::string name = names + section.sh_name;
      if (!name.starts_with(kInfo)) continue;
      cubin.kernels[name.substr(kInfo.size())] = params(image + section.sh_offset, section.sh_size);
    }
    return cubin;
  }

 private:
  /// EIATTR_KPARAM_INFO (0x17), of 12 bytes: index u32, ordinal u16, offset u16, and a word with the size from bit 18 on.
  static std::vector<Param> params(const uint8_t *info, size_t size) {
    std::map<uint16_t, Param> found;
    for (size_t at = 0; at + 4 <= size; at += 4) {
      uint16_t length = 0;
      std::memcpy(&length, info + at + 2, 2);
      if (info[at] != 4) continue;  // a format without a length
      if (info[at + 1] == 0x17) {
        uint16_t ordinal = 0, offset = 0;
        uint32_t word = 0;
        std::memcpy(&ordinal, info + at + 8, 2);
        std::memcpy(&offset, info + at + 10, 2);
        std::memcpy(&word, info + at + 12, 4);
        found[ordinal] = {offset, word >> 18};
      }
      at += length;
    }
    std::vector<Param> params;
    for (const auto &[ordinal, param] : found) params.push_back(param);
    return params;
  }
};

}  // namespace fake_cuda
