// The fake's functions, in the order of csrc/cuda_api.h. What each may be given, and what it answers, is from the documentation of
// the driver API.
#include "fake_cuda.h"

#include <cstring>
#include <string>
#include <utility>

#include "call.h"

namespace fake_cuda {

thread_local bool has_context = false;

// ---- start, devices, contexts ---------------------------------------------------------------------------------------

struct Word {
  Result result;
  const char *name, *text;
};
constexpr Word kWords[] = {{0, "CUDA_SUCCESS", "no error"},
                           {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
                           {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
                           {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
                           {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
                           {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
                           {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution"},
                           {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
                           {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
                            "system has unsupported display driver / cuda "
                            "driver combination"}};

Result word_of(Result result, const char **out, const char *Word::*which) {
  for (const Word &word : kWords) {
    if (word.result != result) continue;
    *out = word.*which;
    return kOk;
  }
  *out = nullptr;
  return kBadValue;
}

Result get_error_name(Result result, const char **name) { return word_of(result, name, &Word::name); }
Result get_error_string(Result result, const char **text) { return word_of(result, text, &Word::text); }

Result init(uint32_t flags) {
  return call(Line("cuInit").number("flags", flags), Needs::nothing, [](State &s) {
    if (s.settings.init != 0) return s.settings.init;
    if (s.settings.devices == 0) return kNoGpu;
    s.started = true;
    return kOk;
  });
}

Result device_get_count(int32_t *count) {
  return call(Line("cuDeviceGetCount"), Needs::start, [&](State &s) {
    *count = s.settings.devices;
    return kOk;
  });
}

Result device_get(Device *device, int32_t ordinal) {
  return call(Line("cuDeviceGet").number("ordinal", ordinal), Needs::start, [&](State &s) {
    *device = ordinal;
    return ordinal >= 0 && ordinal < s.settings.devices ? kOk : kBadValue;
  });
}

Result device_get_name(char *name, int32_t length, Device device) {
  return call(Line("cuDeviceGetName").number("device", device), Needs::start, [&](State &) {
    std::strncpy(name, "Fake GPU", static_cast<size_t>(length));
    return kOk;
  });
}

Result device_get_attribute(int32_t *value, int32_t attribute, Device device) {
  const Line line = Line("cuDeviceGetAttribute").number("attribute", attribute).number("device", device);
  return call(line, Needs::start, [&](State &s) {
    switch (attribute) {
      case kCapabilityMajor:
        *value = s.settings.major;
        return kOk;
      case kCapabilityMinor:
        *value = s.settings.minor;
        return kOk;
      case kMaxSharedBytesOptIn:
        *value = 227 << 10;
        return kOk;
      default:
        return kBadValue;
    }
  });
}

Result context_retain(Context *context, Device device) {
  return call(Line("cuDevicePrimaryCtxRetain").number("device", device), Needs::start, [&](State &s) {
    ++s.retained;
    *context = reinterpret_cast<Context>(&s);
    return kOk;
  });
}

Result context_release(Device device) {
  return call(Line("cuDevicePrimaryCtxRelease").number("device", device), Needs::start, [](State &s) {
    if (--s.retained > 0) return kOk;
    s.check_guards();
    const size_t left = s.device.size() + s.host.size() + s.modules.size() + s.graphs.size() + s.execs.size() +
                        s.streams.size() + s.events.size();
    if (left > 0) s.violation(std::to_string(left) + " things were left in the context when it was released");
    return kOk;
  });
}

Result context_set_current(Context context) {
  return call(Line("cuCtxSetCurrent"), Needs::start, [&](State &) {
    has_context = context != nullptr;
    return kOk;
  });
}

// ---- memory ---------------------------------------------------------------------------------------------------------

Result memory_info(size_t *free, size_t *total) {
  return call(Line("cuMemGetInfo"), Needs::context, [&](State &s) {
    *total = static_cast<size_t>(s.settings.total);
    *free = static_cast<size_t>(s.settings.total - s.used);
    return kOk;
  });
}

Result memory_allocate(Address *address, size_t bytes) {
  return call(Line("cuMemAlloc").number("bytes", bytes), Needs::context, [&](State &s) {
    const int64_t number = ++s.num_allocations;
    if (bytes == 0) return kBadValue;
    if (number == s.settings.oom_at || static_cast<int64_t>(bytes) > s.settings.total - s.used) return kNoMemory;
    Block block(bytes, number);
    *address = reinterpret_cast<Address>(block.data);
    s.used += static_cast<int64_t>(bytes);
    s.device.emplace(reinterpret_cast<uintptr_t>(block.data), std::move(block));
    s.log(Line("allocated").number("allocation", number).number("address", *address).number("bytes", bytes));
    return kOk;
  });
}

Result memory_free(Address address) {
  return call(Line("cuMemFree").number("address", address), Needs::context, [&](State &s) {
    const auto found = s.device.find(address);
    if (found == s.device.end()) {
      s.violation("what was freed was not allocated");
      return kBadValue;
    }
    s.check_guards();
    s.used -= static_cast<int64_t>(found->second.bytes);
    s.device.erase(found);
    for (GraphState *exec : s.execs) s.check_pointers(*exec, "memory was freed under a graph");
    for (StreamState *stream : s.streams) {
      if (!stream->work.empty()) s.violation("memory was freed while a stream had work");
    }
    return kOk;
  });
}

Result host_allocate(void **address, size_t bytes, uint32_t flags) {
  return call(Line("cuMemHostAlloc").number("bytes", bytes).number("flags", flags), Needs::context, [&](State &s) {
    const int64_t number = ++s.num_host_allocations;
    if (number == s.settings.host_oom_at) return kNoMemory;
    Block block(bytes, number);
    *address = block.data;
    s.host.emplace(reinterpret_cast<uintptr_t>(block.data), std::move(block));
    return kOk;
  });
}

Result host_free(void *address) {
  return call(Line("cuMemFreeHost"), Needs::context, [&](State &s) {
    s.check_guards();
    if (s.host.erase(reinterpret_cast<uintptr_t>(address)) == 1) return kOk;
    s.violation("what was freed of the host was not allocated");
    return kBadValue;
  });
}

StreamState *stream_of(State &s, Stream stream) {
  auto *found = object<StreamState>(stream);
  if (s.streams.contains(found)) return found;
  s.violation("a call on a stream that is not there");
  return nullptr;
}

/// A copy or a fill: `range` says what is wrong with it, or nothing.
template <class Job>
Result transfer(const Line &line, Stream stream, const std::function<std::string(State &)> &range, Job job) {
  return call(line, Needs::context, [&](State &s) {
    StreamState *on = stream_of(s, stream);
    if (on == nullptr) return kInvalidHandle;
    if (const std::string wrong = range(s); !wrong.empty()) {
      s.violation(wrong);
      return kBadValue;
    }
    if (on->capturing) {
      s.violation("a copy within a capture");
      return kCaptureUnsupported;
    }
    on->push(job);
    return kOk;
  });
}

std::string ranges(const State &s, Address device, const void *host, size_t bytes) {
  if (s.device_block(device, bytes) == nullptr) return "a copy leaves the memory of the device";
  return s.host_block(host, bytes) == nullptr ? "a copy leaves pinned memory" : "";
}

/// Where an address lies, for the log.
Line &where(Line &line, Address address) {
  const Block *block = state().device_block(address, 0);
  return line.number("allocation", block == nullptr ? 0 : block->number)
      .number("offset", block == nullptr ? 0 : address - reinterpret_cast<Address>(block->data));
}

Result copy_to_device(Address to, const void *from, size_t bytes, Stream stream) {
  Line line = Line("cuMemcpyHtoDAsync").number("bytes", bytes);
  return transfer(
      where(line, to), stream, [&](State &s) { return ranges(s, to, from, bytes); },
      [=] { std::memcpy(reinterpret_cast<void *>(to), from, bytes); });
}

Result copy_to_host(void *to, Address from, size_t bytes, Stream stream) {
  Line line = Line("cuMemcpyDtoHAsync").number("bytes", bytes);
  return transfer(
      where(line, from), stream, [&](State &s) { return ranges(s, from, to, bytes); },
      [=] { std::memcpy(to, reinterpret_cast<const void *>(from), bytes); });
}

Result fill_bytes(Address to, unsigned char value, size_t bytes, Stream stream) {
  Line line = Line("cuMemsetD8Async").number("bytes", bytes).number("value", int{value});
  return transfer(
      where(line, to), stream,
      [&](State &s) { return s.device_block(to, bytes) == nullptr ? "a fill leaves the memory of the device" : ""; },
      [=] { std::memset(reinterpret_cast<void *>(to), value, bytes); });
}

// ---- streams and events ---------------------------------------------------------------------------------------------

Result stream_create(Stream *stream, uint32_t flags) {
  return call(Line("cuStreamCreate").number("flags", flags), Needs::context, [&](State &s) {
    auto *made = new StreamState;
    s.streams.insert(made);
    *stream = reinterpret_cast<Stream>(made);
    return kOk;
  });
}

Result stream_destroy(Stream stream) {
  return call(Line("cuStreamDestroy"), Needs::context, [&](State &s) {
    StreamState *found = stream_of(s, stream);
    if (found == nullptr) return kInvalidHandle;
    if (!found->work.empty()) s.violation("a stream with work was destroyed");
    s.streams.erase(found);
    delete found;
    return kOk;
  });
}

Result stream_synchronize(Stream stream) {
  return call(Line("cuStreamSynchronize"), Needs::context, [&](State &s) {
    StreamState *found = stream_of(s, stream);
    if (found == nullptr) return kInvalidHandle;
    if (found->capturing) return kCaptureUnsupported;
    found->run(found->num_queued);
    s.check_guards();
    return s.lost;
  });
}

Result stream_begin_capture(Stream stream, int32_t mode) {
  return call(Line("cuStreamBeginCapture").number("mode", mode), Needs::context, [&](State &s) {
    StreamState *found = stream_of(s, stream);
    if (found == nullptr || found->capturing) return kBadValue;
    found->capturing = true;
    found->captured = {};
    return kOk;
  });
}

Result stream_end_capture(Stream stream, Graph *graph) {
  return call(Line("cuStreamEndCapture"), Needs::context, [&](State &s) {
    StreamState *found = stream_of(s, stream);
    if (found == nullptr || !found->capturing) return kCaptureInvalidated;
    found->capturing = false;
    auto *made = new GraphState(std::move(found->captured));
    s.graphs.insert(made);
    *graph = reinterpret_cast<Graph>(made);
    return kOk;
  });
}

Result event_create(Event *event, uint32_t flags) {
  return call(Line("cuEventCreate").number("flags", flags), Needs::context, [&](State &s) {
    auto *made = new EventState;
    s.events.insert(made);
    *event = reinterpret_cast<Event>(made);
    return kOk;
  });
}

Result event_destroy(Event event) {
  return call(Line("cuEventDestroy"), Needs::context, [&](State &s) {
    if (s.events.erase(object<EventState>(event)) != 1) return kInvalidHandle;
    delete object<EventState>(event);
    return kOk;
  });
}

Result event_record(Event event, Stream stream) {
  return call(Line("cuEventRecord"), Needs::context, [&](State &s) {
    StreamState *on = stream_of(s, stream);
    if (on == nullptr || !s.events.contains(object<EventState>(event))) return kInvalidHandle;
    *object<EventState>(event) = {on->num_queued, on};
    return kOk;
  });
}

Result event_synchronize(Event event) {
  return call(Line("cuEventSynchronize"), Needs::context, [&](State &s) {
    auto *found = object<EventState>(event);
    if (!s.events.contains(found)) return kInvalidHandle;
    if (found->stream != nullptr) found->stream->run(found->after);  // one that was never recorded is done
    return s.lost;
  });
}

}  // namespace fake_cuda

extern "C" {

fake_cuda::Result cuDriverGetVersion(int32_t *version) {
  *version = fake_cuda::state().settings.version;
  return 0;
}

fake_cuda::Result cuGetProcAddress_v2(const char *symbol, void **function, int32_t version, uint64_t flags,
                                      int32_t *found) {
  const std::string name = symbol;
  *found = ts::cuda::kSymbolNotFound;
  *function = nullptr;
  if (flags != 0 || version > fake_cuda::state().settings.version) return 1;
  if (name == fake_cuda::state().settings.missing) return 0;
#define FAKE_CUDA_FIND(own, theirs, ...)           \
  if (name == theirs) {                            \
    Result (*typed)(__VA_ARGS__) = fake_cuda::own; \
    *function = reinterpret_cast<void *>(typed);   \
    *found = ts::cuda::kSymbolFound;               \
  }
  using fake_cuda::Result;
  using namespace ts::cuda;  // NOLINT(google-build-using-namespace): the types of the list
  TS_CUDA_FUNCTIONS(FAKE_CUDA_FIND)
#undef FAKE_CUDA_FIND
  return 0;
}

}  // extern "C"
