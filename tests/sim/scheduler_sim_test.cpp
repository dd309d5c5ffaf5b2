#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <map>
#include <new>
#include <set>
#include <sstream>
#include <string>

#include "script.h"
#include "shrink.h"
#include "turns.h"

/// Worlds of random size, driven by a seed: the real scheduler and pool, a toy model whose output depends on every
/// token that it reads through the page tables, and after each step every invariant. A world that fails is cut down to a
/// short script, which is printed.
///
/// TS_SIM_SEED=n begins with world n, TS_SIM_STEPS=n sets how many steps all worlds take, TS_SIM_SCRIPT=file runs one script.
namespace ts {
namespace {

using sim::Script;

uint64_t environment(const char *name, uint64_t otherwise) {
  const char *value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtoull(value, nullptr, 10);
}

class World {
 public:
  explicit World(const Script &script)
      : script_(script), options_(script.options()), harness_(options_), turns_(script.patience_ms) {
    harness_.on_batch = [this](const Batch &batch) {
      turns_.step(batch, latest_ms_);
      weigh(batch);
    };
    harness_.on_token = [this](uint64_t id) {
      turns_.output(id);
      if (const auto token_ns = guesses_.find(id); token_ns != guesses_.end()) purses_ns_[id] += token_ns->second;
    };
    harness_.copy_fails = [this](const PageCopy &copy) {
      int64_t &failures = copy.to == PageCopy::To::page ? num_torn_ : num_refused_;
      return failures > 0 && failures-- > 0;
    };
    // What steps with copies take says nothing of others.
    harness_.on_commit = [this](const Batch &batch) {
      if (batch.copies().empty()) learnt_.learn(learning_.front().first, learning_.front().second);
      learning_.pop_front();
    };
  }

  /// What the script says; then everything that lives must end.
  void run() {
    for (auto e = script_.events.begin(); e != script_.events.end() && !testing::Test::HasFailure(); step()) {
      for (; e != script_.events.end() && e->at <= num_steps_; ++e) happen(*e);
    }
    int patience = 100000;
    while (harness_.step() && !testing::Test::HasFailure()) {
      ++num_steps_;
      ASSERT_GT(--patience, 0) << "requests starve";
    }
    ASSERT_TRUE(harness_.scheduler.idle());
    harness_.set_time(latest_ms_ + 200);
    ASSERT_EQ(harness_.scheduler.num_leases(), 0) << "a lease has not ended";
    expect_every_page();
    for (const auto &[id, request] : requests_) compare(request);
  }

  int64_t num_steps() const { return num_steps_; }
  size_t num_groups() const { return options_.scheduler.groups.size(); }
  const SchedulerCounters &counters() const { return harness_.scheduler.counters(); }
  int64_t num_ahead() const { return harness_.num_ahead; }

 private:
  void expect_every_page() const {
    for (int32_t owner = 0; owner < options_.scheduler.num_owners; ++owner) {
      const PagePool &pool = harness_.scheduler.pool(owner);
      EXPECT_EQ(pool.num_available(), options_.scheduler.num_pages) << "a page is lost";
    }
  }

  void happen(const sim::Event &e) {
    const auto id = static_cast<uint64_t>(e.id);
    if (e.what == "arrive") {
      requests_[id] = e.request(options_.vocab_size);
      harness_.submit(requests_[id]);
      turns_.arrive(requests_[id], latest_ms_);
      if (e.timeout_ms > 0) deadlines_[id] = latest_ms_ + e.timeout_ms;
      ++tenants_[requests_[id].cache_salt];
      if (poison_of(requests_[id]) < e.prompt) arrive_poisoned(requests_[id]);
    } else if (e.what == "cancel") {
      harness_.cancel(id);
      turns_.leave(id);
      cancelled_.insert(id);
    } else if (e.what == "fail" || e.what == "lose") {
      harness_.fail("failed");
      learning_.clear();
      if (e.what == "fail") return;
      for (const auto &[live, request] : requests_) cancelled_.insert(live);
      harness_.scheduler.cancel_all();
      turns_.leave_all();
      harness_.scheduler.end_leases();
      ASSERT_TRUE(harness_.scheduler.idle());
      expect_every_page();
    } else if (e.what == "tear") {
      ++num_torn_;
    } else if (e.what == "refuse") {
      ++num_refused_;
    } else if (e.what == "jump") {
      now_ms_ += e.by_ms;
    } else {
      FAIL() << "nobody knows what '" << e.what << "' is";
    }
  }

  static int64_t poison_of(const toy::Request &r) {
    return std::find(r.prompt.begin(), r.prompt.end(), toy::kPoison) - r.prompt.begin();
  }

  /// Of two that have the poison in common and live at once, one may find the other's pages: what is wrong with them shows
  /// only in the logits at the end of the prompt, which who is cancelled before never sees. Whoever comes later must not.
  void arrive_poisoned(const toy::Request &arrived) {
    std::erase_if(poisoned_, [&](uint64_t id) { return harness_.results.at(id).finish == TS_FINISH_ERROR; });
    const auto end = arrived.prompt.begin() + poison_of(arrived) + 1;
    for (const uint64_t id : poisoned_) {
      const std::vector<int32_t> &other = requests_.at(id).prompt;
      if (std::mismatch(arrived.prompt.begin(), end, other.begin(), other.end()).first != end) continue;
      in_company_.insert({id, arrived.id});
    }
    poisoned_.push_back(arrived.id);
  }

  void step() {
    harness_.set_time(++now_ms_);
    latest_ms_ = std::max(latest_ms_, now_ms_);
    turns_.time_out(latest_ms_);
    harness_.step();
    ++num_steps_;
    expect_timely();
    const SchedulerOptions &o = options_.scheduler;
    EXPECT_LE(harness_.last_num_tokens, o.token_budget);
    EXPECT_LE(harness_.last_num_seqs, o.max_seqs);
  }

  /// A step with decodes is predicted to take no longer than the target, however much prompt there is beside them. The world tells
  /// how long it takes: as long as predicted at first, times its slowness.
  void weigh(const Batch &batch) {
    const ts_batch &arrays = batch.arrays();
    StepLoad load;
    int32_t num_decodes = 0, num_prompt = 0, num_drafted = 0;
    for (int32_t row = 0; row < arrays.num_seqs; ++row) {
      const int32_t num_tokens = arrays.query_start[row + 1] - arrays.query_start[row];
      num_decodes += batch.decodes(row) ? 1 : 0;
      (batch.decodes(row) ? num_drafted : num_prompt) += num_tokens - (batch.decodes(row) ? 1 : 0);
    }
    load.num_tokens = arrays.num_tokens;
    for (int32_t t = 0; t < arrays.num_tokens; ++t) load.decode_keys += arrays.positions[t] + 1;
    const auto target = static_cast<double>(script_.target_ns) * (1 + 1e-9);
    if (target > 0 && num_decodes > 0 && (num_prompt > Scheduler::kLeastChunk || num_drafted > 0)) {
      EXPECT_LE(learnt_.ns(load), target) << num_prompt << " tokens of prompts stall " << num_decodes << " decodes";
    }
    weigh_drafts(batch, load, num_drafted, num_decodes);
    harness_.took_ns = static_cast<int64_t>(first_.ns(load)) * script_.slowness / 100;
    learning_.emplace_back(load, harness_.took_ns);
  }

  /// What a sequence's drafts add to its steps is at most a hundredth of what its tokens take without any, and what those that come
  /// true save. And they stand in its own text, or in what its tenant was told.
  void weigh_drafts(const Batch &batch, StepLoad load, int32_t num_drafted, int32_t num_decodes) {
    guesses_.clear();
    if (script_.max_draft == 0 || num_decodes == 0) return;
    const ts_batch &arrays = batch.arrays();
    StepLoad decodes{num_decodes, 0, 0};
    load.num_tokens -= num_drafted;  // and its keys, below
    for (int32_t row = 0; row < arrays.num_seqs; ++row) {
      if (!batch.decodes(row)) continue;
      const int32_t first = arrays.query_start[row];
      decodes.decode_keys += arrays.positions[first] + 1;
      for (int32_t t = first + 1; t < arrays.query_start[row + 1]; ++t) load.decode_keys -= arrays.positions[t] + 1;
    }
    const double token_ns = learnt_.ns(decodes) / num_decodes;
    for (int32_t row = 0; row < arrays.num_seqs; ++row) {
      const Sequence &sequence = batch.running(row);
      if (!batch.decodes(row) || sequence.drafts == nullptr) continue;
      guesses_[sequence.id] = token_ns;
      const double before_ns = learnt_.ns(load);
      const int32_t first = arrays.query_start[row] + 1, end = arrays.query_start[row + 1];
      load.num_tokens += end - first;
      for (int32_t t = first; t < end; ++t) load.decode_keys += arrays.positions[t] + 1;
      double &purse_ns = purses_ns_[sequence.id];
      purse_ns += token_ns / 100;
      const double extra_ns = learnt_.ns(load) - before_ns;
      EXPECT_LE(extra_ns, purse_ns * (1 + 1e-9)) << "request " << sequence.id << " guesses more than it may";
      purse_ns -= extra_ns + token_ns;  // its first token is none that was saved
      if (end > first) expect_known(sequence, {arrays.token_ids + first, arrays.token_ids + end});
    }
  }

  void expect_known(const Sequence &sequence, const std::vector<int32_t> &draft) const {
    const std::string &salt = requests_.at(sequence.id).cache_salt;
    if (salt.empty() || tenants_.at(salt) > 64 || stands_in(sequence.tokens, draft)) return;
    const bool told = std::ranges::any_of(requests_, [&](const auto &other) {
      std::vector<int32_t> text = other.second.prompt;
      const std::vector<int32_t> &said = harness_.results.at(other.first).tokens;
      text.insert(text.end(), said.begin(), said.end());
      return other.second.cache_salt == salt && stands_in(text, draft);
    });
    EXPECT_TRUE(told) << "request " << sequence.id << " guesses what another tenant was told";
  }

  /// Whether `draft` stands in the text, or begins in it and goes on with itself.
  static bool stands_in(const std::vector<int32_t> &text, const std::vector<int32_t> &draft) {
    std::vector<int32_t> both = text;
    both.insert(both.end(), draft.begin(), draft.end());
    const auto found = std::search(both.begin(), both.end(), draft.begin(), draft.end());
    return found - both.begin() < static_cast<ptrdiff_t>(text.size());
  }

  /// Nothing lives past its deadline.
  void expect_timely() {
    std::erase_if(deadlines_, [this](const auto &deadline) {
      const auto &[id, at_ms] = deadline;
      const toy::Result &result = harness_.results.at(id);
      if (at_ms <= latest_ms_) {
        EXPECT_TRUE(result.finish.has_value()) << "request " << id << " outlives its deadline";
      }
      if (result.finish == TS_FINISH_TIMEOUT) {
        EXPECT_LE(at_ms, result.ended_ms) << "request " << id << " was ended early";
      }
      return result.finish.has_value();
    });
  }

  /// The output is what the request gives alone; if it was ended early, the beginning of that.
  void compare(const toy::Request &request) {
    const toy::Result &got = harness_.results.at(request.id);
    const toy::Result expected = toy::solo(request, options_);
    ASSERT_TRUE(got.finish.has_value()) << "request " << request.id << " never ended";
    ASSERT_LE(got.num_restored, script_.num_slots == 0 ? 0 : got.num_cached);
    ASSERT_TRUE(got.num_cached <= poison_of(request) || in_company_.contains(request.id))
        << "request " << request.id << " found poison in the cache";
    if (request.cache_salt.size() > 0 && tenants_.at(request.cache_salt) == 1) {
      ASSERT_EQ(got.num_cached, 0) << "request " << request.id << " found another tenant's pages";
    }
    const bool failed = got.finish == TS_FINISH_ERROR && got.message == "failed";
    const bool cancelled = got.finish == TS_FINISH_CANCELLED;
    const bool late = got.finish == TS_FINISH_TIMEOUT && request.timeout_ms > 0;
    if (!failed && !cancelled && !late) {
      ASSERT_EQ(got.finish, expected.finish) << "request " << request.id;
      ASSERT_EQ(got.tokens, expected.tokens) << "request " << request.id;
      return;
    }
    ASSERT_TRUE(failed || late || cancelled_.contains(request.id))
        << "request " << request.id << " was not cancelled by us";
    ASSERT_LE(got.tokens.size(), expected.tokens.size());
    ASSERT_TRUE(std::equal(got.tokens.begin(), got.tokens.end(), expected.tokens.begin())) << "request " << request.id;
  }

  Script script_;
  EngineOptions options_;
  toy::Harness harness_;
  int64_t num_steps_ = 0;
  int64_t now_ms_ = 0, latest_ms_ = 0;
  int64_t num_torn_ = 0, num_refused_ = 0;  // copies that are still to fail
  sim::Turns turns_;
  const StepCost first_ = options_.scheduler.cost;
  StepCost learnt_ = first_;
  std::deque<std::pair<StepLoad, int64_t>> learning_;  // of the steps in flight, and how long they take
  std::map<uint64_t, double> guesses_;                 // who may in this step, and what a token of it takes
  std::map<uint64_t, double> purses_ns_;               // what who guesses has to spend
  std::map<uint64_t, int64_t> deadlines_;              // of those that may live
  std::map<uint64_t, toy::Request> requests_;
  std::set<uint64_t> cancelled_;
  std::map<std::string, int> tenants_;  // how many requests have a salt
  std::vector<uint64_t> poisoned_;      // that may live
  std::set<uint64_t> in_company_;
};

/// What the process that runs the worlds tells the one that waits for it.
struct Progress {
  uint64_t seed = 0;
  uint64_t num_steps = 0;
  uint64_t num_ahead = 0;  // that were scheduled while another was in flight
  SchedulerCounters sums;
  uint64_t num_restored_in_groups = 0;  // tokens, in worlds of several cache groups
};

bool run_worlds(Progress &progress, uint64_t first, uint64_t wanted) {
  for (progress.seed = first; progress.num_steps < wanted; ++progress.seed) {
    World world(sim::Draw(progress.seed).script(400));
    world.run();
    if (testing::Test::HasFailure()) return false;
    progress.num_steps += static_cast<uint64_t>(world.num_steps());
    progress.num_ahead += static_cast<uint64_t>(world.num_ahead());
    progress.sums.num_preemptions += world.counters().num_preemptions;
    progress.sums.num_cached_tokens += world.counters().num_cached_tokens;
    progress.sums.num_finished += world.counters().num_finished;
    progress.sums.num_drafted_tokens += world.counters().num_drafted_tokens;
    progress.sums.num_accepted_tokens += world.counters().num_accepted_tokens;
    progress.sums.num_restored_tokens += world.counters().num_restored_tokens;
    progress.sums.num_pages_broken += world.counters().num_pages_broken;
    if (world.num_groups() > 1) progress.num_restored_in_groups += world.counters().num_restored_tokens;
  }
  return true;
}

bool run_script(const Script &script) {
  World(script).run();
  return !testing::Test::HasFailure();
}

/// The shortest failing script that was found, as text.
std::string shortened(const Script &script) {
  const auto fails = [](const Script &s) { return !sim::passes([&s] { return run_script(s); }, true); };
  if (!fails(script)) return "but not when it is run again: the engine is not deterministic\n";
  const Script shortest = sim::Shrink(script, fails, 20).run();
  std::ostringstream text;
  text << "these " << shortest.events.size() << " of its " << script.events.size()
       << " events fail too; with them in a file, TS_SIM_SCRIPT=file runs them:\n"
       << sim::print(shortest);
  return text.str();
}

/// Who failed was preempted before, and has gone on where it belonged to another owner: the first forgets its pages too.
TEST(SchedulerSim, WhatFailedIsForgottenByWhoeverHadIt) {
  std::istringstream in(R"(
world page_size=4 num_pages=6 max_context=29 token_budget=5 max_seqs=4 num_owners=3 patience_ms=13 target_ns=3085 slowness=312
0 arrive id=23 prompt=1 max_tokens=10 repeat=1
0 arrive id=24 prompt=6 max_tokens=7 repeat=2
0 arrive id=26 prompt=1 max_tokens=7 repeat=1
0 arrive id=27 prompt=14 family=3 poison=0 max_tokens=1 repeat=1
12 arrive id=42 prompt=5 family=3 poison=0 max_tokens=1)");
  EXPECT_TRUE(sim::passes([&] { return run_script(sim::parse(in)); }, false));
}

/// Worlds with a second tier are some of all: few worlds say nothing of how often pages come back.
constexpr uint64_t kEnoughWorlds = 500;

TEST(SchedulerSim, RandomWorldsKeepEveryInvariant) {
  if (const char *file = std::getenv("TS_SIM_SCRIPT")) {
    std::ifstream in(file);
    ASSERT_TRUE(in) << "there is no file " << file;
    run_script(sim::parse(in));
    return;
  }
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr uint64_t kSteps = 30'000;
#else
  constexpr uint64_t kSteps = 3'000'000;
#endif
  const uint64_t first = environment("TS_SIM_SEED", 1), wanted = environment("TS_SIM_STEPS", kSteps);
  void *memory = mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  Progress &progress = *new (memory) Progress;
  if (!sim::passes([&] { return run_worlds(progress, first, wanted); }, false)) {
    FAIL() << "world " << progress.seed << " fails (TS_SIM_SEED=" << progress.seed << " begins with it); "
           << shortened(sim::Draw(progress.seed).script(400));
  }
  std::printf("worlds %llu to %llu: %llu steps\n", static_cast<unsigned long long>(first),
              static_cast<unsigned long long>(progress.seed - 1), static_cast<unsigned long long>(progress.num_steps));
  EXPECT_GT(progress.num_ahead, wanted / 10) << "too few steps are scheduled while another is in flight";
  EXPECT_GT(progress.sums.num_preemptions, wanted / 100) << "the worlds are too roomy to test preemption";
  EXPECT_GT(progress.sums.num_cached_tokens, wanted / 10) << "the worlds share too little to test the prefix cache";
  EXPECT_GT(progress.sums.num_accepted_tokens, wanted / 200) << "the texts repeat too little to test drafts";
  EXPECT_GT(progress.sums.num_drafted_tokens, progress.sums.num_accepted_tokens) << "and some drafts must fail";
  EXPECT_GT(progress.sums.num_pages_broken, wanted / 2000) << "and too little of it is broken";
  if (progress.seed - first >= kEnoughWorlds) {
    EXPECT_GT(progress.sums.num_restored_tokens, wanted / 100) << "the worlds bring back too little";
    EXPECT_GT(progress.num_restored_in_groups, wanted / 1000) << "so do those where groups must agree";
  }
  munmap(memory, sizeof(Progress));
}

TEST(SimScript, IsReadBackAsItWasPrinted) {
  const Script script = sim::Draw(7).script(400);
  ASSERT_GT(script.events.size(), 20);
  std::istringstream in(sim::print(script));
  EXPECT_EQ(sim::print(sim::parse(in)), sim::print(script));
}

TEST(SimShrink, FindsTheFewEventsThatMatter) {
  const Script script = sim::Draw(3).script(400);
  // Fails whenever a request is cancelled behind the arrival of one whose prompt has five tokens or more.
  const auto fails = [](const Script &s) {
    bool arrived = false;
    for (const sim::Event &e : s.events) {
      arrived = arrived || (e.what == "arrive" && e.prompt >= 5);
      if (arrived && e.what == "cancel") return true;
    }
    return false;
  };
  ASSERT_TRUE(fails(script));
  const Script shortest = sim::Shrink(script, fails, 20).run();
  ASSERT_EQ(shortest.events.size(), 2) << sim::print(shortest);
  EXPECT_EQ(shortest.events[0].prompt, 5);
  EXPECT_EQ(shortest.events[0].max_tokens, 1);
  EXPECT_EQ(shortest.events[1].at, 0);
}

}  // namespace
}  // namespace ts
