// What csrc/cuda_api.h writes down of the driver API, compared with NVIDIA's own header, of the Python package triton. All of it is
// compared when this file is compiled.
#include "cuda_api.h"

#include <cuda.h>
#include <gtest/gtest.h>

#include <type_traits>

namespace ts::cuda {
namespace {

/// Alike to a caller: both pointers, or both integers (an enum is one) of one size.
template <class Ours, class Theirs>
constexpr bool alike() {
  if constexpr (std::is_pointer_v<Ours> || std::is_pointer_v<Theirs>) {
    return std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>;
  } else {
    constexpr bool integers =
        (std::is_integral_v<Ours> || std::is_enum_v<Ours>) && (std::is_integral_v<Theirs> || std::is_enum_v<Theirs>);
    return integers && sizeof(Ours) == sizeof(Theirs);
  }
}

template <class Ours, class Theirs>
struct SameCall : std::false_type {};
template <class R, class... Ours, class S, class... Theirs>
struct SameCall<R (*)(Ours...), S (*)(Theirs...)> {
  static constexpr bool count = sizeof...(Ours) == sizeof...(Theirs);
  static constexpr bool value = [] {
    if constexpr (count) {
      return alike<R, S>() && (alike<Ours, Theirs>() && ...);
    } else {
      return false;
    }
  }();
};

// The API's names, which its header makes macros of newer ones, as cuGetProcAddress resolves them.
#define SAME(own, theirs) static_assert(SameCall<decltype(Functions::own), decltype(&theirs)>::value, #theirs)
SAME(get_error_name, cuGetErrorName);
SAME(get_error_string, cuGetErrorString);
SAME(init, cuInit);
SAME(device_get_count, cuDeviceGetCount);
SAME(device_get, cuDeviceGet);
SAME(device_get_name, cuDeviceGetName);
SAME(device_get_attribute, cuDeviceGetAttribute);
SAME(context_retain, cuDevicePrimaryCtxRetain);
SAME(context_release, cuDevicePrimaryCtxRelease);
SAME(context_set_current, cuCtxSetCurrent);
SAME(memory_info, cuMemGetInfo);
SAME(memory_allocate, cuMemAlloc);
SAME(memory_free, cuMemFree);
SAME(host_allocate, cuMemHostAlloc);
SAME(host_free, cuMemFreeHost);
SAME(copy_to_device, cuMemcpyHtoDAsync);
SAME(copy_to_host, cuMemcpyDtoHAsync);
SAME(fill_bytes, cuMemsetD8Async);
SAME(stream_create, cuStreamCreate);
SAME(stream_destroy, cuStreamDestroy);
SAME(stream_synchronize, cuStreamSynchronize);
SAME(stream_begin_capture, cuStreamBeginCapture);
SAME(stream_end_capture, cuStreamEndCapture);
SAME(event_create, cuEventCreate);
SAME(event_destroy, cuEventDestroy);
SAME(event_record, cuEventRecord);
SAME(event_synchronize, cuEventSynchronize);
SAME(module_load, cuModuleLoadData);
SAME(module_unload, cuModuleUnload);
SAME(module_get_function, cuModuleGetFunction);
SAME(function_get_attribute, cuFuncGetAttribute);
SAME(function_set_attribute, cuFuncSetAttribute);
SAME(launch, cuLaunchKernelEx);
SAME(graph_instantiate, cuGraphInstantiateWithFlags);
SAME(graph_destroy, cuGraphDestroy);
SAME(graph_upload, cuGraphUpload);
SAME(graph_launch, cuGraphLaunch);
SAME(graph_exec_destroy, cuGraphExecDestroy);
static_assert(SameCall<DriverGetVersion, decltype(&cuDriverGetVersion)>::value);
static_assert(SameCall<GetProcAddress, decltype(&cuGetProcAddress_v2)>::value);

static_assert(sizeof(Address) == sizeof(CUdeviceptr) && sizeof(Device) == sizeof(CUdevice));
static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(offsetof(LaunchAttribute, allowed) == offsetof(CUlaunchAttribute, value));
static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig));
static_assert(offsetof(LaunchConfig, block_x) == offsetof(CUlaunchConfig, blockDimX));
static_assert(offsetof(LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(LaunchConfig, num_attributes) == offsetof(CUlaunchConfig, numAttrs));

static_assert(kSuccess == CUDA_SUCCESS && kInvalidValue == CUDA_ERROR_INVALID_VALUE);
static_assert(kOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY && kNoDevice == CUDA_ERROR_NO_DEVICE);
static_assert(kInvalidImage == CUDA_ERROR_INVALID_IMAGE && kNoBinaryForGpu == CUDA_ERROR_NO_BINARY_FOR_GPU);
static_assert(kUnsupportedPtxVersion == CUDA_ERROR_UNSUPPORTED_PTX_VERSION && kNotFound == CUDA_ERROR_NOT_FOUND);
static_assert(kCapabilityMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(kCapabilityMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(kMaxSharedBytesOptIn == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
static_assert(kNumRegisters == CU_FUNC_ATTRIBUTE_NUM_REGS);
static_assert(kMaxDynamicSharedBytes == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(kNonBlocking == CU_STREAM_NON_BLOCKING && kDisableTiming == CU_EVENT_DISABLE_TIMING);
static_assert(kCaptureThreadLocal == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
static_assert(kProgrammaticStreamSerialization == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
static_assert(kSymbolFound == CU_GET_PROC_ADDRESS_SUCCESS && kSymbolNotFound == CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
static_assert(kVersionNotSufficient == CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT);
static_assert(kParamEnd == CU_LAUNCH_PARAM_END_AS_INT && kParamBufferSize == CU_LAUNCH_PARAM_BUFFER_SIZE_AS_INT);
static_assert(kParamBufferPointer == CU_LAUNCH_PARAM_BUFFER_POINTER_AS_INT);

TEST(CudaApi, IsThatOfNvidiasHeader) {
  // Every function that we use is compared above: as many as the list has.
  int count = 0;
#define COUNT(...) ++count;
  TS_CUDA_FUNCTIONS(COUNT)
#undef COUNT
  EXPECT_EQ(count, 38);
}

}  // namespace
}  // namespace ts::cuda
