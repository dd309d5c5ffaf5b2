#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "text.h"

namespace ts {
namespace {

constexpr uint64_t kPage = 4096;

int64_t nanoseconds(const struct timespec &time) { return time.tv_sec * 1'000'000'000LL + time.tv_nsec; }

FileId id_of(const struct stat &info) {
  return {info.st_dev, info.st_ino, static_cast<uint64_t>(info.st_size), nanoseconds(info.st_mtim),
          nanoseconds(info.st_ctim)};
}

[[noreturn]] void fail_system(const char *what) { fail(TS_IO, what, ": ", std::strerror(errno)); }

}  // namespace

FileDescriptor::FileDescriptor(FileDescriptor &&other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

FileDescriptor &FileDescriptor::operator=(FileDescriptor &&other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) close(fd_);
}

MappedFile::MappedFile(const std::string &path) {
  // Non-blocking, so that a pipe is refused below instead of waited for.
  fd_ = FileDescriptor(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd_.valid()) fail_system("cannot open the file");
  struct stat info{};
  if (fstat(fd_.get(), &info) != 0) fail_system("cannot stat the file");
  if (!S_ISREG(info.st_mode)) fail(TS_BAD_PLAN, "not a regular file, wanted a plan");
  id_ = id_of(info);
  if (id_.bytes == 0) fail(TS_BAD_PLAN, "the file is empty, wanted a plan");
  void *data = mmap(nullptr, id_.bytes, PROT_READ, MAP_PRIVATE, fd_.get(), 0);
  if (data == MAP_FAILED) fail_system("cannot map the file");
  data_ = static_cast<const uint8_t *>(data);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<uint8_t *>(data_), id_.bytes);
}

void MappedFile::freeze(uint64_t begin, uint64_t end) {
  begin = begin / kPage * kPage;
  end = std::min((end + kPage - 1) / kPage * kPage, id_.bytes);
  if (begin >= end) return;
  auto *at = const_cast<uint8_t *>(data_) + begin;
  const size_t size = end - begin;
  if (mmap(at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) {
    fail_system("cannot get memory for the plan's tables");
  }
  for (size_t done = 0; done < size;) {
    const ssize_t got = pread(fd_.get(), at + done, size - done, static_cast<off_t>(begin + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail_system("cannot read the file");
    if (got == 0) fail(TS_IO, "the file was cut short while it was read");
    done += static_cast<size_t>(got);
  }
  if (mprotect(at, size, PROT_READ) != 0) fail_system("cannot protect the plan's tables");
}

FileId MappedFile::id_now() const {
  struct stat info{};
  if (fstat(fd_.get(), &info) != 0) fail_system("cannot stat the file");
  return id_of(info);
}

}  // namespace ts
