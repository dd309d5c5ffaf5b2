#include "tier_store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "check.h"
#include "text.h"

namespace ts {
namespace {

/// A file without a name. Where the file system knows none such, it has one for a moment.
FileDescriptor unnamed_file(const std::string &folder) {
  int fd = open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC | O_EXCL, S_IRUSR | S_IWUSR);
  if (fd < 0 && (errno == EOPNOTSUPP || errno == EISDIR)) {
    std::string path = folder + "/tsruntime-XXXXXX";
    fd = mkostemp(path.data(), O_CLOEXEC);  // mode 0600
    if (fd >= 0) unlink(path.c_str());
  }
  if (fd < 0) {
    fail(TS_IO, "cannot make a file in ", in_quotes(folder), " for evicted pages: ", std::strerror(errno),
         ": name a folder that this user may write to");
  }
  return FileDescriptor(fd);
}

void reserve(const FileDescriptor &file, uint64_t bytes, const std::string &folder) {
  const auto size = static_cast<off_t>(bytes);
  int code = fallocate(file.get(), 0, 0, size) == 0 ? 0 : errno;
  if (code == EOPNOTSUPP) code = ftruncate(file.get(), size) == 0 ? 0 : errno;
  if (code == 0) return;
  fail(TS_IO, "cannot reserve ", human_bytes(bytes), " in ", in_quotes(folder),
       " for evicted pages: ", std::strerror(code), ": ask for less, or name another folder");
}

/// Calls `transfer` with what is left of `bytes` until nothing is. False if it fails or ends early.
template <class Transfer>
bool all_of(uint64_t bytes, const Transfer &transfer) {
  for (uint64_t done = 0; done < bytes;) {
    const ssize_t moved = transfer(done, bytes - done);
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) return false;
    done += static_cast<uint64_t>(moved);
  }
  return true;
}

}  // namespace

TierStore::TierStore(int32_t num_slots, int32_t num_pieces, uint64_t piece_bytes, const std::string &folder)
    : num_pieces_(num_pieces),
      piece_bytes_(piece_bytes),
      hashes_(static_cast<size_t>(num_slots) * static_cast<size_t>(num_pieces)) {
  TS_ASSERT(piece_bytes % sizeof(int32_t) == 0, "pieces are hashed as int32");
  const uint64_t bytes = std::max<uint64_t>(hashes_.size() * piece_bytes, 1);
  if (folder.empty()) {
    memory_ = std::make_unique<Memory>(bytes, "evicted pages");
  } else {
    file_ = unnamed_file(folder);
    reserve(file_, bytes, folder);
  }
}

PageHash TierStore::hash(const uint8_t *bytes) const {
  const auto num_ints = static_cast<int32_t>(piece_bytes_ / sizeof(int32_t));
  PageHash hash;
  page_hasher().pages({}, {reinterpret_cast<const int32_t *>(bytes), static_cast<size_t>(num_ints)}, num_ints,
                      {&hash, 1});
  return hash;
}

bool TierStore::store(int32_t slot, int32_t piece, const uint8_t *from) {
  const size_t at = index(slot, piece);
  hashes_[at] = hash(from);
  if (memory_) {
    std::memcpy(memory_->data() + at * piece_bytes_, from, piece_bytes_);
    return true;
  }
  const bool written = all_of(piece_bytes_, [&](uint64_t done, uint64_t left) {
    return pwrite(file_.get(), from + done, left, static_cast<off_t>(at * piece_bytes_ + done));
  });
  return written || lost("could not be written", errno);
}

bool TierStore::load(int32_t slot, int32_t piece, uint8_t *to) const {
  const size_t at = index(slot, piece);
  if (memory_) {
    std::memcpy(to, memory_->data() + at * piece_bytes_, piece_bytes_);
    return hash(to) == hashes_[at] || lost("came back changed", 0);
  }
  errno = 0;
  const bool read = all_of(piece_bytes_, [&](uint64_t done, uint64_t left) {
    return pread(file_.get(), to + done, left, static_cast<off_t>(at * piece_bytes_ + done));
  });
  if (!read) return lost("could not be read", errno);
  return hash(to) == hashes_[at] || lost("came back changed", 0);
}

/// False, as what calls it.
bool TierStore::lost(const char *what, int error) const {
  if (told_.exchange(true)) return false;
  std::fprintf(stderr,
               "tsruntime: an evicted page %s%s%s; it is computed again, its place is given up, and more of them are "
               "counted only (kv_offload_pages_failed_total)\n",
               what, error != 0 ? ": " : "", error != 0 ? std::strerror(error) : "");
  return false;
}

}  // namespace ts
