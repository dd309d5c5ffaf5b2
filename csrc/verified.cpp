#include "verified.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string_view>
#include <utility>

#include "file.h"

namespace ts {
namespace {

constexpr std::string_view kName = "/verified";
constexpr size_t kMaxLines = 64;
constexpr size_t kMaxBytes = 65536;

std::string users_directory() {
  // Only absolute paths count (XDG Base Directory Specification).
  if (const char *cache = std::getenv("XDG_CACHE_HOME"); cache != nullptr && cache[0] == '/') {
    return std::string(cache) + "/tsruntime";
  }
  if (const char *home = std::getenv("HOME"); home != nullptr && home[0] == '/') {
    return std::string(home) + "/.cache/tsruntime";
  }
  return {};
}

/// Whether only this user can have written what lies there.
bool is_ours(const struct stat &info) { return info.st_uid == geteuid() && (info.st_mode & (S_IWGRP | S_IWOTH)) == 0; }

/// Makes the directory and its parents, 0700. False if it is not there afterwards, or is not ours alone.
bool make_directory(const std::string &directory) {
  for (size_t slash = directory.find('/', 1); slash != std::string::npos; slash = directory.find('/', slash + 1)) {
    mkdir(directory.substr(0, slash).c_str(), 0700);
  }
  mkdir(directory.c_str(), 0700);
  struct stat info{};
  return stat(directory.c_str(), &info) == 0 && S_ISDIR(info.st_mode) && is_ours(info);
}

std::string line_of(const FileId &file, const Digest &seal) {
  std::ostringstream line;
  line << file.device << ' ' << file.inode << ' ' << file.bytes << ' ' << file.mtime_ns << ' ' << file.ctime_ns << ' '
       << to_hex(seal);
  return line.str();
}

/// The lines of the file, empty if there is none that can be trusted.
std::string read_lines(const std::string &path) {
  const FileDescriptor fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  struct stat info{};
  if (!fd.valid() || fstat(fd.get(), &info) != 0 || !S_ISREG(info.st_mode) || !is_ours(info)) return {};
  std::string text(kMaxBytes, '\0');
  const ssize_t got = read(fd.get(), text.data(), text.size());
  text.resize(got > 0 ? static_cast<size_t>(got) : 0);
  return text;
}

}  // namespace

VerifiedFiles::VerifiedFiles() : directory_(users_directory()) {}
VerifiedFiles::VerifiedFiles(std::string directory) : directory_(std::move(directory)) {}

bool VerifiedFiles::contains(const FileId &file, const Digest &seal) const {
  struct stat info{};
  if (directory_.empty() || stat(directory_.c_str(), &info) != 0 || !is_ours(info)) return false;
  std::istringstream lines(read_lines(directory_ + std::string(kName)));
  const std::string wanted = line_of(file, seal);
  for (std::string line; std::getline(lines, line);) {
    if (line == wanted) return true;
  }
  return false;
}

void VerifiedFiles::remember(const FileId &file, const Digest &seal) const {
  if (directory_.empty() || !make_directory(directory_)) return;
  const std::string path = directory_ + std::string(kName);
  // Newest first; the file's older lines go. Two processes at once may lose one of two lines: that one is hashed again.
  const std::string prefix = std::to_string(file.device) + ' ' + std::to_string(file.inode) + ' ';
  std::string text = line_of(file, seal) + '\n';
  std::istringstream lines(read_lines(path));
  size_t num_lines = 1;
  for (std::string line; num_lines < kMaxLines && std::getline(lines, line);) {
    if (line.starts_with(prefix)) continue;
    text += line + '\n';
    ++num_lines;
  }
  std::string temporary = path + ".XXXXXX";
  const FileDescriptor fd(mkostemp(temporary.data(), O_CLOEXEC));
  if (!fd.valid()) return;
  const bool written = write(fd.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size());
  if (!written || rename(temporary.c_str(), path.c_str()) != 0) unlink(temporary.c_str());
}

}  // namespace ts
