#pragma once

#include <cstdint>

namespace ts {

/// Memory that processes share: an anonymous file that is gone when the last of them is. Zeroed.
class SharedMemory {
 public:
  explicit SharedMemory(uint64_t bytes);  ///< makes it; throws Error (TS_NO_MEMORY)
  SharedMemory(int fd, uint64_t bytes);   ///< maps another's, and takes fd over; throws Error (TS_NO_MEMORY, TS_IO)
  ~SharedMemory();
  SharedMemory(const SharedMemory &) = delete;
  SharedMemory &operator=(const SharedMemory &) = delete;

  uint8_t *data() const { return data_; }  ///< on a page boundary
  uint64_t size() const { return bytes_; }
  int fd() const { return fd_; }

 private:
  void map();

  int fd_ = -1;
  uint64_t bytes_ = 0;
  uint8_t *data_ = nullptr;
};

}  // namespace ts
