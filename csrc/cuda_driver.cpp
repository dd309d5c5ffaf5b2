#include "cuda_driver.h"

#include <dlfcn.h>

#include <array>
#include <optional>
#include <type_traits>

#include "text.h"

namespace ts {
namespace {

constexpr const char *kLibrary = "libcuda.so.1";
constexpr int32_t kLeastVersion = 12030;           // programmatic edges in graphs that are captured
constexpr int32_t kLeastVersionBlackwell = 12080;  // compute capability 10.0

Capability wanted_by(const std::string &target) {
  if (const std::optional<Capability> capability = capability_of(target)) return *capability;
  fail(TS_INTERNAL, in_quotes(target), " is no target of a GPU");
}

int32_t least_version(const Capability &capability) {
  return capability.major >= 10 ? kLeastVersionBlackwell : kLeastVersion;
}

void *open_library(const std::string &library) {
  const char *name = library.empty() ? kLibrary : library.c_str();
  if (void *opened = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return opened;
  const char *why = dlerror();
  throw NoGpu("there is no NVIDIA driver (" + std::string(why == nullptr ? name : why) +
              "): install it, put libcuda.so.1 on the library path, or name it in TSRUNTIME_LIBCUDA");
}

}  // namespace

std::string CudaDriver::version_text(int32_t version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

CudaDriver::CudaDriver(const std::string &library, int32_t least_version) {
  void *opened = open_library(library);
  const auto find = [&](const char *name) {
    void *found = dlsym(opened, name);
    if (found == nullptr) {
      fail(TS_NO_TARGET, library.empty() ? kLibrary : library, " has no ", name, ": it is no NVIDIA driver of CUDA ",
           version_text(least_version), " or later");
    }
    return found;
  };
  const auto get_version = reinterpret_cast<cuda::DriverGetVersion>(find("cuDriverGetVersion"));
  if (get_version(&version_) != cuda::kSuccess || version_ < least_version) {
    fail(TS_NO_TARGET, "the NVIDIA driver is for CUDA ", version_text(version_), ", wanted ",
         version_text(least_version), " or later: update the driver");
  }
  const auto get_address = reinterpret_cast<cuda::GetProcAddress>(find("cuGetProcAddress_v2"));
  const auto resolve = [&](auto &function, const char *symbol) {
    void *address = nullptr;
    int32_t found = cuda::kSymbolNotFound;
    const cuda::Result result = get_address(symbol, &address, kLeastVersion, 0, &found);
    if (result != cuda::kSuccess || found != cuda::kSymbolFound || address == nullptr) {
      fail(TS_NO_TARGET, "the NVIDIA driver, of CUDA ", version_text(version_), ", has no ", symbol,
           " in the form that CUDA ", version_text(kLeastVersion), " has: reinstall the driver");
    }
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address);
  };
#define TS_CUDA_RESOLVE(name, symbol, ...) resolve(functions_.name, symbol);
  TS_CUDA_FUNCTIONS(TS_CUDA_RESOLVE)
#undef TS_CUDA_RESOLVE
  const cuda::Result started = functions_.init(0);
  if (started == cuda::kNoDevice) throw NoGpu("the NVIDIA driver sees no GPU: " + text(started));
  check(started, "starting the NVIDIA driver", TS_NO_TARGET);
}

std::string CudaDriver::text(cuda::Result result) const {
  const char *name = nullptr, *words = nullptr;
  if (functions_.get_error_name(result, &name) != cuda::kSuccess || name == nullptr) {
    return "CUDA error " + std::to_string(result);
  }
  functions_.get_error_string(result, &words);
  return words == nullptr ? name : std::string(name) + " (" + words + ")";
}

void CudaDriver::refuse(cuda::Result result, std::string_view what, ts_status status) const {
  fail(status, what, " failed: ", text(result));
}

CudaContext::CudaContext(const std::string &library, const std::string &target)
    : driver_(library, least_version(wanted_by(target))) {
  const Capability wanted = wanted_by(target);
  int32_t count = 0;
  check(cuda().device_get_count(&count), "counting GPUs", TS_NO_TARGET);
  std::string there, other;
  for (int32_t i = 0; i < count; ++i) {
    check(cuda().device_get(&device_, i), "finding a GPU", TS_NO_TARGET);
    const auto attribute = [&](int32_t which) {
      int32_t value = 0;
      check(cuda().device_get_attribute(&value, which, device_), "asking a GPU what it is", TS_NO_TARGET);
      return value;
    };
    std::array<char, 256> name{};
    check(cuda().device_get_name(name.data(), static_cast<int32_t>(name.size()) - 1, device_), "naming a GPU",
          TS_NO_TARGET);
    const Capability found{attribute(cuda::kCapabilityMajor), attribute(cuda::kCapabilityMinor)};
    if (found != wanted) {
      there += (there.empty() ? "" : ", ") + std::string(name.data()) + " of " + found.text();
      for (const std::string_view known : kGpuTargets) {
        if (capability_of(known) == found) other = ": build the plan with --target " + std::string(known);
      }
      continue;
    }
    name_ = name.data();
    shared_ = attribute(cuda::kMaxSharedBytesOptIn);
    check(cuda().context_retain(&context_, device_), "opening " + name_, TS_NO_TARGET);
    return;
  }
  throw NoGpu(target + " runs on GPUs of compute capability " + wanted.text() + ", and here is " +
              (there.empty() ? "no GPU" : there) + other);
}

CudaContext::~CudaContext() { cuda().context_release(device_); }

void CudaContext::make_current() const { check(cuda().context_set_current(context_), "turning to " + name_); }

uint64_t CudaContext::free_memory() const {
  size_t free = 0, total = 0;
  check(cuda().memory_info(&free, &total), "asking for the GPU's free memory");
  return free;
}

}  // namespace ts
