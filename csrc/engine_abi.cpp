#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "abi.h"
#include "engine_core.h"
#include "executor.h"
#include "host.h"
#include "json.h"
#include "no_signals.h"
#include "text.h"

/// What ts_engine points to.
struct ts_engine {
  std::unique_ptr<ts::Device> device;
  std::unique_ptr<ts::EngineCore> core;  // second: its step thread uses the device

  ts_engine(std::unique_ptr<ts::Device> device_, std::unique_ptr<ts::EngineCore> core_)
      : device(std::move(device_)), core(std::move(core_)) {
    device->on_failure([raw = core.get()](const std::string &message) { raw->abandon(message); });
  }
  ~ts_engine() { device->on_failure(nullptr); }
  ts_engine(const ts_engine &) = delete;
  ts_engine &operator=(const ts_engine &) = delete;
};

namespace ts {
namespace {

constexpr int32_t kMaxQueue = 1024;

void check_options(const ts_engine_options &o) {
  if (o.size != sizeof(ts_engine_options)) {
    fail(TS_BAD_REQUEST, "ts_engine_options.size is ", o.size, ", this engine's is ", sizeof(ts_engine_options));
  }
  if (o.event_size != sizeof(ts_event)) {
    fail(TS_BAD_REQUEST, "event_size is ", o.event_size, ", but this engine's ts_event has ", sizeof(ts_event),
         " bytes: build the caller against this engine's engine.h");
  }
  const auto not_negative = [](const char *name, int64_t value) {
    if (value < 0) fail(TS_BAD_REQUEST, name, " is ", value, ", wanted 0 (the default) or more");
  };
  not_negative("num_threads", o.num_threads);
  not_negative("num_pages", o.num_pages);
  not_negative("kv_bytes", o.kv_bytes);
  not_negative("offload_bytes", o.offload_bytes);
  not_negative("token_budget", o.token_budget);
  not_negative("max_seqs", o.max_seqs);
  not_negative("max_queue", o.max_queue);
  not_negative("patience_ms", o.patience_ms);
  not_negative("target_tpot_us", o.target_tpot_us);
  if (o.overlap_schedule < TS_OVERLAP_OFF || o.overlap_schedule > TS_OVERLAP_AUTO) {
    fail(TS_BAD_REQUEST, "overlap_schedule is ", o.overlap_schedule, ", wanted 0 (off), 1 (on) or 2 (auto)");
  }
  not_negative("rank", o.rank);
  not_negative("rank_timeout_ms", o.rank_timeout_ms);
  not_negative("ranks_here", o.ranks_here);
  if (o.max_draft < -Draft::kMost || o.max_draft > Draft::kMost) {
    fail(TS_BAD_REQUEST, "max_draft is ", o.max_draft, ", wanted 0 (none) to ", Draft::kMost,
         ", or the negative of that, for drafts at any cost");
  }
  if (o.prefix_cache != 0 && o.prefix_cache != 1) {
    fail(TS_BAD_REQUEST, "prefix_cache is ", o.prefix_cache, ", wanted 0 (off) or 1 (on)");
  }
  if (o.prefix_cache == 0 && o.offload_bytes > 0) {
    fail(TS_BAD_REQUEST, "offload_bytes is ", o.offload_bytes,
         " but prefix_cache is 0: the second tier keeps what a prefix cache evicts");
  }
  if (o.offload_folder != nullptr && o.offload_bytes == 0) {
    fail(TS_BAD_REQUEST, "offload_folder is ", in_quotes(o.offload_folder),
         " but offload_bytes is 0: say how much may lie there");
  }
}

int32_t within(const char *name, int32_t wanted, int32_t limit) {
  if (wanted > limit) {
    fail(TS_BAD_REQUEST, name, " is ", wanted, ", but the plan was arranged for at most ", limit,
         ": lower it, or build the plan with a larger limit");
  }
  return wanted == 0 ? limit : wanted;
}

ExecutorOptions executor_options(const ts_engine_options &o, int32_t num_ranks) {
  ExecutorOptions options;
  options.num_threads = o.num_threads;
  options.num_pages = o.num_pages;
  options.kv_bytes = o.kv_bytes;
  options.max_seqs = o.max_seqs;
  options.offload_bytes = o.offload_bytes;
  options.offload_folder = o.offload_folder == nullptr ? "" : o.offload_folder;
  options.target = o.target == nullptr ? "" : o.target;
  options.cuda_library = o.cuda_library == nullptr ? "" : o.cuda_library;
  options.ranks.rank = o.rank;
  options.ranks.timeout_ms = o.rank_timeout_ms;
  options.ranks.rendezvous = o.rendezvous == nullptr ? "" : o.rendezvous;
  options.ranks.num_here = o.ranks_here;
  options.ranks.mpi_library = o.mpi_library == nullptr ? "" : o.mpi_library;
  if (o.rank_pids != nullptr) options.ranks.children.assign(o.rank_pids, o.rank_pids + num_ranks);
  return options;
}

StepCost step_cost_of(const Plan &plan, const std::string &target) {
  const std::string name = "tsp/costs";
  const Entry *entry = plan.find(name);
  if (entry == nullptr) {
    fail(TS_BAD_PLAN, "the plan lacks ", in_quotes(name),
         ", which target_tpot_us and max_draft need: rebuild it with this tscompile, or do without them");
  }
  const nlohmann::json json = parse_canonical_json(entry->bytes, name);
  return parse_step_cost(JsonNode(json, name)[target]);
}

/// Whether a step is scheduled while the one before it runs.
bool schedules_ahead(const ts_engine_options &o, const Device &device, int32_t num_ranks) {
  if (o.overlap_schedule == TS_OVERLAP_AUTO) return num_ranks == 1 && device.num_threads() < usable_cores();
  if (o.overlap_schedule == TS_OVERLAP_ON && num_ranks > 1) {
    fail(TS_BAD_REQUEST, "overlap_schedule is 1 (on), but the plan is for ", num_ranks,
         " ranks, which share the arrays of one batch: wanted 0 (off) or 2 (auto)");
  }
  return o.overlap_schedule == TS_OVERLAP_ON;
}

EngineOptions engine_options(const ts_engine_options &o, const Device &device, const Plan &plan) {
  const Limits &limits = device.limits();
  const int32_t num_owners = plan.mesh().num_owners();
  if (int64_t{num_owners} * device.num_pages() * limits.page_size > INT32_MAX) {
    fail(TS_BAD_REQUEST, num_owners * int64_t{device.num_pages()}, " KV pages of ", limits.page_size,
         " tokens are more than ", INT32_MAX, " slots: lower num_pages or kv_bytes");
  }
  if (limits.vocab_size > Sampler::kMaxVocab) {
    fail(TS_BAD_PLAN, "the plan's vocabulary has ", limits.vocab_size, " tokens, and the engine samples from at most ",
         Sampler::kMaxVocab);
  }
  EngineOptions options;
  options.scheduler.token_budget = within("token_budget", o.token_budget, limits.max_tokens);
  options.scheduler.max_seqs = within("max_seqs", o.max_seqs, limits.max_seqs);
  options.scheduler.max_context = limits.max_context;
  options.scheduler.page_size = limits.page_size;
  options.scheduler.num_pages = device.num_pages();
  options.scheduler.num_owners = num_owners;
  options.scheduler.groups = device.groups();
  options.scheduler.prefix_cache = o.prefix_cache == 1;
  options.scheduler.tier = device.tier();
  options.scheduler.max_draft = std::abs(o.max_draft);
  options.scheduler.drafts_at_any_cost = o.max_draft < 0;
  if (o.target_tpot_us > 0 || o.max_draft > 0) options.scheduler.cost = step_cost_of(plan, device.target());
  options.scheduler.target_step_ns = int64_t{o.target_tpot_us} * 1000;
  options.scheduler.ahead = schedules_ahead(o, device, plan.mesh().num_ranks());
  if (o.patience_ms > 0) options.scheduler.patience_ms = o.patience_ms;
  options.scheduler.batch_memory = device.batch_memory();
  options.vocab_size = limits.vocab_size;
  options.max_queue = o.max_queue == 0 ? kMaxQueue : o.max_queue;
  options.eos_token_ids = plan.model().eos_token_ids;
  return options;
}

/// The engine, which records if the options say so, or replays.
std::unique_ptr<ts_engine> open_engine(const std::shared_ptr<const Plan> &plan, const ts_engine_options &o,
                                       std::unique_ptr<Replay> replay) {
  check_options(o);
  if (o.rank != 0) fail(TS_BAD_REQUEST, "rank ", o.rank, " does not serve: it calls ts_rank_run");
  auto device = open_device(plan, executor_options(o, plan->mesh().num_ranks()));
  auto run = [raw = device.get()](const ts_batch &batch) {
    raw->run(batch);
    return Logits{raw->logits(), raw->logits_stride()};
  };
  const auto share = [raw = device.get()](int32_t count, const RowJob &job) { raw->share(count, job); };
  const auto copy = [raw = device.get()](std::span<PageCopy> copies) { raw->copy(copies); };
  EngineOptions options = engine_options(o, *device, *plan);
  options.at_end = [raw = device.get()] { raw->end_steps(); };
  Tape tape{.replay = std::move(replay)};
  if (o.record != nullptr) {
    TraceHeader header{plan->seal(), device->target(), o};
    header.options.num_pages = device->num_pages();
    header.options.overlap_schedule = options.scheduler.ahead ? TS_OVERLAP_ON : TS_OVERLAP_OFF;
    tape.recorder = std::make_unique<Recorder>(o.record, header);
  }
  auto core =
      std::make_unique<EngineCore>(options, run, SharedRows{device->num_threads(), share}, std::move(tape), copy);
  return std::make_unique<ts_engine>(std::move(device), std::move(core));
}

void replay(const std::shared_ptr<const Plan> &plan, const ts_engine_options &own, const char *trace,
            ts_replay_report &report) {
  if (own.record != nullptr) fail(TS_BAD_REQUEST, "a replay is not recorded: it has its trace");
  auto reader = std::make_unique<TraceReader>(trace);
  const TraceHeader header = read_header(*reader, plan->seal());
  ts_engine_options options = own;
  header.put_into(options);
  if (own.target == nullptr) options.target = header.target.c_str();
  const auto engine = open_engine(plan, options, std::make_unique<Replay>(std::move(reader)));
  std::vector<ts_event> events(256);
  while (engine->core->poll(events.data(), static_cast<int32_t>(events.size()), -1) >= 0) {
  }
  ts_stats stats{};
  engine->core->stats(stats);
  const Replay &done = *engine->core->tape().replay;
  report = {stats.num_steps, done.num_requests(), done.num_output_tokens(), done.num_bytes_cut_off()};
  const std::string reason = engine->core->failure();
  if (const ts_status status = engine->core->failure_status(); status != TS_OK) fail(status, reason);
}

}  // namespace
}  // namespace ts

extern "C" {

ts_status ts_engine_open(ts_plan *plan, const ts_engine_options *options, ts_engine **engine, ts_error *error) {
  return ts::guarded(error, [&] {
    if (plan == nullptr || options == nullptr || engine == nullptr) {
      ts::fail(TS_BAD_REQUEST, "ts_engine_open: plan, options and engine must not be NULL");
    }
    *engine = nullptr;
    *engine = ts::open_engine(plan->plan, *options, {}).release();
  });
}

ts_status ts_replay(ts_plan *plan, const ts_engine_options *options, const char *trace, ts_replay_report *report,
                    ts_error *error) {
  return ts::guarded(error, [&] {
    if (plan == nullptr || options == nullptr || trace == nullptr || report == nullptr) {
      ts::fail(TS_BAD_REQUEST, "ts_replay: plan, options, trace and report must not be NULL");
    }
    *report = {};
    ts::replay(plan->plan, *options, trace, *report);
  });
}

ts_status ts_engine_recording(ts_engine *engine, ts_error *error) {
  return ts::guarded(error, [&] {
    if (engine == nullptr) ts::fail(TS_BAD_REQUEST, "ts_engine_recording: engine must not be NULL");
    if (const std::string reason = engine->core->recording_failure(); !reason.empty()) ts::fail(TS_IO, reason);
  });
}

ts_status ts_rank_run(ts_plan *plan, const ts_engine_options *options, ts_error *error) {
  return ts::guarded(error, [&] {
    if (plan == nullptr || options == nullptr) {
      ts::fail(TS_BAD_REQUEST, "ts_rank_run: plan and options must not be NULL");
    }
    ts::check_options(*options);
    if (options->rank == 0) ts::fail(TS_BAD_REQUEST, "rank 0 serves: it calls ts_engine_open");
    const ts::NoSignals no_signals;  // rank 0 drains, and its end ends this one
    ts::Executor(plan->plan, ts::executor_options(*options, plan->plan->mesh().num_ranks())).follow();
  });
}

ts_status ts_engine_failure(ts_engine *engine, ts_error *error) {
  return ts::guarded(error, [&] {
    if (engine == nullptr) ts::fail(TS_BAD_REQUEST, "ts_engine_failure: engine must not be NULL");
    if (const std::string reason = engine->core->failure(); !reason.empty()) ts::fail(TS_LOST_RANK, reason);
  });
}

void ts_engine_shutdown(ts_engine *engine) {
  if (engine != nullptr) engine->core->close();
}

void ts_engine_close(ts_engine *engine) { delete engine; }

ts_status ts_engine_submit(ts_engine *engine, const ts_request *request, ts_error *error) {
  return ts::guarded(error, [&] {
    if (engine == nullptr || request == nullptr)
      ts::fail(TS_BAD_REQUEST, "ts_engine_submit: engine and request must not be NULL");
    engine->core->submit(*request);
  });
}

int32_t ts_engine_retry_after_ms(ts_engine *engine) { return engine == nullptr ? 0 : engine->core->retry_after_ms(); }

void ts_engine_cancel(ts_engine *engine, uint64_t id) {
  if (engine != nullptr) engine->core->cancel(id);
}

int32_t ts_engine_poll(ts_engine *engine, ts_event *events, int32_t capacity, int32_t timeout_ms) {
  if (engine == nullptr || events == nullptr) return -1;
  return engine->core->poll(events, capacity, timeout_ms);
}

void ts_engine_stats(ts_engine *engine, ts_stats *stats) {
  if (engine == nullptr || stats == nullptr) return;
  ts_stats all{};
  engine->core->stats(all);
  all.num_threads = engine->device->num_threads();
  const std::string &target = engine->device->target();
  std::copy_n(target.begin(), std::min(target.size(), sizeof(all.target) - 1), all.target);
  all.size = std::min<uint32_t>(stats->size, sizeof(all));
  std::memcpy(stats, &all, all.size);
}

}  // extern "C"
