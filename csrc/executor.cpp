#include "executor.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "check.h"
#include "collective.h"
#include "host.h"
#include "kernels.h"
#include "memory.h"
#include "page_copier.h"
#include "text.h"
#include "token_parts.h"
#include "workers.h"

namespace ts {
namespace {

constexpr int kMaxThreads = 1024;
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

}  // namespace

int choose_threads(int wanted) {
  if (wanted < 0 || wanted > kMaxThreads) {
    fail(TS_BAD_REQUEST, "num_threads is ", wanted, ", wanted 0 (every core) to ", kMaxThreads);
  }
  return wanted != 0 ? wanted : std::min(usable_cores(), kMaxThreads);
}

struct Executor::Impl {
  std::shared_ptr<const Plan> plan;  // holds the weights
  Program program;
  Kernels kernels;
  Ranks ranks;  // none for a plan of one
  int32_t num_pages;
  TierOptions tier;  // as rank 0 has decided
  Memory arena;
  Memory kv;
  std::optional<PageCopier> copier;  // if there is a second tier
  Workers workers;

  struct Bound {
    ts_kernel kernel = nullptr;
    ts_args args{};
    std::optional<BoundCollective> collective = {};  // if it is no kernel
    Launch::Phase phase = Launch::Phase::whole;
  };
  struct BoundBucket {
    int32_t max_tokens;
    const float *logits;
    int64_t logits_stride;
    std::vector<Bound> launches = {};
  };
  TokenParts parts;              // of the step's batch
  std::vector<void *> pointers;  // of all launches, end to end
  std::vector<BoundBucket> buckets;
  size_t current = 0;  // the bucket of the last step

  Impl(std::shared_ptr<const Plan> plan_, Program program_, Ranks ranks_, const CacheSizes &sizes, int num_threads);
  ~Impl();
  Impl(const Impl &) = delete;
  Impl &operator=(const Impl &) = delete;
  void *address(const Argument &argument) const;
  void *kv_pages(int32_t layer) const;
  void bind();
  void bind(const Launch &launch, const Limits &limits, int32_t &num_staged, std::vector<Bound> &launches);
  void meet();
  void run(const ts_batch &batch);
  const PageCopier &copy(std::span<const PageCopy> copies);
};

Executor::Impl::Impl(std::shared_ptr<const Plan> plan_, Program program_, Ranks ranks_, const CacheSizes &sizes,
                     int num_threads)
    : plan(std::move(plan_)),
      program(std::move(program_)),
      kernels("tsp/kernels/" + program.target, plan->find("tsp/kernels/" + program.target)->bytes),
      ranks(std::move(ranks_)),
      num_pages(sizes.num_pages),
      tier(sizes.tier),
      arena(program.arena_bytes, "the arena"),
      kv(static_cast<uint64_t>(num_pages) * program.page_bytes *
             static_cast<uint64_t>(std::max(program.num_slabs(), 1)),
         "the KV cache"),
      workers(num_threads,
              ranks.group ? ranks.group->most_turns() : (num_threads <= usable_cores() ? Patience::kMostTurns : 0)),
      parts(plan->mesh(), program.rank, program.limits.max_seqs,
            static_cast<int64_t>(num_pages) * program.limits.page_size, static_cast<int32_t>(program.groups.size())) {
  if (tier.num_slots > 0) {
    const KvCache cache = {kv.data(), program.num_slabs(), num_pages, program.page_bytes,
                           plan->mesh().owner(program.rank)};
    copier.emplace(cache, tier.num_slots, tier.max_copies(), sizes.offload_folder, ranks.group.get());
  }
  bind();
}

Executor::Impl::~Impl() {
  if (ranks.group && program.rank == 0) ranks.group->publish_end();
}

void *Executor::Impl::address(const Argument &argument) const {
  switch (argument.kind) {
    case Argument::Kind::buffer:
      return arena.data() + program.buffers[argument.index].offset;
    case Argument::Kind::kv:
      return kv_pages(argument.index);
    case Argument::Kind::weight:
      // Kernels only read weights, and the mapping cannot be written.
      return const_cast<uint8_t *>(argument.weight);
    case Argument::Kind::batch:
    case Argument::Kind::null:
      break;
  }
  fail(TS_INTERNAL, "an argument of no kind that a CPU's kernel takes");
}

/// Where page 0 of a layer lies, or would lie: pages are numbered over all owners of sequences, and a rank has its own alone.
void *Executor::Impl::kv_pages(int32_t layer) const {
  const int64_t layer_bytes = static_cast<int64_t>(num_pages) * static_cast<int64_t>(program.page_bytes);
  return kv.data() + (program.slab_of(layer) - plan->mesh().owner(program.rank)) * layer_bytes;
}

void Executor::Impl::bind() {
  size_t num_pointers = 0;
  for (const Bucket &bucket : program.buckets) {
    for (const Launch &launch : bucket.launches) num_pointers += launch.arguments.size();
  }
  pointers.reserve(num_pointers);  // args point into it
  for (const Bucket &bucket : program.buckets) {
    const uint8_t *logits = arena.data() + program.buffers[bucket.logits_buffer].offset;
    BoundBucket &bound = buckets.emplace_back(
        BoundBucket{bucket.limits.max_tokens, reinterpret_cast<const float *>(logits), bucket.logits_stride});
    int32_t num_staged = 0;
    for (const Launch &launch : bucket.launches) bind(launch, bucket.limits, num_staged, bound.launches);
  }
  current = buckets.size() - 1;
}

void Executor::Impl::bind(const Launch &launch, const Limits &limits, int32_t &num_staged,
                          std::vector<Bound> &launches) {
  const bool is_here = program.is_here(launch.stage);
  if (!is_here && !launch.collective) return;
  void *const *first = pointers.data() + pointers.size();
  for (const Argument &argument : launch.arguments) {
    void *pointer = address(argument);
    if (reinterpret_cast<uintptr_t>(pointer) % kAlignment != 0) {
      fail(TS_INTERNAL, "an argument of ", in_quotes(launch.op), " is not on a ", kAlignment, "-byte boundary");
    }
    pointers.push_back(pointer);
  }
  Bound &bound = launches.emplace_back();
  if (const std::optional<Collective> &collective = launch.collective) {
    bound.phase = launch.phase;
    const bool staged = BoundCollective::staging_bytes(*collective, limits, plan->mesh()) > 0;
    if (staged && launch.phase != Launch::Phase::finish) ++num_staged;
    const int32_t half = num_staged % 2;  // a finish's is its start's
    const size_t last = launch.arguments.size() - 1;
    bound.collective.emplace(*collective, plan->mesh(), program.rank, ranks.group.get(), half, first[0], first[last],
                             last > 1 ? first[1] : nullptr, is_here);
  } else {
    bound.kernel = kernels.find(launch.kernel);
    bound.args = {&parts.of(launch.tokens_axis, launch.group), first};
  }
}

const PageCopier &Executor::Impl::copy(std::span<const PageCopy> copies) {
  TS_ASSERT(copier, "copies are ordered of an engine with a second tier");
  PageCopier &found = *copier;
  found.copy(copies, workers);
  if (ranks.group) ranks.group->check();
  return found;
}

/// Waits until every thread of every rank is here.
void Executor::Impl::meet() {
  auto wait = [this](int, int, Barrier &) { ranks.group->barrier(); };
  workers.run(wait);
  ranks.group->check();
}

void Executor::Impl::run(const ts_batch &step_batch) {
  parts.set(step_batch);
  current = 0;
  while (buckets[current].max_tokens < step_batch.num_tokens) ++current;
  const std::vector<Bound> &launches = buckets[current].launches;
  auto step = [this, &launches](int thread, int num_threads, Barrier &barrier) {
    uint32_t started = 0;                  // what the collective in flight has to finish
    bool in_flight = false, apart = true;  // whether threads need not meet before the next launch
    for (const Bound &launch : launches) {
      // A start writes nothing that those after it read; a finish reads and writes nothing that those before it do.
      if (!apart && launch.phase != Launch::Phase::finish) barrier.wait();
      apart = launch.phase == Launch::Phase::start;
      if (launch.kernel != nullptr) [[likely]] {
        launch.kernel(&launch.args, thread, num_threads);
        if (in_flight && thread == 0) ranks.group->progress();
      } else if (apart) {
        started = launch.collective->start(parts, thread, num_threads);
        in_flight = true;
      } else if (launch.phase == Launch::Phase::finish) {
        if (!launch.collective->finish(started, parts, thread, num_threads)) return;
        in_flight = false;
      } else if (!launch.collective->run(parts, thread, num_threads)) {
        return;  // so do all threads, at the same launch
      }
    }
    if (ranks.group) ranks.group->end_step();
  };
  workers.run(step);
  if (ranks.group) ranks.group->check();
}

namespace {

/// Verifies what this rank reads, and nothing else: others do the same for theirs.
void verify_weights(const Plan &plan, const Program &program) {
  std::vector<std::string_view> names;
  for (const Bucket &bucket : program.buckets) {
    for (const Launch &launch : bucket.launches) {
      if (!program.is_here(launch.stage)) continue;
      for (const Argument &argument : launch.arguments) {
        if (argument.kind == Argument::Kind::weight) names.emplace_back(argument.entry);
      }
    }
  }
  std::ranges::sort(names);
  const auto repeated = std::ranges::unique(names);
  names.erase(repeated.begin(), repeated.end());
  plan.verify_weights(names, program.target + " rank " + std::to_string(program.rank));
}

}  // namespace

Executor::Executor(std::shared_ptr<const Plan> plan, const ExecutorOptions &options) {
  const int32_t num_ranks = plan->mesh().num_ranks();
  const int32_t rank = options.ranks.rank;
  if (rank < 0 || rank >= num_ranks) {
    fail(TS_BAD_REQUEST, "rank is ", rank, ", the plan is for ", num_ranks, " (", plan->mesh().text(), ")");
  }
  Program program = parse_program(*plan, choose_target(*plan, options.target), rank);
  int num_threads = choose_threads(options.num_threads);
  CacheSizes sizes = rank == 0 ? choose_cache_sizes(program, options, plan->mesh()) : CacheSizes{};
  if (num_ranks == 1) {
    plan->verify_weights();
    impl_ = std::make_unique<Impl>(std::move(plan), std::move(program), Ranks{}, sizes, num_threads);
    return;
  }
  Ranks ranks = meet_ranks(*plan, program, options.ranks, options.num_threads, sizes);
  const std::shared_ptr<RankGroup> group = ranks.group;
  sizes = {group->layout().num_pages, group->layout().tier, group->layout().offload_folder.data()};
  num_threads = group->layout().num_threads[static_cast<size_t>(rank)];
  try {
    verify_weights(*plan, program);
    impl_ = std::make_unique<Impl>(std::move(plan), std::move(program), std::move(ranks), sizes, num_threads);
    impl_->meet();
  } catch (const Error &e) {
    if (e.status() != TS_LOST_RANK) group->abort("rank " + std::to_string(rank) + ": " + e.what());
    throw;
  }
}

Executor::~Executor() = default;

void Executor::run(const ts_batch &batch) {
  check_batch(batch, impl_->program.limits);
  if (impl_->ranks.group) publish(batch);
  impl_->run(batch);
}

void Executor::publish(const ts_batch &batch) {
  const std::span<int32_t> area = batch_memory();
  const auto offset = [&](const int32_t *array) {
    TS_ASSERT(array >= area.data() && array < area.data() + area.size(),
              "a batch array lies outside the ranks' memory");
    return static_cast<uint64_t>(array - area.data());
  };
  impl_->ranks.group->publish(
      {batch.num_tokens,
       batch.num_seqs,
       batch.num_logits,
       batch.page_table_stride,
       0,
       {offset(batch.token_ids), offset(batch.positions), offset(batch.slots), offset(batch.query_start),
        offset(batch.context_len), offset(batch.page_table), offset(batch.logit_rows), 0}});
}

/// They lie behind the batch's arrays.
void Executor::publish(std::span<const PageCopy> copies) {
  const std::span<int32_t> area = batch_memory();
  const size_t begin = area.size() - ints_of(impl_->tier.max_copies());
  std::memcpy(area.data() + begin, copies.data(), copies.size_bytes());
  impl_->ranks.group->publish({0, 0, 0, 0, static_cast<int32_t>(copies.size()), {0, 0, 0, 0, 0, 0, 0, begin}});
}

void Executor::copy(std::span<PageCopy> copies) {
  TS_ASSERT(copies.size() <= static_cast<size_t>(impl_->tier.max_copies()), "more copies than a step may have");
  if (impl_->ranks.group) publish(copies);
  const PageCopier &copier = impl_->copy(copies);
  for (size_t i = 0; i < copies.size(); ++i) {
    copies[i].state = copier.failed(i) ? PageCopy::State::failed : PageCopy::State::done;
  }
}

void Executor::follow() {
  const int32_t *area = batch_memory().data();
  while (const PublishedBatch *b = impl_->ranks.group->next()) {
    const auto at = [&](size_t i) { return area + b->arrays[i]; };
    if (b->num_copies > 0) {
      std::vector<PageCopy> copies(static_cast<size_t>(b->num_copies));
      std::memcpy(static_cast<void *>(copies.data()), at(7), copies.size() * sizeof(PageCopy));
      impl_->copy(copies);
      continue;
    }
    impl_->run({b->num_tokens, b->num_seqs, b->num_logits, b->page_table_stride, at(0), at(1), at(2), at(3), at(4),
                at(5), at(6)});
  }
}

void Executor::end_steps() {
  if (impl_->ranks.group) impl_->ranks.group->publish_end();
}

std::span<int32_t> Executor::batch_memory() const {
  return impl_->ranks.group ? impl_->ranks.group->batch_area() : std::span<int32_t>();
}

void Executor::on_failure(const std::function<void(const std::string &message)> &callback) {
  if (impl_->ranks.watch) impl_->ranks.watch->on_failure(callback);
}

void Executor::share(int32_t count, const std::function<void(int32_t item, int thread)> &job) {
  impl_->workers.share(count, job);
}

const float *Executor::logits() const { return impl_->buckets[impl_->current].logits; }
int64_t Executor::logits_stride() const { return impl_->buckets[impl_->current].logits_stride; }
const std::vector<CacheGroup> &Executor::groups() const { return impl_->program.groups; }
const Limits &Executor::limits() const { return impl_->program.limits; }
int32_t Executor::num_pages() const { return impl_->num_pages; }
TierOptions Executor::tier() const { return impl_->tier; }
int32_t Executor::num_threads() const { return impl_->workers.num_threads(); }
const std::string &Executor::target() const { return impl_->program.target; }

}  // namespace ts
