#include "cuda_device.h"

#include <algorithm>
#include <utility>

#include "cache_groups.h"
#include "cuda_upload.h"
#include "text.h"

namespace ts {
namespace {

constexpr uint64_t kWeightAlignment = 256;  // as cuMemAlloc's
constexpr uint64_t kLeastBytes = 256;       // of an allocation: none is empty

uint64_t round_up(uint64_t bytes) { return (bytes + kWeightAlignment - 1) / kWeightAlignment * kWeightAlignment; }

/// Where each weight that a launch reads lies among the weights, and their bytes.
std::map<std::string, uint64_t, std::less<>> place_weights(const Plan &plan, const Program &program, uint64_t &bytes) {
  std::map<std::string, uint64_t, std::less<>> offsets;
  for (const Bucket &bucket : program.buckets) {
    for (const Launch &launch : bucket.launches) {
      for (const Argument &argument : launch.arguments) {
        if (argument.kind != Argument::Kind::weight || !offsets.emplace(argument.entry, bytes).second) continue;
        bytes += round_up(plan.find(argument.entry)->bytes.size());
      }
    }
  }
  return offsets;
}

CudaBatch batch_of(const Limits &limits, const Program &program) {
  return {limits, static_cast<int32_t>(program.groups.size()),
          page_table_width(program.groups, limits.max_context, limits.page_size)};
}

/// Rows of logits of any bucket.
uint64_t logits_bytes(const Program &program) {
  int64_t most = 1;
  for (const Bucket &bucket : program.buckets) {
    most = std::max(most, bucket.limits.max_seqs * bucket.logits_stride);
  }
  return static_cast<uint64_t>(most) * sizeof(float);
}

std::unique_ptr<const CudaContext> made_current(std::unique_ptr<const CudaContext> context) {
  context->make_current();
  return context;
}

}  // namespace

CudaNeeds CudaNeeds::of(const Plan &plan, const Program &program) {
  CudaNeeds needs;
  place_weights(plan, program, needs.weights);
  needs.arena = program.arena_bytes;
  needs.batch = batch_of(program.limits, program).bytes();
  return needs;
}

std::string CudaNeeds::fixed_text() const {
  return "weights take " + human_bytes(weights) + ", activations and work space " + human_bytes(arena) + ", batch " +
         human_bytes(batch);
}

std::string CudaNeeds::text() const {
  return human_bytes(total()) + ": " + fixed_text() + ", KV cache " + human_bytes(kv);
}

CudaNeeds CudaNeeds::of(const Plan &plan, const Program &program, int32_t num_pages) {
  CudaNeeds needs = of(plan, program);
  needs.kv =
      static_cast<uint64_t>(num_pages) * program.page_bytes * static_cast<uint64_t>(std::max(program.num_slabs(), 1));
  return needs;
}

CudaDevice::CudaDevice(std::unique_ptr<const CudaContext> context, const Plan &plan, const Program &program,
                       int32_t num_pages)
    : context_(made_current(std::move(context))),
      needs_(CudaNeeds::of(plan, program, num_pages)),
      num_pages_(num_pages),
      stream_(make_stream(*context_)),
      weights_(take(needs_.weights)),
      kv_(take(needs_.kv)),
      arena_(take(needs_.arena)),
      batch_(take(needs_.batch)),
      staging_(make_pinned(*context_, needs_.batch, "getting pinned memory for the batch")),
      logits_(make_pinned(*context_, logits_bytes(program), "getting pinned memory for logits")),
      kernels_(*context_, program, plan.find("tsp/kernels/" + program.target)->bytes) {
  uint64_t placed = 0;
  weight_offsets_ = place_weights(plan, program, placed);
  for (const Bucket &bucket : program.buckets) bind(program, bucket);
  current_ = buckets_.size() - 1;
  fill(plan);
}

/// Weights, and zeros where a run's bytes could depend on what lay there before.
void CudaDevice::fill(const Plan &plan) {
  const cuda::Functions &cuda = context_->cuda();
  std::fill_n(static_cast<uint8_t *>(staging_.get()), needs_.batch, uint8_t{0});
  CudaUpload upload(*context_, stream_.get());
  for (const auto &[entry, offset] : weight_offsets_) upload.copy(weights_.get() + offset, plan.find(entry)->bytes);
  context_->check(cuda.fill_bytes(kv_.get(), 0, needs_.kv, stream_.get()), "clearing the KV cache");
  context_->check(cuda.fill_bytes(arena_.get(), 0, needs_.arena, stream_.get()), "clearing the arena");
  upload.finish();
}

CudaDevice::~CudaDevice() {
  try {
    context_->make_current();
    context_->cuda().stream_synchronize(stream_.get());  // a step that nobody waited for
  } catch (const Error &) {
    // It is lost, and with it what it held.
  }
}

DeviceMemory CudaDevice::take(uint64_t bytes) const {
  cuda::Address address = 0;
  const cuda::Result result = context_->cuda().memory_allocate(&address, std::max(bytes, kLeastBytes));
  if (result == cuda::kOutOfMemory) {
    fail(TS_NO_MEMORY, context_->name(), " has not enough memory for what is needed, ", needs_.text(), "; ",
         human_bytes(context_->free_memory()), " were left when ", human_bytes(bytes),
         " were asked for: end what else uses it, or ask for fewer pages of KV cache");
  }
  context_->check(result, "getting memory of " + context_->name());
  return {*context_, address};
}

void CudaDevice::bind(const Program &program, const Bucket &bucket) {
  CudaBatch batch = batch_of(bucket.limits, program);
  const auto at = [&](const Argument &argument, const Launch &launch) {
    return address(program, argument, launch, batch);
  };
  CudaGraphExec graph = capture(*context_, stream_.get(), program, bucket, kernels_, at);
  const cuda::Address logits = arena_.get() + program.buffers[static_cast<size_t>(bucket.logits_buffer)].offset;
  buckets_.push_back({bucket.limits.max_tokens, logits, bucket.logits_stride, std::move(batch), std::move(graph)});
}

cuda::Address CudaDevice::address(const Program &program, const Argument &argument, const Launch &launch,
                                  const CudaBatch &batch) const {
  switch (argument.kind) {
    case Argument::Kind::buffer:
      return arena_.get() + program.buffers[static_cast<size_t>(argument.index)].offset;
    case Argument::Kind::weight:
      return weights_.get() + weight_offsets_.at(argument.entry);
    case Argument::Kind::kv:
      return kv_.get() + static_cast<uint64_t>(program.slab_of(argument.index)) * static_cast<uint64_t>(num_pages_) *
                             program.page_bytes;
    case Argument::Kind::batch:
      return batch_.get() + batch.offset(static_cast<BatchArray>(argument.index), launch.group);
    case Argument::Kind::null:
      return 0;
  }
  fail(TS_INTERNAL, "an argument of no kind");
}

void CudaDevice::demand(cuda::Result result, const char *what) const {
  if (result == cuda::kSuccess) [[likely]]
    return;
  fail(TS_LOST_RANK, context_->name(), " is lost: ", what, " failed: ", context_->driver().text(result),
       ". Start again; if it fails again, look at the driver's log (dmesg)");
}

void CudaDevice::launch(const ts_batch &batch) {
  const cuda::Functions &cuda = context_->cuda();
  context_->make_current();
  current_ = 0;
  while (buckets_[current_].max_tokens < batch.num_tokens) ++current_;
  BoundBucket &bucket = buckets_[current_];
  auto *staging = static_cast<uint8_t *>(staging_.get());
  for (const auto &[offset, bytes] : bucket.batch.pack(batch, {staging, needs_.batch})) {
    demand(cuda.copy_to_device(batch_.get() + offset, staging + offset, bytes, stream_.get()), "copying the batch");
  }
  demand(cuda.graph_launch(bucket.graph.get(), stream_.get()), "launching a step");
  if (batch.num_logits == 0) return;
  const uint64_t bytes = static_cast<uint64_t>(batch.num_logits * bucket.logits_stride) * sizeof(float);
  demand(cuda.copy_to_host(logits_.get(), bucket.logits, bytes, stream_.get()), "copying the logits");
}

void CudaDevice::wait() { demand(context_->cuda().stream_synchronize(stream_.get()), "a step"); }

}  // namespace ts
