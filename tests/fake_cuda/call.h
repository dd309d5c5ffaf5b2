// What the fake's functions are made of.
#pragma once

#include "state.h"

namespace fake_cuda {

using namespace ts::cuda;  // NOLINT(google-build-using-namespace): the types of the list

// Each function of the API, under our name for it.
#define FAKE_CUDA_DECLARE(own, theirs, ...) Result own(__VA_ARGS__);
TS_CUDA_FUNCTIONS(FAKE_CUDA_DECLARE)
#undef FAKE_CUDA_DECLARE

inline constexpr Result kOk = 0, kBadValue = 1, kNoMemory = 2, kNotInitialized = 3, kNoGpu = 100, kBadImage = 200,
                        kInvalidContext = 201, kNoBinary = 209, kInvalidHandle = 400, kNoFunction = 500,
                        kOutOfResources = 701, kLaunchFailed = 719, kCaptureUnsupported = 900,
                        kCaptureInvalidated = 901;

extern thread_local bool has_context;

/// What a handle of the API points to.
template <class Object, class Handle>
Object *object(Handle handle) {
  return reinterpret_cast<Object *>(handle);
}

enum class Needs : uint8_t { nothing, start, context };

/// A call: its line is logged, and what it needs is checked.
template <class Body>
Result call(const Line &line, Needs needs, Body &&body) {
  State &s = state();
  const std::lock_guard lock(s.mutex);
  s.log(line);
  if (needs != Needs::nothing && !s.started) return kNotInitialized;
  if (s.lost != kOk) return s.lost;
  if (needs == Needs::context && (!has_context || s.retained == 0)) {
    s.violation("a call from a thread without a context");
    return kInvalidContext;
  }
  return body(s);
}

/// A stream that is there, or null and a violation.
StreamState *stream_of(State &s, Stream stream);

}  // namespace fake_cuda
