#pragma once

#include <memory>
#include <string>

#include "cuda_device.h"
#include "device.h"
#include "workers.h"

namespace ts {

/// Runs a GPU target's program. Logits come back to the host, whose worker threads sample: there is no sampler for a GPU yet.
class CudaExecutor : public Device {
 public:
  /// Checks the program and the weights' hashes, chooses the KV cache's pages by the GPU's free memory, and loads all. Throws Error
  /// (TS_BAD_PLAN, TS_NO_TARGET, TS_NO_MEMORY).
  CudaExecutor(const std::shared_ptr<const Plan> &plan, const ExecutorOptions &options, const std::string &target,
               std::unique_ptr<const CudaContext> context);

  void run(const ts_batch &batch) override;
  const float *logits() const override { return device_.logits(); }
  int64_t logits_stride() const override { return device_.logits_stride(); }
  void share(int32_t count, const std::function<void(int32_t item, int thread)> &job) override {
    workers_.share(count, job);
  }
  const Limits &limits() const override { return program_.limits; }
  const std::vector<CacheGroup> &groups() const override { return program_.groups; }
  int32_t num_pages() const override { return num_pages_; }
  int32_t num_threads() const override { return workers_.num_threads(); }
  const std::string &target() const override { return program_.target; }

 private:
  Program program_;
  Workers workers_;
  int32_t num_pages_;
  CudaDevice device_;
};

}  // namespace ts
