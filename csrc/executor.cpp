#include "executor.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "check.h"
#include "collective.h"
#include "host.h"
#include "kernels.h"
#include "memory.h"
#include "text.h"
#include "token_parts.h"
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

/// Pages for kTokensPerSeq tokens of each of so many sequences, and for one of the longest.
int64_t default_pages(const Program &program, int64_t num_seqs) {
  const Limits &limits = program.limits;
  const int64_t tokens = std::max<int64_t>(limits.max_context, num_seqs * kTokensPerSeq);
  const int64_t num_longest = (tokens + limits.max_context - 1) / limits.max_context;
  const int64_t whole = (tokens + limits.page_size - 1) / limits.page_size;
  int64_t pages = 0;
  for (const CacheGroup &group : program.groups) {
    const int64_t each = group.most_pages(limits.max_context, limits.max_tokens, limits.page_size);
    pages += group.kind == CacheGroup::Kind::full ? whole : std::max(num_seqs, num_longest) * each;
  }
  return pages;
}

/// The host's memory, of which each rank has its part, and half is left to others.
MemoryRoom room_here(const Program &program, const ExecutorOptions &options, const Mesh &mesh) {
  const int32_t num_here = options.ranks.num_here == 0 ? mesh.num_ranks() : options.ranks.num_here;
  const uint64_t free = available_memory() / static_cast<uint64_t>(num_here);
  return {free, program.arena_bytes, free / 2 - std::min(free / 2, program.arena_bytes),
          "the arena takes " + human_bytes(program.arena_bytes), ""};
}

}  // namespace

int choose_threads(int wanted) {
  if (wanted < 0 || wanted > kMaxThreads) {
    fail(TS_BAD_REQUEST, "num_threads is ", wanted, ", wanted 0 (every core) to ", kMaxThreads);
  }
  return wanted != 0 ? wanted : std::min(usable_cores(), kMaxThreads);
}

int32_t choose_pages(const Program &program, const ExecutorOptions &options, const Mesh &mesh, const MemoryRoom &room) {
  const int32_t num_here = options.ranks.num_here == 0 ? mesh.num_ranks() : options.ranks.num_here;
  const int32_t num_owners = mesh.num_owners();
  const Limits &limits = program.limits;
  const uint64_t page_bytes = program.page_bytes * static_cast<uint64_t>(std::max(program.most_slabs(), 1));
  const int64_t most = std::numeric_limits<int32_t>::max() / limits.page_size / num_owners;  // a slot is an int32
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
    const int64_t mine = (seqs + num_owners - 1) / num_owners;  // of the sequences that ranks share out
    pages = std::min({default_pages(program, mine), most,
                      static_cast<int64_t>(std::min<uint64_t>(room.for_cache / page_bytes, most))});
    pages = std::max<int64_t>(pages, 1);
  }
  const auto kv_bytes = static_cast<uint64_t>(pages) * page_bytes;
  if (room.fixed > room.free || kv_bytes > room.free - room.fixed) {
    fail(TS_NO_MEMORY, "not enough memory", room.where, ": ", room.what_is_fixed, " and the KV cache ",
         human_bytes(kv_bytes), " (", pages, " pages of ", limits.page_size, " tokens, ", human_bytes(page_bytes),
         " a page), but ", human_bytes(room.free), " is free", num_here > 1 ? " for each rank" : "",
         ": ask for fewer pages");
  }
  return static_cast<int32_t>(pages);
}

struct Executor::Impl {
  std::shared_ptr<const Plan> plan;  // holds the weights
  Program program;
  Kernels kernels;
  Ranks ranks;  // none for a plan of one
  int32_t num_pages;
  Memory arena;
  Memory kv;
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

  Impl(std::shared_ptr<const Plan> plan_, Program program_, Ranks ranks_, int32_t num_pages_, int num_threads);
  ~Impl();
  Impl(const Impl &) = delete;
  Impl &operator=(const Impl &) = delete;
  void *address(const Argument &argument) const;
  void *kv_pages(int32_t layer) const;
  void bind();
  void bind(const Launch &launch, const Limits &limits, int32_t &num_staged, std::vector<Bound> &launches);
  void meet();
  void run(const ts_batch &batch);
};

Executor::Impl::Impl(std::shared_ptr<const Plan> plan_, Program program_, Ranks ranks_, int32_t num_pages_,
                     int num_threads)
    : plan(std::move(plan_)),
      program(std::move(program_)),
      kernels("tsp/kernels/" + program.target, plan->find("tsp/kernels/" + program.target)->bytes),
      ranks(std::move(ranks_)),
      num_pages(num_pages_),
      arena(program.arena_bytes, "the arena"),
      kv(static_cast<uint64_t>(num_pages) * program.page_bytes *
             static_cast<uint64_t>(std::max(program.num_slabs(), 1)),
         "the KV cache"),
      workers(num_threads,
              ranks.group ? ranks.group->most_turns() : (num_threads <= usable_cores() ? Patience::kMostTurns : 0)),
      parts(plan->mesh(), program.rank, program.limits.max_seqs,
            static_cast<int64_t>(num_pages) * program.limits.page_size, static_cast<int32_t>(program.groups.size())) {
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
  int32_t num_pages =
      rank == 0 ? choose_pages(program, options, plan->mesh(), room_here(program, options, plan->mesh())) : 0;
  if (num_ranks == 1) {
    plan->verify_weights();
    impl_ = std::make_unique<Impl>(std::move(plan), std::move(program), Ranks{}, num_pages, num_threads);
    return;
  }
  Ranks ranks = meet_ranks(*plan, program, options.ranks, options.num_threads, num_pages);
  const std::shared_ptr<RankGroup> group = ranks.group;
  num_pages = group->layout().num_pages;
  num_threads = group->layout().num_threads[static_cast<size_t>(rank)];
  try {
    verify_weights(*plan, program);
    impl_ = std::make_unique<Impl>(std::move(plan), std::move(program), std::move(ranks), num_pages, num_threads);
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
       {offset(batch.token_ids), offset(batch.positions), offset(batch.slots), offset(batch.query_start),
        offset(batch.context_len), offset(batch.page_table), offset(batch.logit_rows)}});
}

void Executor::follow() {
  const int32_t *area = batch_memory().data();
  while (const PublishedBatch *b = impl_->ranks.group->next()) {
    const auto at = [&](size_t i) { return area + b->arrays[i]; };
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

void Executor::on_failure(std::function<void(const std::string &message)> callback) {
  if (impl_->ranks.watch) impl_->ranks.watch->on_failure(std::move(callback));
}

void Executor::share(int32_t count, const std::function<void(int32_t item, int thread)> &job) {
  impl_->workers.share(count, job);
}

const float *Executor::logits() const { return impl_->buckets[impl_->current].logits; }
int64_t Executor::logits_stride() const { return impl_->buckets[impl_->current].logits_stride; }
const std::vector<CacheGroup> &Executor::groups() const { return impl_->program.groups; }
const Limits &Executor::limits() const { return impl_->program.limits; }
int32_t Executor::num_pages() const { return impl_->num_pages; }
int32_t Executor::num_threads() const { return impl_->workers.num_threads(); }
const std::string &Executor::target() const { return impl_->program.target; }

}  // namespace ts
