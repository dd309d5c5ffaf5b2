#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_batch.h"
#include "cuda_handle.h"
#include "cuda_program.h"
#include "launch_abi.h"
#include "plan.h"
#include "program.h"

namespace ts {

/// Bytes of the device's memory that a program takes, by part.
struct CudaNeeds {
  uint64_t weights = 0, kv = 0, arena = 0, batch = 0;

  /// All but the KV cache, and with one of so many pages.
  static CudaNeeds of(const Plan &plan, const Program &program);
  static CudaNeeds of(const Plan &plan, const Program &program, int32_t num_pages);

  uint64_t fixed() const { return weights + arena + batch; }
  uint64_t total() const { return fixed() + kv; }
  std::string text() const;        ///< "8.0 GiB: weights 5.0 GiB, ..."
  std::string fixed_text() const;  ///< "weights take 5.0 GiB, activations ..."
};

/// Runs a GPU target's program: a bucket's launches are a graph, captured when it is made. Owns what they read and write: weights,
/// arena, KV cache and batch in the device's memory, batch and logits in pinned memory of the host.
///
/// All work is on one stream, in this order, a step at a time: the batch is copied in, the graph runs, the logits are copied out;
/// then the host, which has waited for that, reads them. So nothing of a step is written before the one before it is done.
///
/// Not thread-safe: the step thread alone calls it once it is made.
class CudaDevice {
 public:
  /// `num_pages`: of the KV cache. `plan` outlives it only while it is made: weights are copied. Throws Error: TS_NO_MEMORY, telling
  /// the parts; TS_NO_TARGET if the driver refuses a kernel.
  CudaDevice(std::unique_ptr<const CudaContext> context, const Plan &plan, const Program &program, int32_t num_pages);
  ~CudaDevice();
  CudaDevice(const CudaDevice &) = delete;
  CudaDevice &operator=(const CudaDevice &) = delete;

  /// Begins a step: packs the batch, whose arrays are free again then. Throws Error (TS_LOST_RANK) if the device is lost, for good.
  void launch(const ts_batch &batch);
  /// Waits for what launch() has begun. Throws likewise.
  void wait();

  /// [num_logits, vocab_size] of the last step, in the host's memory; of its bucket, as its stride is.
  const float *logits() const { return static_cast<const float *>(logits_.get()); }
  int64_t logits_stride() const { return buckets_[current_].logits_stride; }

  const std::string &name() const { return context_->name(); }

 private:
  struct BoundBucket {
    int32_t max_tokens;
    cuda::Address logits;
    int64_t logits_stride;
    CudaBatch batch;
    CudaGraphExec graph;
  };

  DeviceMemory take(uint64_t bytes) const;
  void demand(cuda::Result result, const char *what) const;
  void bind(const Program &program, const Bucket &bucket);
  void fill(const Plan &plan);
  cuda::Address address(const Program &program, const Argument &argument, const Launch &launch,
                        const CudaBatch &batch) const;

  // What is later goes first: graphs before what they read.
  std::unique_ptr<const CudaContext> context_;
  CudaNeeds needs_;
  int32_t num_pages_;
  CudaStream stream_;
  DeviceMemory weights_, kv_, arena_, batch_;
  PinnedMemory staging_, logits_;
  CudaKernels kernels_;
  std::map<std::string, uint64_t, std::less<>> weight_offsets_;  // by entry
  std::vector<BoundBucket> buckets_;
  size_t current_ = 0;  // the bucket of the last step
};

}  // namespace ts
