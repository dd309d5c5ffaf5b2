#pragma once

#include <cstdio>
#include <cstdlib>

namespace ts {

[[noreturn]] inline void check_failed(const char *condition, const char *why, const char *file, int line) {
  std::fprintf(stderr, "%s:%d: engine bug: %s (expected %s)\n", file, line, why, condition);
  std::abort();
}

}  // namespace ts

/// An invariant of ours, checked in every build: a broken page table must stop the process before it mixes two users'
/// tokens. For what callers may get wrong, throw Error.
#define TS_ASSERT(condition, why)                                   \
  do {                                                              \
    if (condition) [[likely]] {                                     \
    } else {                                                        \
      ::ts::check_failed(#condition, why, __FILE_NAME__, __LINE__); \
    }                                                               \
  } while (false)
