#include "executor.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <vector>

#include "host.h"
#include "kernels.h"
#include "memory.h"
#include "text.h"
#include "workers.h"

namespace ts {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int64_t kTokensPerSeq = 2048;  // of the default KV cache
constexpr uintptr_t kAlignment = 64;

std::string join(const std::vector<std::string> &words) {
  std::string text;
  for (const std::string &word : words) text += (text.empty() ? "" : ", ") + word;
  return text.empty() ? "none" : text;
}

std::string choose_target(const Plan &plan, const std::string &forced) {
  const std::vector<std::string> held = plan.targets();
  const std::vector<std::string> &runnable = host_targets();
  const auto is_held = [&](const std::string &t) { return std::ranges::find(held, t) != held.end(); };
  if (!forced.empty()) {
    const bool can_run = std::ranges::find(runnable, forced) != runnable.end();
    if (is_held(forced) && can_run) return forced;
    fail(TS_NO_TARGET, "target ", in_quotes(forced),
         is_held(forced) ? " does not run on this host" : " is not in the plan", "; the plan has ", join(held),
         ", this host runs ", join(runnable));
  }
  const auto best = std::ranges::find_if(runnable, is_held);
  if (best != runnable.end()) return *best;
  fail(TS_NO_TARGET, "the plan has kernels for ", join(held), ", this host runs ", join(runnable),
       ": build the plan for one of them");
}

int choose_threads(int wanted) {
  if (wanted < 0 || wanted > kMaxThreads) {
    fail(TS_BAD_REQUEST, "num_threads is ", wanted, ", wanted 0 (every core) to ", kMaxThreads);
  }
  return wanted != 0 ? wanted : std::min(usable_cores(), kMaxThreads);
}

/// The number of KV pages, as ts_engine_options says. Throws TS_NO_MEMORY, telling the parts, if that and the arena do not fit.
int32_t choose_pages(const Program &program, const ExecutorOptions &options) {
  const Limits &limits = program.limits;
  const uint64_t page_bytes = program.page_bytes * static_cast<uint64_t>(program.num_layers);
  const int64_t most = std::numeric_limits<int32_t>::max() / limits.page_size;  // a slot is an int32
  const uint64_t free = available_memory();
  int64_t pages = options.num_pages;
  if (pages < 0 || pages > most) {
    fail(TS_BAD_REQUEST, "num_pages is ", pages, ", wanted 0 (from kv_bytes) to ", most);
  }
  if (options.kv_bytes < 0) fail(TS_BAD_REQUEST, "kv_bytes is ", options.kv_bytes, ", wanted 0 or more");
  if (options.max_seqs < 0) fail(TS_BAD_REQUEST, "max_seqs is ", options.max_seqs, ", wanted 0 or more");
  if (pages == 0 && options.kv_bytes > 0) {
    pages = std::min<int64_t>(most, static_cast<int64_t>(static_cast<uint64_t>(options.kv_bytes) / page_bytes));
    if (pages == 0) {
      fail(TS_BAD_REQUEST, "kv_bytes is ", options.kv_bytes, ", but one page of ", limits.page_size, " tokens takes ",
           page_bytes);
    }
  }
  if (pages == 0) {
    const int64_t seqs = options.max_seqs != 0 ? std::min(options.max_seqs, limits.max_seqs) : limits.max_seqs;
    const int64_t tokens = std::max<int64_t>(limits.max_context, seqs * kTokensPerSeq);
    const uint64_t room = free / 2 - std::min(free / 2, program.arena_bytes);
    pages = std::min({(tokens + limits.page_size - 1) / limits.page_size, most,
                      static_cast<int64_t>(std::min<uint64_t>(room / page_bytes, most))});
    pages = std::max<int64_t>(pages, 1);
  }
  const auto kv_bytes = static_cast<uint64_t>(pages) * page_bytes;
  if (program.arena_bytes > free || kv_bytes > free - program.arena_bytes) {
    fail(TS_NO_MEMORY, "not enough memory: the arena takes ", human_bytes(program.arena_bytes), " and the KV cache ",
         human_bytes(kv_bytes), " (", pages, " pages of ", limits.page_size, " tokens, ", human_bytes(page_bytes),
         " a page), but ", human_bytes(free), " is free: ask for fewer pages");
  }
  return static_cast<int32_t>(pages);
}

}  // namespace

struct Executor::Impl {
  std::shared_ptr<const Plan> plan;  // holds the weights
  Program program;
  Kernels kernels;
  int32_t num_pages;
  Memory arena;
  Memory kv;
  Workers workers;

  struct Bound {
    ts_kernel kernel;
    ts_args args;
  };
  ts_batch batch{};
  std::vector<void *> pointers;  // of all launches, end to end
  std::vector<Bound> launches;

  Impl(std::shared_ptr<const Plan> plan_, Program program_, const ExecutorOptions &options);
  void *address(const Argument &argument) const;
  void bind();
};

Executor::Impl::Impl(std::shared_ptr<const Plan> plan_, Program program_, const ExecutorOptions &options)
    : plan(std::move(plan_)),
      program(std::move(program_)),
      kernels("tsp/kernels/" + program.target, plan->find("tsp/kernels/" + program.target)->bytes),
      num_pages(choose_pages(program, options)),
      arena(program.arena_bytes, "the arena"),
      kv(static_cast<uint64_t>(num_pages) * program.page_bytes * static_cast<uint64_t>(program.num_layers),
         "the KV cache"),
      workers(choose_threads(options.num_threads)) {
  bind();
}

void *Executor::Impl::address(const Argument &argument) const {
  switch (argument.kind) {
    case Argument::Kind::buffer:
      return arena.data() + program.buffers[argument.index].offset;
    case Argument::Kind::kv:
      return kv.data() + static_cast<uint64_t>(argument.index) * static_cast<uint64_t>(num_pages) * program.page_bytes;
    case Argument::Kind::weight:
      // Kernels only read weights, and the mapping cannot be written.
      return const_cast<uint8_t *>(argument.weight);
  }
  fail(TS_INTERNAL, "an argument of no kind");
}

void Executor::Impl::bind() {
  size_t num_pointers = 0;
  for (const Launch &launch : program.launches) num_pointers += launch.arguments.size();
  pointers.reserve(num_pointers);  // args point into it
  for (const Launch &launch : program.launches) {
    void *const *first = pointers.data() + pointers.size();
    for (const Argument &argument : launch.arguments) {
      void *pointer = address(argument);
      if (reinterpret_cast<uintptr_t>(pointer) % kAlignment != 0) {
        fail(TS_INTERNAL, "an argument of ", in_quotes(launch.op), " is not on a ", kAlignment, "-byte boundary");
      }
      pointers.push_back(pointer);
    }
    launches.push_back({kernels.find(launch.kernel), {&batch, first}});
  }
}

Executor::Executor(std::shared_ptr<const Plan> plan, const ExecutorOptions &options) {
  if (plan->mesh().num_ranks() != 1) {
    fail(TS_BAD_REQUEST, "the plan is for ", plan->mesh().num_ranks(), " ranks (", plan->mesh().text(),
         "), and this process is one alone");
  }
  Program program = parse_program(*plan, choose_target(*plan, options.target));
  plan->verify_weights();
  impl_ = std::make_unique<Impl>(std::move(plan), std::move(program), options);
}

Executor::~Executor() = default;

void Executor::run(const ts_batch &batch) {
  const Limits &limits = impl_->program.limits;
  const bool fits = batch.num_tokens >= 1 && batch.num_tokens <= limits.max_tokens && batch.num_seqs >= 1 &&
                    batch.num_seqs <= limits.max_seqs && batch.num_logits >= 0 && batch.num_logits <= batch.num_seqs;
  if (!fits) {
    fail(TS_INTERNAL, "a batch of ", batch.num_tokens, " tokens, ", batch.num_seqs, " sequences and ", batch.num_logits,
         " logit rows leaves the limits of ", limits.max_tokens, " tokens and ", limits.max_seqs, " sequences");
  }
  impl_->batch = batch;
  auto step = [this](int thread, int num_threads, Barrier &barrier) {
    bool first = true;
    for (const Impl::Bound &launch : impl_->launches) {
      if (!first) barrier.wait();
      first = false;
      launch.kernel(&launch.args, thread, num_threads);
    }
  };
  impl_->workers.run(step);
}

void Executor::share(int32_t count, const std::function<void(int32_t item, int thread)> &job) {
  std::atomic<int32_t> next = 0;
  auto take = [&](int thread, int, Barrier &) {
    const FloatMode float_mode(Denormals::keep);
    for (int32_t item = next++; item < count; item = next++) job(item, thread);
  };
  if (count > 1) {
    impl_->workers.run(take);
  } else if (count == 1) {  // no other thread need wake
    const FloatMode float_mode(Denormals::keep);
    job(0, 0);
  }
}

const float *Executor::logits() const {
  const Program &program = impl_->program;
  return reinterpret_cast<const float *>(impl_->arena.data() + program.buffers[program.logits_buffer].offset);
}

int64_t Executor::logits_stride() const { return impl_->program.logits_stride; }
const Limits &Executor::limits() const { return impl_->program.limits; }
int32_t Executor::num_pages() const { return impl_->num_pages; }
int32_t Executor::num_threads() const { return impl_->workers.num_threads(); }
const std::string &Executor::target() const { return impl_->program.target; }

}  // namespace ts
