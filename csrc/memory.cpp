#include "memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "text.h"

namespace ts {
namespace {

constexpr uint64_t kHugePage = uint64_t{2} << 20;

}  // namespace

Memory::Memory(uint64_t bytes, const char *what) {
  const bool large = bytes >= kHugePage;
  mapped_bytes_ = large ? bytes + kHugePage : bytes;
  base_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base_ == MAP_FAILED) {
    fail(TS_NO_MEMORY, "cannot get ", human_bytes(bytes), " for ", what, ": ", std::strerror(errno));
  }
  auto *begin = static_cast<uint8_t *>(base_);
  const uint64_t skip = large ? (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage : 0;
  data_ = begin + skip;
  if (large) madvise(data_, bytes, MADV_HUGEPAGE);  // only a wish
}

Memory::~Memory() { munmap(base_, mapped_bytes_); }

}  // namespace ts
