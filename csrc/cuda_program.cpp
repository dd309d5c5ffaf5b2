#include "cuda_program.h"

#include <array>
#include <cstring>

#include "text.h"

namespace ts {
namespace {

constexpr uint32_t kSharedWithoutAsking = 48 << 10;  // bytes of a thread block; more takes an attribute
constexpr uint64_t kAlignment = 16;                  // that kernels were compiled for

void *marker(uintptr_t value) {
  return reinterpret_cast<void *>(value);  // NOLINT(performance-no-int-to-ptr): that is how the API defines them
}

}  // namespace

CudaKernels::CudaKernels(const CudaContext &context, const Program &program, std::span<const uint8_t> library) {
  for (const auto &[name, kernel] : program.kernels) {
    if (static_cast<int32_t>(kernel.shared_bytes) > context.most_shared_bytes()) {
      fail(TS_NO_TARGET, "the kernel ", in_quotes(name), " takes ", kernel.shared_bytes,
           " bytes of shared memory, and ", context.name(), " has ", context.most_shared_bytes());
    }
    load(context, kernel, library.subspan(kernel.offset, kernel.bytes));
  }
}

void CudaKernels::load(const CudaContext &context, const GpuKernel &kernel, std::span<const uint8_t> cubin) {
  const auto demand = [&](cuda::Result result, const char *what) {
    if (result == cuda::kSuccess) return;
    fail(TS_NO_TARGET, what, " the kernel ", in_quotes(kernel.name), " on ", context.name(),
         " failed: ", context.driver().text(result), "; the driver is for CUDA ",
         CudaDriver::version_text(context.driver().version()),
         ", and the plan's tsp/manifest names the compiler: update the driver, or build the plan with an older one");
  };
  cuda::Module module = nullptr;
  demand(context.cuda().module_load(&module, cubin.data()), "loading");
  modules_.emplace_back(context, module);
  cuda::Function function = nullptr;
  demand(context.cuda().module_get_function(&function, module, kernel.name.c_str()), "finding");
  int32_t registers = 0;  // asked for so that a driver that loads lazily loads it now
  demand(context.cuda().function_get_attribute(&registers, cuda::kNumRegisters, function), "loading");
  if (kernel.shared_bytes > kSharedWithoutAsking) {
    demand(context.cuda().function_set_attribute(function, cuda::kMaxDynamicSharedBytes,
                                                 static_cast<int32_t>(kernel.shared_bytes)),
           "getting shared memory for");
  }
  functions_.emplace(kernel.name, function);
}

namespace {

/// The launch's parameters as its kernel's table packs them.
void pack_params(const Launch &launch, const GpuKernel &kernel,
                 const std::function<cuda::Address(const Argument &, const Launch &)> &address,
                 std::vector<uint8_t> &bytes) {
  bytes.assign(kernel.param_bytes(), 0);
  for (size_t i = 0; i < launch.arguments.size(); ++i) {
    const cuda::Address value = address(launch.arguments[i], launch);
    if (value % kAlignment != 0) {
      fail(TS_INTERNAL, "an argument of ", in_quotes(launch.op), " is not on a ", kAlignment, "-byte boundary");
    }
    std::memcpy(bytes.data() + kernel.params[i].offset, &value, sizeof(value));
  }
}

void add_launch(const CudaContext &context, cuda::Stream stream, const Launch &launch, const GpuKernel &kernel,
                cuda::Function function, bool first, std::vector<uint8_t> &params) {
  cuda::LaunchAttribute overlap;
  overlap.id = cuda::kProgrammaticStreamSerialization;
  overlap.allowed = 1;
  cuda::LaunchConfig config;
  config.grid_x = launch.grid[0];
  config.grid_y = launch.grid[1];
  config.grid_z = launch.grid[2];
  config.block_x = kernel.threads;
  config.shared_bytes = kernel.shared_bytes;
  config.stream = stream;
  config.attributes = &overlap;
  config.num_attributes = first ? 0 : 1;  // before the first there is no kernel
  size_t size = params.size();
  std::array<void *, 5> extra = {marker(cuda::kParamBufferPointer), params.data(), marker(cuda::kParamBufferSize),
                                 &size, marker(cuda::kParamEnd)};
  context.check(context.cuda().launch(&config, function, nullptr, extra.data()), "launching " + in_quotes(launch.op));
}

}  // namespace

CudaGraphExec capture(const CudaContext &context, cuda::Stream stream, const Program &program, const Bucket &bucket,
                      const CudaKernels &kernels,
                      const std::function<cuda::Address(const Argument &, const Launch &)> &address) {
  context.check(context.cuda().stream_begin_capture(stream, cuda::kCaptureThreadLocal), "beginning a graph");
  std::vector<uint8_t> params;
  bool first = true;
  for (const Launch &launch : bucket.launches) {
    const GpuKernel &kernel = program.kernels.find(launch.kernel)->second;
    pack_params(launch, kernel, address, params);
    add_launch(context, stream, launch, kernel, kernels.find(launch.kernel), first, params);
    first = false;
  }
  cuda::Graph captured = nullptr;
  context.check(context.cuda().stream_end_capture(stream, &captured), "ending a graph");
  const CudaGraph graph(context, captured);
  cuda::GraphExec exec = nullptr;
  context.check(context.cuda().graph_instantiate(&exec, graph.get(), 0), "making a graph");
  CudaGraphExec made(context, exec);
  context.check(context.cuda().graph_upload(exec, stream), "uploading a graph");
  return made;
}

}  // namespace ts
