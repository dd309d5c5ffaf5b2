#pragma once

#include <cstdint>

/// The tests' own operator new counts, and can be told to fail. Not under a sanitizer, which has its own.
namespace allocations {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kReplaced = false;
#else
constexpr bool kReplaced = true;
#endif

inline thread_local int64_t count = 0;    ///< of this thread
inline thread_local int num_to_pass = 0;  ///< so many of this thread's next ones do not count towards:
inline thread_local int num_to_fail = 0;  ///< so many of this thread's next ones throw std::bad_alloc

}  // namespace allocations
