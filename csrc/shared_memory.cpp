#include "shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "text.h"

namespace ts {

SharedMemory::SharedMemory(uint64_t bytes) : bytes_(bytes) {
  fd_ = memfd_create("tsruntime-ranks", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  const bool made = fd_ >= 0 && ftruncate(fd_, static_cast<off_t>(bytes)) == 0 &&
                    fcntl(fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0;  // nobody can pull it away
  if (!made) {
    const int error = errno;
    if (fd_ >= 0) close(fd_);
    fail(TS_NO_MEMORY, "cannot get ", human_bytes(bytes), " of memory to share between ranks: ", std::strerror(error));
  }
  map();
}

SharedMemory::SharedMemory(int fd, uint64_t bytes) : fd_(fd), bytes_(bytes) {
  struct stat found{};
  const bool known = fstat(fd, &found) == 0;
  if (!known || static_cast<uint64_t>(found.st_size) != bytes || (fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK) == 0) {
    close(fd);
    fail(TS_IO, "the ranks' shared memory has ", known ? found.st_size : -1, " bytes, wanted ", bytes, ", sealed");
  }
  map();
}

void SharedMemory::map() {
  void *mapped = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  if (mapped == MAP_FAILED) {
    const int error = errno;
    close(fd_);
    fail(TS_NO_MEMORY, "cannot map ", human_bytes(bytes_), " of memory shared between ranks: ", std::strerror(error));
  }
  data_ = static_cast<uint8_t *>(mapped);
}

SharedMemory::~SharedMemory() {
  munmap(data_, bytes_);
  close(fd_);
}

}  // namespace ts
