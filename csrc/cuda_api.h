#pragma once

#include <cstddef>
#include <cstdint>

/// What we use of NVIDIA's driver API (libcuda), written down so that nothing is built against it: names, values and layouts are
/// those of "CUDA Driver API" (https://docs.nvidia.com/cuda/cuda-driver-api), as of CUDA 12.3. tests/runtime/cuda_api_test.cpp
/// compares them with NVIDIA's own header.
namespace ts::cuda {

using Result = int32_t;    // CUresult
using Device = int32_t;    // CUdevice
using Address = uint64_t;  // CUdeviceptr
using Context = struct ContextHandle *;
using Module = struct ModuleHandle *;
using Function = struct FunctionHandle *;
using Stream = struct StreamHandle *;
using Event = struct EventHandle *;
using Graph = struct GraphHandle *;
using GraphExec = struct GraphExecHandle *;

constexpr Result kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kNoDevice = 100, kInvalidImage = 200,
                 kNoBinaryForGpu = 209, kUnsupportedPtxVersion = 222, kNotFound = 500;

// CUdevice_attribute, CUfunction_attribute
constexpr int32_t kCapabilityMajor = 75, kCapabilityMinor = 76, kMaxSharedBytesOptIn = 97;
constexpr int32_t kNumRegisters = 4, kMaxDynamicSharedBytes = 8;

// CUstream_flags, CUevent_flags, CUstreamCaptureMode
constexpr uint32_t kNonBlocking = 1, kDisableTiming = 2;
constexpr int32_t kCaptureThreadLocal = 1;

// CUlaunchAttributeID, CUdriverProcAddressQueryResult
constexpr int32_t kProgrammaticStreamSerialization = 6;
constexpr int32_t kSymbolFound = 0, kSymbolNotFound = 1, kVersionNotSufficient = 2;

// What the `extra` of a launch is a list of: CU_LAUNCH_PARAM_*.
constexpr uintptr_t kParamEnd = 0, kParamBufferPointer = 1, kParamBufferSize = 2;

/// CUlaunchAttribute
struct LaunchAttribute {
  int32_t id = 0;
  char pad[4] = {};
  union {
    int32_t allowed;  // of kProgrammaticStreamSerialization
    char all[64] = {};
  };
};

/// CUlaunchConfig
struct LaunchConfig {
  uint32_t grid_x = 1, grid_y = 1, grid_z = 1;     // thread blocks
  uint32_t block_x = 1, block_y = 1, block_z = 1;  // threads
  uint32_t shared_bytes = 0;                       // dynamic
  Stream stream = nullptr;
  LaunchAttribute *attributes = nullptr;
  uint32_t num_attributes = 0;
};

/// The functions, in the spelling of the API: TS_CUDA_FUNCTIONS(F) is F(our name, the API's name, parameters...) for each.
#define TS_CUDA_FUNCTIONS(F)                                                                  \
  F(get_error_name, "cuGetErrorName", Result, const char **)                                  \
  F(get_error_string, "cuGetErrorString", Result, const char **)                              \
  F(init, "cuInit", uint32_t)                                                                 \
  F(device_get_count, "cuDeviceGetCount", int32_t *)                                          \
  F(device_get, "cuDeviceGet", Device *, int32_t)                                             \
  F(device_get_name, "cuDeviceGetName", char *, int32_t, Device)                              \
  F(device_get_attribute, "cuDeviceGetAttribute", int32_t *, int32_t, Device)                 \
  F(context_retain, "cuDevicePrimaryCtxRetain", Context *, Device)                            \
  F(context_release, "cuDevicePrimaryCtxRelease", Device)                                     \
  F(context_set_current, "cuCtxSetCurrent", Context)                                          \
  F(memory_info, "cuMemGetInfo", size_t *, size_t *)                                          \
  F(memory_allocate, "cuMemAlloc", Address *, size_t)                                         \
  F(memory_free, "cuMemFree", Address)                                                        \
  F(host_allocate, "cuMemHostAlloc", void **, size_t, uint32_t)                               \
  F(host_free, "cuMemFreeHost", void *)                                                       \
  F(copy_to_device, "cuMemcpyHtoDAsync", Address, const void *, size_t, Stream)               \
  F(copy_to_host, "cuMemcpyDtoHAsync", void *, Address, size_t, Stream)                       \
  F(fill_bytes, "cuMemsetD8Async", Address, unsigned char, size_t, Stream)                    \
  F(stream_create, "cuStreamCreate", Stream *, uint32_t)                                      \
  F(stream_destroy, "cuStreamDestroy", Stream)                                                \
  F(stream_synchronize, "cuStreamSynchronize", Stream)                                        \
  F(stream_begin_capture, "cuStreamBeginCapture", Stream, int32_t)                            \
  F(stream_end_capture, "cuStreamEndCapture", Stream, Graph *)                                \
  F(event_create, "cuEventCreate", Event *, uint32_t)                                         \
  F(event_destroy, "cuEventDestroy", Event)                                                   \
  F(event_record, "cuEventRecord", Event, Stream)                                             \
  F(event_synchronize, "cuEventSynchronize", Event)                                           \
  F(module_load, "cuModuleLoadData", Module *, const void *)                                  \
  F(module_unload, "cuModuleUnload", Module)                                                  \
  F(module_get_function, "cuModuleGetFunction", Function *, Module, const char *)             \
  F(function_get_attribute, "cuFuncGetAttribute", int32_t *, int32_t, Function)               \
  F(function_set_attribute, "cuFuncSetAttribute", Function, int32_t, int32_t)                 \
  F(launch, "cuLaunchKernelEx", const LaunchConfig *, Function, void **, void **)             \
  F(graph_instantiate, "cuGraphInstantiateWithFlags", GraphExec *, Graph, unsigned long long) \
  F(graph_destroy, "cuGraphDestroy", Graph)                                                   \
  F(graph_upload, "cuGraphUpload", GraphExec, Stream)                                         \
  F(graph_launch, "cuGraphLaunch", GraphExec, Stream)                                         \
  F(graph_exec_destroy, "cuGraphExecDestroy", GraphExec)

struct Functions {
#define TS_CUDA_DECLARE(name, symbol, ...) Result (*name)(__VA_ARGS__) = nullptr;
  TS_CUDA_FUNCTIONS(TS_CUDA_DECLARE)
#undef TS_CUDA_DECLARE
};

/// The two that are looked for in the library itself, the second of which finds the others: in the form that they had in a
/// given version of CUDA, 1000 * major + 10 * minor.
using DriverGetVersion = Result (*)(int32_t *version);
using GetProcAddress = Result (*)(const char *symbol, void **function, int32_t version, uint64_t flags, int32_t *found);

}  // namespace ts::cuda
