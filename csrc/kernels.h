#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "file.h"
#include "launch_abi.h"

namespace ts {

/// A target's shared object, loaded from memory. Its bytes are trusted as far as the plan is: loading runs code.
class Kernels {
 public:
  /// `name` is the entry's, for messages. Throws Error: TS_BAD_PLAN if it is no x86-64 shared object without dependencies,
  /// TS_IO if the system refuses.
  Kernels(const std::string &name, std::span<const uint8_t> elf);

  /// Throws Error (TS_BAD_PLAN) naming a symbol that is missing.
  ts_kernel find(const std::string &symbol) const;

 private:
  struct Close {
    void operator()(void *library) const;
  };

  std::string name_;
  FileDescriptor
      memory_;  // open as long as the library is: the loader knows libraries by path, and the path holds this number
  std::unique_ptr<void, Close> library_;
};

}  // namespace ts
