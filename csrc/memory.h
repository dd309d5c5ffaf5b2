#pragma once

#include <cstddef>
#include <cstdint>

namespace ts {

/// Zeroed memory straight from the system, on a 64-byte boundary (2 MiB for large regions, in huge pages where there are some). It is taken as it is first touched.
class Memory {
 public:
  /// Throws Error (TS_NO_MEMORY) naming `what`.
  Memory(uint64_t bytes, const char *what);
  ~Memory();
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;

  uint8_t *data() const { return data_; }

 private:
  void *base_ = nullptr;
  size_t mapped_bytes_ = 0;
  uint8_t *data_ = nullptr;
};

}  // namespace ts
