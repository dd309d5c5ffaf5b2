#pragma once

#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "cuda_handle.h"
#include "program.h"

namespace ts {

/// A GPU target's kernels, loaded from their cubins.
class CudaKernels {
 public:
  /// `library`: tsp/kernels/<target>. Loads every kernel now, so that no step has to. Throws Error: TS_NO_TARGET if the driver
  /// refuses one, naming it and the driver; TS_BAD_PLAN if a cubin is none.
  CudaKernels(const CudaContext &context, const Program &program, std::span<const uint8_t> library);

  cuda::Function find(const std::string &name) const { return functions_.at(name); }

 private:
  void load(const CudaContext &context, const GpuKernel &kernel, std::span<const uint8_t> cubin);

  std::vector<CudaModule> modules_;
  std::map<std::string, cuda::Function, std::less<>> functions_;
};

/// A bucket's launches as one graph, each after the one before, which it may overlap with as programmatic dependent launch lets it.
/// `address` says where an argument of a launch lies. Throws Error (TS_INTERNAL).
CudaGraphExec capture(const CudaContext &context, cuda::Stream stream, const Program &program, const Bucket &bucket,
                      const CudaKernels &kernels,
                      const std::function<cuda::Address(const Argument &, const Launch &)> &address);

}  // namespace ts
