#include "cuda_executor.h"

#include <algorithm>
#include <utility>

#include "executor.h"

namespace ts {
namespace {

/// The program, whose weights are those that the manifest says.
Program checked(const Plan &plan, const std::string &target) {
  Program program = parse_program(plan, target);
  plan.verify_weights();
  return program;
}

/// Of a GPU nobody else is thought to use: all but a tenth of what the rest leaves is the KV cache's.
int32_t pages_on(const CudaContext &context, const Plan &plan, const Program &program, const ExecutorOptions &options) {
  context.make_current();
  const CudaNeeds needs = CudaNeeds::of(plan, program);
  const uint64_t free = context.free_memory();
  const MemoryRoom room = {free, needs.fixed(), (free - std::min(free, needs.fixed())) / 10 * 9, needs.fixed_text(),
                           " on " + context.name()};
  return choose_pages(program, options, plan.mesh(), room);
}

}  // namespace

CudaExecutor::CudaExecutor(const std::shared_ptr<const Plan> &plan, const ExecutorOptions &options,
                           const std::string &target, std::unique_ptr<const CudaContext> context)
    : program_(checked(*plan, target)),
      workers_(choose_threads(options.num_threads)),
      num_pages_(pages_on(*context, *plan, program_, options)),
      device_(std::move(context), *plan, program_, num_pages_) {}

void CudaExecutor::run(const ts_batch &batch) {
  check_batch(batch, program_.limits);
  device_.launch(batch);
  device_.wait();
}

}  // namespace ts
