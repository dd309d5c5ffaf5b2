#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "file.h"
#include "memory.h"
#include "page_hash.h"

namespace ts {

/// Where the second tier's bytes lie, of one rank: slots in memory of the process, or in a file. A slot has a piece for each of the
/// rank's layers, and each piece the hash of what was stored, under this process's secret key: what comes back is what was stored, or
/// nothing. Nothing survives the process: the file has no name, and nobody else may read it.
class TierStore {
 public:
  /// `folder`: the file's; empty: in memory. Throws Error: TS_IO naming it if no such file can be made there, or has no room;
  /// TS_NO_MEMORY.
  TierStore(int32_t num_slots, int32_t num_pieces, uint64_t piece_bytes, const std::string &folder);

  int32_t num_pieces() const { return num_pieces_; }

  // Pieces of one slot may be copied by several threads at once, each by one. [piece_bytes] False if the system says no, or what
  // was read is not what was stored; the first time it is said on stderr why.
  bool store(int32_t slot, int32_t piece, const uint8_t *from);
  bool load(int32_t slot, int32_t piece, uint8_t *to) const;

 private:
  size_t index(int32_t slot, int32_t piece) const {
    return static_cast<size_t>(slot) * static_cast<size_t>(num_pieces_) + static_cast<size_t>(piece);
  }
  PageHash hash(const uint8_t *bytes) const;
  bool lost(const char *what, int error) const;

  const int32_t num_pieces_;
  const uint64_t piece_bytes_;
  std::vector<PageHash> hashes_;    // [num_slots, num_pieces]
  std::unique_ptr<Memory> memory_;  // either this
  FileDescriptor file_;             // or this
  mutable std::atomic<bool> told_ = false;
};

}  // namespace ts
