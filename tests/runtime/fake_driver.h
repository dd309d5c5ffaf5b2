// The fake driver (tests/fake_cuda), as tests of the engine see it: settings, and what it has written down.
#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <vector>

#include "make_plan.h"

namespace ts::testing {

class FakeDriver {
 public:
  /// `settings`: as tests/fake_cuda/fake_cuda.h has them. Kernels are those of toy_kernels.c unless `runs` is false.
  explicit FakeDriver(const std::string &settings = "", bool runs = true) {
    library_ = dlopen(TS_TEST_FAKE_CUDA, RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) throw std::runtime_error(dlerror());
    const std::string kernels = runs ? std::string(";kernels=") + TS_TEST_FAKE_KERNELS : "";
    find<void (*)(const char *)>("fake_cuda_reset")(
        (settings + kernels).substr(settings.empty() && runs ? 1 : 0).c_str());
  }
  FakeDriver(const FakeDriver &) = delete;
  FakeDriver &operator=(const FakeDriver &) = delete;
  ~FakeDriver() {
    EXPECT_EQ(find<int64_t (*)()>("fake_cuda_num_violations")(), 0) << of("violation");
    find<void (*)(const char *)>("fake_cuda_reset")("");
  }

  static std::string library() { return TS_TEST_FAKE_CUDA; }

  /// The calls of a name, in order; of all if it is empty.
  std::vector<Json> calls(const std::string &name = "") const {
    std::istringstream lines(find<const char *(*)()>("fake_cuda_log")());
    std::vector<Json> found;
    for (std::string line; std::getline(lines, line);) {
      Json call = Json::parse(line);
      if (name.empty() || call["call"] == name) found.push_back(std::move(call));
    }
    return found;
  }

  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const Json &call : calls()) names.push_back(call["call"]);
    return names;
  }

 private:
  std::string of(const std::string &name) const {
    std::string text;
    for (const Json &call : calls(name)) text += call.dump() + "\n";
    return text;
  }

  template <class Function>
  Function find(const char *name) const {
    return reinterpret_cast<Function>(dlsym(library_, name));
  }

  void *library_ = nullptr;
};

}  // namespace ts::testing
