#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <vector>

namespace ts {

/// For tables that are read all over: large ones lie in huge pages where the system has some, so that an access that misses the caches
/// does not also walk a page table.
template <class T>
struct HugeAllocator {
  using value_type = T;

  HugeAllocator() = default;
  template <class U>
  HugeAllocator(const HugeAllocator<U> &) {}  // NOLINT(google-explicit-constructor): allocators convert

  T *allocate(size_t count) {
    const size_t bytes = count * sizeof(T);
    void *memory = ::operator new(bytes, alignment(bytes));
    if (bytes >= kHugePage) madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // only a wish
    return static_cast<T *>(memory);
  }
  void deallocate(T *memory, size_t count) { ::operator delete(memory, alignment(count * sizeof(T))); }

  friend bool operator==(const HugeAllocator &, const HugeAllocator &) { return true; }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20;

  static std::align_val_t alignment(size_t bytes) {
    return std::align_val_t{bytes >= kHugePage ? kHugePage : alignof(T)};
  }
};

template <class T>
using HugeVector = std::vector<T, HugeAllocator<T>>;

}  // namespace ts
