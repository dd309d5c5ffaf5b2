#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cuda_handle.h"

namespace ts {

/// Copies bytes of the host, as of a mapped file, to the device by way of pinned memory: while one part is on its way the next is
/// read. finish() waits for all.
class CudaUpload {
 public:
  CudaUpload(const CudaContext &context, cuda::Stream stream);
  void copy(cuda::Address to, std::span<const uint8_t> from);
  void finish();

 private:
  struct Part {
    PinnedMemory memory;
    CudaEvent done;
  };

  const CudaContext &context_;
  cuda::Stream stream_;
  std::vector<Part> parts_;
  size_t next_ = 0;
};

}  // namespace ts
