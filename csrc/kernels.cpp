#include "kernels.h"

#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "text.h"

namespace ts {
namespace {

#ifndef MFD_EXEC
constexpr unsigned MFD_EXEC = 0x10;  // Linux 6.3; needed where vm.memfd_noexec is set
#endif

/// Refuses what dlopen would answer with a riddle.
void check_elf(const std::string &name, std::span<const uint8_t> elf) {
  Elf64_Ehdr header{};
  if (elf.size() < sizeof(header))
    fail(TS_BAD_PLAN, in_quotes(name), " is ", elf.size(), " bytes, too short for an ELF file");
  std::memcpy(&header, elf.data(), sizeof(header));
  const bool good = std::memcmp(header.e_ident, ELFMAG, SELFMAG) == 0 && header.e_ident[EI_CLASS] == ELFCLASS64 &&
                    header.e_machine == EM_X86_64 && header.e_type == ET_DYN;
  if (!good) fail(TS_BAD_PLAN, in_quotes(name), " is no ELF shared object for x86-64");
}

/// A file in memory that nobody can change any more.
FileDescriptor sealed_memory(std::span<const uint8_t> bytes) {
  constexpr unsigned kFlags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  int fd = memfd_create("tsruntime-kernels", kFlags | MFD_EXEC);
  if (fd < 0 && errno == EINVAL) fd = memfd_create("tsruntime-kernels", kFlags);
  FileDescriptor memory(fd);
  if (!memory.valid()) fail(TS_IO, "cannot make a memory file for kernels: ", std::strerror(errno));
  while (!bytes.empty()) {
    const ssize_t written = write(memory.get(), bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) fail(TS_IO, "cannot write kernels to memory: ", std::strerror(errno));
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
  if (fcntl(memory.get(), F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    fail(TS_IO, "cannot seal kernels: ", std::strerror(errno));
  }
  return memory;
}

}  // namespace

void Kernels::Close::operator()(void *library) const { dlclose(library); }

Kernels::Kernels(const std::string &name, std::span<const uint8_t> elf) : name_(name) {
  check_elf(name, elf);
  memory_ = sealed_memory(elf);
  const std::string path = "/proc/self/fd/" + std::to_string(memory_.get());
  library_.reset(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL));
  if (!library_) {
    const char *reason = dlerror();
    fail(TS_BAD_PLAN, in_quotes(name),
         " cannot be loaded: ", in_quotes(reason != nullptr ? reason : "no reason given"));
  }
  link_map *map = nullptr;
  if (dlinfo(library_.get(), RTLD_DI_LINKMAP, static_cast<void *>(&map)) != 0)
    fail(TS_INTERNAL, "no link map for ", in_quotes(name));
  for (const ElfW(Dyn) *entry = map->l_ld; entry->d_tag != DT_NULL; ++entry) {
    if (entry->d_tag == DT_NEEDED)
      fail(TS_BAD_PLAN, in_quotes(name), " depends on other libraries, wanted one that stands alone");
  }
}

ts_kernel Kernels::find(const std::string &symbol) const {
  void *address = dlsym(library_.get(), symbol.c_str());
  if (address == nullptr) fail(TS_BAD_PLAN, in_quotes(name_), " lacks the kernel ", in_quotes(symbol));
  return reinterpret_cast<ts_kernel>(address);
}

}  // namespace ts
