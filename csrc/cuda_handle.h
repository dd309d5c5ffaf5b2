#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "cuda_driver.h"
#include "text.h"

namespace ts {

/// What one call of the driver makes, and another, `End`, takes back: in the context that it was made in, current to the thread that
/// destroys it.
template <class Handle, cuda::Result (*cuda::Functions::*End)(Handle)>
class CudaHandle {
 public:
  CudaHandle(const CudaContext &context, Handle handle) : context_(&context), handle_(handle) {}
  CudaHandle(CudaHandle &&other) noexcept : context_(other.context_), handle_(std::exchange(other.handle_, Handle{})) {}
  CudaHandle &operator=(CudaHandle &&) = delete;
  CudaHandle(const CudaHandle &) = delete;
  CudaHandle &operator=(const CudaHandle &) = delete;
  ~CudaHandle() {
    if (handle_ != Handle{}) (context_->cuda().*End)(handle_);  // of a device that is lost nothing is left to take back
  }

  Handle get() const { return handle_; }

 private:
  const CudaContext *context_;
  Handle handle_;
};

using CudaModule = CudaHandle<cuda::Module, &cuda::Functions::module_unload>;
using CudaStream = CudaHandle<cuda::Stream, &cuda::Functions::stream_destroy>;
using CudaEvent = CudaHandle<cuda::Event, &cuda::Functions::event_destroy>;
using CudaGraph = CudaHandle<cuda::Graph, &cuda::Functions::graph_destroy>;
using CudaGraphExec = CudaHandle<cuda::GraphExec, &cuda::Functions::graph_exec_destroy>;
using DeviceMemory = CudaHandle<cuda::Address, &cuda::Functions::memory_free>;
using PinnedMemory = CudaHandle<void *, &cuda::Functions::host_free>;

inline CudaStream make_stream(const CudaContext &context) {
  cuda::Stream stream = nullptr;
  context.check(context.cuda().stream_create(&stream, cuda::kNonBlocking), "making a stream");
  return {context, stream};
}

inline CudaEvent make_event(const CudaContext &context) {
  cuda::Event event = nullptr;
  context.check(context.cuda().event_create(&event, cuda::kDisableTiming), "making an event");
  return {context, event};
}

/// Pinned memory of the host, which the device copies from and to while the host goes on. Throws Error (TS_NO_MEMORY).
inline PinnedMemory make_pinned(const CudaContext &context, uint64_t bytes, std::string_view what) {
  void *address = nullptr;
  const cuda::Result result = context.cuda().host_allocate(&address, bytes, 0);
  if (result != cuda::kSuccess) {
    context.check(result, std::string(what) + ", " + human_bytes(bytes) + " of the host's,", TS_NO_MEMORY);
  }
  return {context, address};
}

}  // namespace ts
