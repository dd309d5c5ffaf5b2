#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "verified.h"

namespace ts {

/// Owns a file descriptor.
class FileDescriptor {
 public:
  explicit FileDescriptor(int fd = -1) : fd_(fd) {}
  FileDescriptor(FileDescriptor &&other) noexcept;
  FileDescriptor &operator=(FileDescriptor &&other) noexcept;
  ~FileDescriptor();

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }

 private:
  int fd_;
};

/// A regular file mapped for reading. Writes to the file by others show in the mapping, but not in what was frozen.
class MappedFile {
 public:
  /// Throws Error: TS_IO if the system refuses, TS_BAD_PLAN if it is no regular file.
  explicit MappedFile(const std::string &path);
  ~MappedFile();
  MappedFile(const MappedFile &) = delete;
  MappedFile &operator=(const MappedFile &) = delete;

  std::span<const uint8_t> bytes() const { return {data_, id_.bytes}; }

  /// Reads [begin, end), widened to whole pages, into private memory at the same addresses, so that what is checked there
  /// is what is used later, whoever writes to the file. Throws Error (TS_IO) if the file has become shorter.
  void freeze(uint64_t begin, uint64_t end);

  const FileId &id() const { return id_; }  ///< when it was opened
  FileId id_now() const;                    ///< Throws Error (TS_IO)

 private:
  FileDescriptor fd_;
  FileId id_;
  const uint8_t *data_ = nullptr;
};

}  // namespace ts
