#include "cuda_upload.h"

#include <algorithm>
#include <cstring>

namespace ts {
namespace {

constexpr size_t kParts = 2;
constexpr uint64_t kPartBytes = uint64_t{16} << 20;

}  // namespace

CudaUpload::CudaUpload(const CudaContext &context, cuda::Stream stream) : context_(context), stream_(stream) {
  for (size_t i = 0; i < kParts; ++i) {
    parts_.push_back({make_pinned(context, kPartBytes, "getting pinned memory for weights"), make_event(context)});
  }
}

void CudaUpload::copy(cuda::Address to, std::span<const uint8_t> from) {
  const cuda::Functions &cuda = context_.cuda();
  while (!from.empty()) {
    Part &part = parts_[next_++ % kParts];
    context_.check(cuda.event_synchronize(part.done.get()), "waiting for a copy of weights");
    const size_t bytes = std::min<uint64_t>(from.size(), kPartBytes);
    std::memcpy(part.memory.get(), from.data(), bytes);
    context_.check(cuda.copy_to_device(to, part.memory.get(), bytes, stream_), "copying weights");
    context_.check(cuda.event_record(part.done.get(), stream_), "marking a copy of weights");
    from = from.subspan(bytes);
    to += bytes;
  }
}

void CudaUpload::finish() { context_.check(context_.cuda().stream_synchronize(stream_), "copying weights"); }

}  // namespace ts
