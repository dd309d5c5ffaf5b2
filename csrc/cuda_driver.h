#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "cuda_api.h"
#include "error.h"
#include "gpu_target.h"

namespace ts {

/// There is no GPU here that runs a target: no driver, no device, or none of the capability. Another target may do.
class NoGpu : public Error {
 public:
  explicit NoGpu(const std::string &message) : Error(TS_NO_TARGET, message) {}
};

/// NVIDIA's driver, found when it is needed: so one executable runs with and without a GPU. Loaded for good.
class CudaDriver {
 public:
  /// `library`: a file; empty: libcuda.so.1, where the system looks. `least_version`: of CUDA, 1000 * major + 10 * minor, that the
  /// driver must have. Throws NoGpu if there is no such library, Error (TS_NO_TARGET) if it is too old, lacks a function that we
  /// need, or does not start.
  CudaDriver(const std::string &library, int32_t least_version);
  CudaDriver(const CudaDriver &) = delete;
  CudaDriver &operator=(const CudaDriver &) = delete;

  const cuda::Functions &functions() const { return functions_; }
  int32_t version() const { return version_; }
  static std::string version_text(int32_t version);  ///< "12.3"

  /// The name of a result, and what NVIDIA says of it: "CUDA_ERROR_OUT_OF_MEMORY (out of memory)".
  std::string text(cuda::Result result) const;

  /// Throws Error of `status` unless all went well: `what`, which failed, and the result's text.
  void check(cuda::Result result, std::string_view what, ts_status status = TS_INTERNAL) const {
    if (result != cuda::kSuccess) [[unlikely]]
      refuse(result, what, status);
  }

 private:
  [[noreturn]] void refuse(cuda::Result result, std::string_view what, ts_status status) const;

  cuda::Functions functions_;
  int32_t version_ = 0;
};

/// A GPU, and its primary context. Whatever is made in the context must go before it does.
class CudaContext {
 public:
  /// The first device of the target's capability. Throws as CudaDriver does; NoGpu, naming what is there, if there is none.
  CudaContext(const std::string &library, const std::string &target);
  ~CudaContext();
  CudaContext(const CudaContext &) = delete;
  CudaContext &operator=(const CudaContext &) = delete;

  const CudaDriver &driver() const { return driver_; }
  const cuda::Functions &cuda() const { return driver_.functions(); }
  void check(cuda::Result result, std::string_view what, ts_status status = TS_INTERNAL) const {
    driver_.check(result, what, status);
  }

  /// The calling thread's calls are about this device from now on. Each thread says so before its first.
  void make_current() const;

  const std::string &name() const { return name_; }      ///< such as "NVIDIA H200"
  int32_t most_shared_bytes() const { return shared_; }  ///< of a thread block
  uint64_t free_memory() const;                          ///< bytes; of the calling thread's device, which is this

 private:
  CudaDriver driver_;
  cuda::Device device_ = 0;
  cuda::Context context_ = nullptr;
  std::string name_;
  int32_t shared_ = 0;
};

}  // namespace ts
