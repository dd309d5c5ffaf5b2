#pragma once

#include <cstdint>
#include <string>

#include "sha256.h"

namespace ts {

/// What tells a file from every other, and from itself before a change.
struct FileId {
  uint64_t device = 0;
  uint64_t inode = 0;
  uint64_t bytes = 0;
  int64_t mtime_ns = 0;
  int64_t ctime_ns = 0;

  bool operator==(const FileId &) const = default;
};

/// The plans whose weights this user's processes have hashed on this machine: the last few, in one small file under
/// $XDG_CACHE_HOME/tsruntime or ~/.cache/tsruntime. It saves time and nothing else: whatever is wrong with it (no home, a full
/// disk, another owner, garbage) means that weights are hashed again, and is no error.
class VerifiedFiles {
 public:
  VerifiedFiles();                                ///< the user's
  explicit VerifiedFiles(std::string directory);  ///< empty: none, remembers nothing

  /// `seal` is that of the plan: it covers the manifest, and so every weight's hash.
  bool contains(const FileId &file, const Digest &seal) const;
  void remember(const FileId &file, const Digest &seal) const;

 private:
  std::string directory_;
};

}  // namespace ts
