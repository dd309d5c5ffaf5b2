#include "device.h"

#include <algorithm>

#include "cuda_executor.h"
#include "executor.h"
#include "text.h"

namespace ts {

std::unique_ptr<Device> open_device(const std::shared_ptr<const Plan> &plan, const ExecutorOptions &options) {
  std::string without;  // why each GPU target does not run
  for (const std::string &target : plan->targets()) {
    if (!options.target.empty() && options.target != target) continue;
    if (is_amd_target(target)) {
      without += "; " + target + ": this tsruntime runs no GPUs of AMD yet; of NVIDIA's it runs " +
                 std::string(kGpuTargets[0]) + " and " + std::string(kGpuTargets[1]);
    }
    if (!is_gpu_target(target)) continue;
    try {
      auto context = std::make_unique<CudaContext>(options.cuda_library, target);
      if (options.offload_bytes > 0) {
        fail(TS_BAD_REQUEST, "offload_bytes is ", options.offload_bytes, ", but ", target,
             " runs on a GPU, whose pages no second tier keeps yet: leave it out, or choose a CPU target");
      }
      return std::make_unique<CudaExecutor>(plan, options, target, std::move(context));
    } catch (const NoGpu &e) {
      without += "; " + target + ": " + e.what();
    }
  }
  try {
    return std::make_unique<Executor>(plan, options);
  } catch (const Error &e) {
    if (e.status() != TS_NO_TARGET || without.empty()) throw;
    fail(TS_NO_TARGET, e.what(), without);
  }
}

void check_batch(const ts_batch &batch, const Limits &limits) {
  const int32_t rows = std::min(limits.max_seqs, batch.num_tokens);  // each of its own token
  const bool fits = batch.num_tokens >= 1 && batch.num_tokens <= limits.max_tokens && batch.num_seqs >= 1 &&
                    batch.num_seqs <= rows && batch.num_logits >= 0 && batch.num_logits <= rows;
  if (fits) return;
  fail(TS_INTERNAL, "a batch of ", batch.num_tokens, " tokens, ", batch.num_seqs, " sequences and ", batch.num_logits,
       " logit rows leaves the limits of ", limits.max_tokens, " tokens and ", limits.max_seqs, " sequences");
}

}  // namespace ts
