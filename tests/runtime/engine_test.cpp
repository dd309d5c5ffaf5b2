#include "engine_core.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <ctime>
#include <functional>
#include <future>
#include <latch>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "allocations.h"
#include "error.h"
#include "toy.h"
#include "workers.h"

namespace ts {
namespace {

using namespace std::chrono_literals;

toy::Request request(uint64_t id, int32_t num_prompt, int32_t max_tokens) {
  toy::Request r;
  r.id = id;
  r.prompt = toy::tokens(num_prompt, id % 5 + 1, 64);
  r.max_tokens = max_tokens;
  r.temperature = id % 2 == 0 ? 0.0F : 0.9F;
  r.seed = id * 7;
  r.ignore_eos = 1;
  return r;
}

/// The real engine around the toy model; three threads share the rows to sample.
class Engine {
 public:
  using Hook = std::function<void(const ts_batch &)>;  // called by the step thread before each step

  explicit Engine(const EngineOptions &options, Hook hook = {})
      : options(options),
        model_(options),
        core(std::make_unique<EngineCore>(
            options,
            [this, hook = std::move(hook)](const ts_batch &batch) {
              if (hook) hook(batch);
              return model_.run(batch);
            },
            SharedRows{workers_.num_threads(), [this](int32_t count, const RowJob &job) { share(count, job); }})) {}

  ts_status submit(const toy::Request &r, std::string *message = nullptr) {
    try {
      core->submit(r.abi());
      return TS_OK;
    } catch (const Error &e) {
      if (message != nullptr) *message = e.what();
      return e.status();
    }
  }

  /// Polls until `num_finished` requests have finished, or the engine is closed.
  void collect(size_t num_finished) {
    std::vector<ts_event> events(7);
    while (num_finished > 0) {
      const int32_t n = core->poll(events.data(), static_cast<int32_t>(events.size()), 10000);
      if (n < 0) return;
      ASSERT_GT(n, 0) << "nothing happens any more";
      for (int32_t i = 0; i < n; ++i) num_finished -= take(events[static_cast<size_t>(i)]) ? 1 : 0;
    }
  }

  void expect_solo(const toy::Request &r) {
    const toy::Result expected = toy::solo(r, options);
    EXPECT_EQ(results[r.id].tokens, expected.tokens) << "request " << r.id;
    EXPECT_EQ(results[r.id].finish, expected.finish) << "request " << r.id;
  }

  ts_stats stats() const {
    ts_stats s{};
    core->stats(s);
    return s;
  }

  EngineOptions options;
  std::map<uint64_t, toy::Result> results;
  std::map<uint64_t, std::vector<std::vector<int32_t>>> tops;

 private:
  bool take(const ts_event &e) {
    toy::Result &result = results[e.id];
    EXPECT_FALSE(result.finish.has_value()) << "an event after the last, of request " << e.id;
    if (e.kind == TS_EVENT_TOKEN) {
      if (result.tokens.empty()) result.num_cached = e.num_cached;
      result.tokens.push_back(e.token);
      tops[e.id].emplace_back(e.top_tokens, e.top_tokens + e.num_top);
      return false;
    }
    EXPECT_EQ(e.kind, TS_EVENT_FINISHED);
    EXPECT_TRUE(result.tokens.empty() || result.num_cached == e.num_cached);
    result.num_cached = e.num_cached;
    result.finish = static_cast<ts_finish>(e.finish);
    result.message = e.message;
    return true;
  }

  void share(int32_t count, const RowJob &job) {
    std::atomic<int32_t> next = 0;
    auto take = [&](int thread, int, Barrier &) {
      for (int32_t row = next++; row < count; row = next++) job(row, thread);
    };
    workers_.run(take);
  }

  toy::Model model_;
  Workers workers_{3};

 public:
  std::unique_ptr<EngineCore> core;  // last: its thread uses the rest
};

TEST(Engine, AnswersManyThreadsAsEachRequestAlone) {
  for (const int32_t num_pages : {40, 256}) {
    EngineOptions o = toy::small();
    o.scheduler.num_pages = num_pages;
    o.scheduler.max_draft = Draft::kMost;
    Engine engine(o);
    constexpr uint64_t kThreads = 4;
    constexpr uint64_t kEach = 30;
    std::vector<std::thread> threads;
    for (uint64_t t = 0; t < kThreads; ++t) {
      threads.emplace_back([&engine, t] {
        for (uint64_t i = 0; i < kEach; ++i) {
          const uint64_t id = t * kEach + i + 1;
          EXPECT_EQ(
              engine.submit(request(id, static_cast<int32_t>(1 + id * 3 % 40), static_cast<int32_t>(1 + id % 30))),
              TS_OK);
        }
      });
    }
    engine.collect(kThreads * kEach);
    for (std::thread &thread : threads) thread.join();
    for (uint64_t id = 1; id <= kThreads * kEach; ++id) {
      engine.expect_solo(request(id, static_cast<int32_t>(1 + id * 3 % 40), static_cast<int32_t>(1 + id % 30)));
    }
    const ts_stats s = engine.stats();
    EXPECT_EQ(s.num_finished, kThreads * kEach);
    EXPECT_EQ(s.num_running + s.num_waiting, 0);
    EXPECT_EQ(s.num_pages_free + s.num_pages_cached, num_pages);
    EXPECT_GT(s.num_cached_tokens, 0);
    EXPECT_EQ(s.num_preemptions > 0, num_pages == 40);
    EXPECT_GE(s.step_ns, s.schedule_ns);
  }
}

/// One output for a request however it is served: alone, in a batch, in chunks of any size, from the prefix cache,
/// preempted.
TEST(Engine, CompanyNeverChangesAnOutput) {
  const toy::Request r = request(1, 37, 25);
  for (const int32_t budget : {1, 3, 16, 64}) {
    for (const bool prefix_cache : {false, true}) {
      for (const int32_t num_pages : {18, 200}) {
        for (const uint64_t company : {0, 12}) {
          EngineOptions o = toy::small();
          o.scheduler.token_budget = budget;
          o.scheduler.prefix_cache = prefix_cache;
          o.scheduler.num_pages = num_pages;
          Engine engine(o);
          for (uint64_t i = 0; i < company; ++i) engine.submit(request(100 + i, 20, 30));
          engine.submit(r);
          toy::Request again = r;
          again.id = 2;
          engine.submit(again);
          engine.collect(company + 2);
          engine.expect_solo(r);
          engine.expect_solo(again);
        }
      }
    }
  }
}

TEST(Engine, EventsCarryLogprobsAndCachedTokens) {
  Engine engine(toy::small());
  toy::Request r = request(2, 13, 3);
  r.num_logprobs = 4;
  engine.submit(r);
  engine.collect(1);
  ASSERT_EQ(engine.tops[2].size(), 3);
  for (size_t i = 0; i < 3; ++i) {
    ASSERT_EQ(engine.tops[2][i].size(), 4);
    EXPECT_EQ(engine.tops[2][i][0], engine.results[2].tokens[i]) << "greedy takes the most likely";
  }
  EXPECT_EQ(engine.results[2].num_cached, 0);
  r.id = 7;
  engine.submit(r);
  engine.collect(1);
  EXPECT_EQ(engine.results[7].num_cached, 12);
}

TEST(Engine, AFullQueueSaysBusyAndAnIdIsLiveUntilItsLastEvent) {
  EngineOptions o = toy::small();
  o.max_queue = 3;
  o.scheduler.max_seqs = 1;
  std::latch begun(1);
  std::latch may_run(1);
  std::atomic<int> steps = 0;
  Engine engine(o, [&](const ts_batch &) {
    if (steps++ > 0) return;
    begun.count_down();
    may_run.wait();
  });
  EXPECT_EQ(engine.submit(request(1, 4, 5)), TS_OK);
  begun.wait();  // it runs, so it does not wait any more
  std::string message;
  EXPECT_EQ(engine.submit(request(1, 4, 5), &message), TS_BAD_REQUEST);
  EXPECT_EQ(message, "id 1 belongs to a request that has not finished: take another");
  for (uint64_t id = 2; id <= 4; ++id) EXPECT_EQ(engine.submit(request(id, 4, 5)), TS_OK) << id;
  EXPECT_EQ(engine.submit(request(5, 4, 5), &message), TS_BUSY);
  EXPECT_EQ(message, "3 requests are waiting, and the queue holds 3: try again later");
  const int32_t first = engine.core->retry_after_ms();
  EXPECT_GE(first, 1);
  EXPECT_GE(engine.core->retry_after_ms(), first) << "who is sent away later is to come later";
  EXPECT_EQ(engine.stats().num_waiting, 3);
  may_run.count_down();
  engine.collect(4);
  for (uint64_t id = 1; id <= 4; ++id) engine.expect_solo(request(id, 4, 5));
  EXPECT_EQ(engine.submit(request(5, 4, 5)), TS_OK);
  engine.collect(1);
  engine.results.erase(5);
  EXPECT_EQ(engine.submit(request(5, 4, 5)), TS_OK) << "its last event was seen: the id is free";
  engine.collect(1);
}

TEST(Engine, CancelEndsARequestAnywhere) {
  EngineOptions o = toy::small();
  o.scheduler.max_seqs = 2;
  std::latch begun(1);
  std::latch may_run(1);
  std::atomic<int> steps = 0;
  Engine engine(o, [&](const ts_batch &) {
    if (steps++ > 0) return;
    begun.count_down();
    may_run.wait();
  });
  for (uint64_t id = 1; id <= 4; ++id) engine.submit(request(id, 4, 100));
  begun.wait();
  engine.core->cancel(2);  // in flight, or waiting for the next step
  engine.core->cancel(2);
  engine.core->cancel(4);   // waiting
  engine.core->cancel(77);  // unknown
  may_run.count_down();
  engine.collect(4);
  EXPECT_EQ(engine.results[2].finish, TS_FINISH_CANCELLED);
  EXPECT_LE(engine.results[2].tokens.size(), 1) << "it ended within one step";
  EXPECT_EQ(engine.results[4].finish, TS_FINISH_CANCELLED);
  engine.expect_solo(request(1, 4, 100));
  engine.expect_solo(request(3, 4, 100));
}

TEST(Engine, CloseEndsEveryRequestOnce) {
  Engine engine(toy::small());
  for (uint64_t id = 1; id <= 60; ++id) engine.submit(request(id, 20, 100));
  auto poller = std::async(std::launch::async, [&] { engine.collect(1000); });  // until -1
  std::this_thread::sleep_for(2ms);
  engine.core->close();
  poller.get();
  EXPECT_EQ(engine.results.size(), 60);
  for (const auto &[id, result] : engine.results) EXPECT_TRUE(result.finish.has_value()) << id;
  std::string message;
  EXPECT_EQ(engine.submit(request(99, 4, 4), &message), TS_CLOSED);
  EXPECT_EQ(message, "the engine is closing and takes no more requests");
  ts_event event;
  EXPECT_EQ(engine.core->poll(&event, 1, -1), -1);
}

TEST(Engine, DestructionWaitsForNobodyButAPollInProgress) {
  for (int i = 0; i < 20; ++i) {
    auto engine = std::make_unique<Engine>(toy::small());
    EngineCore &core = *engine->core;
    std::latch polling(1);
    std::thread poller([&] {
      ts_event event;
      polling.count_down();
      EXPECT_EQ(core.poll(&event, 1, -1), -1);
    });
    polling.wait();
    std::this_thread::sleep_for(1ms);  // so that it is inside
    if (i % 2 == 0) engine->core->cancel(1);
    engine.reset();
    poller.join();
  }
  Engine busy(toy::small());
  for (uint64_t id = 1; id <= 10; ++id) busy.submit(request(id, 20, 100));
}

TEST(Engine, AStepThatThrowsEndsItsRequestsWithAnError) {
  std::atomic<int> steps = 0;
  Engine engine(toy::small(), [&](const ts_batch &) {
    if (++steps == 3) throw std::runtime_error("the device said no");
  });
  engine.submit(request(1, 4, 10));
  engine.collect(1);
  EXPECT_EQ(engine.results[1].finish, TS_FINISH_ERROR);
  EXPECT_EQ(engine.results[1].message, "the step failed: the device said no");
  EXPECT_EQ(engine.results[1].tokens.size(), 2);
  engine.submit(request(2, 4, 10));
  engine.collect(1);
  engine.expect_solo(request(2, 4, 10));
}

// Whatever allocation of the step thread fails, and if the next ones, on the way out, fail too: requests end with an error
// or as they should, and the engine goes on.
TEST(Engine, OutOfMemoryAnywhereEndsRequestsAndNotTheProcess) {
  if (!allocations::kReplaced) GTEST_SKIP() << "a sanitizer has its own operator new";
  std::set<std::string> said;
  for (const int num_to_fail : {1, 2, 5}) {
    for (int num_to_pass = 0; num_to_pass < 40; ++num_to_pass) {
      std::latch begun(1), submitted(1);
      std::atomic<bool> calm = false;
      int steps = 0;
      Engine engine(toy::small(), [&](const ts_batch &) {
        ++steps;
        if (steps == 1) begun.count_down();
        submitted.wait();
        if (steps == 4) allocations::num_to_pass = num_to_pass;
        if (steps == 4) allocations::num_to_fail = num_to_fail;
        if (calm) allocations::num_to_fail = 0;
      });
      engine.submit(request(5, 4, 1));  // while its step runs the others come, and so begin together
      begun.wait();
      toy::Request first = request(1, 4, 10);
      first.num_logprobs = 2;
      engine.submit(first);
      engine.submit(request(2, 4, 10));
      submitted.count_down();
      engine.collect(3);
      for (const uint64_t id : {1, 2}) {
        if (engine.results[id].finish == TS_FINISH_ERROR) {
          const std::string &message = engine.results[id].message;
          EXPECT_NE(message.find(": std::bad_alloc"), std::string::npos) << message;
          said.insert(message.substr(0, message.find(':')));
        } else {
          engine.expect_solo(request(id, 4, 10));
        }
      }
      calm = true;
      engine.submit(request(3, 4, 10));  // the first step makes it calm
      engine.collect(1);
      engine.submit(request(4, 4, 10));
      engine.collect(1);
      engine.expect_solo(request(4, 4, 10));
      EXPECT_EQ(engine.stats().num_finished, 5);
    }
  }
  EXPECT_EQ(said, (std::set<std::string>{"sampling failed", "the engine had to start over", "the step failed"}));
}

TEST(Engine, GuessesAheadAndSaysTheSameInFewerSteps) {
  uint64_t num_steps[2];
  for (const int32_t max_draft : {0, 8}) {
    EngineOptions o = toy::small();
    o.scheduler.max_draft = max_draft;
    Engine engine(o);
    toy::Request r = request(1, 4, 60);
    r.logit_bias = {{7, 30}};  // the same token again and again
    r.num_logprobs = 3;
    engine.submit(r);
    engine.collect(1);
    engine.expect_solo(r);
    EXPECT_EQ(engine.tops[1].size(), 60);
    const ts_stats s = engine.stats();
    EXPECT_EQ(s.num_output_tokens, 60);
    EXPECT_EQ(s.num_accepted_tokens > 0, max_draft > 0);
    EXPECT_LE(s.num_accepted_tokens, s.num_drafted_tokens);
    num_steps[max_draft > 0] = s.num_steps;
  }
  EXPECT_EQ(num_steps[0], 60);
  EXPECT_LT(num_steps[1], 20);
}

TEST(Engine, NanLogitsEndOneRequest) {
  Engine engine(toy::small());
  toy::Request poisoned = request(1, 9, 10);
  poisoned.prompt[5] = toy::kPoison;
  engine.submit(poisoned);
  engine.submit(request(2, 9, 10));
  engine.collect(2);
  EXPECT_EQ(engine.results[1].finish, TS_FINISH_ERROR);
  EXPECT_NE(engine.results[1].message.find("not finite"), std::string::npos);
  EXPECT_TRUE(engine.results[1].tokens.empty());
  engine.expect_solo(request(2, 9, 10));
}

TEST(Engine, APollerThatStopsHoldsUpTheEngineAndNotItsMemory) {
  EngineOptions o = toy::small();
  o.max_events = 16;
  Engine engine(o);
  engine.submit(request(1, 4, 120));
  std::this_thread::sleep_for(50ms);
  EXPECT_LE(engine.stats().num_output_tokens, 17);
  engine.collect(1);
  engine.expect_solo(request(1, 4, 120));
}

TEST(Engine, SleepsWhenThereIsNothingToDo) {
  Engine engine(toy::small());
  engine.submit(request(1, 4, 4));
  engine.collect(1);
  const auto cpu_ms = [] { return static_cast<double>(std::clock()) * 1000 / CLOCKS_PER_SEC; };
  const uint64_t steps = engine.stats().num_steps;
  const double before = cpu_ms();
  std::this_thread::sleep_for(100ms);
  EXPECT_LT(cpu_ms() - before, 20);
  EXPECT_EQ(engine.stats().num_steps, steps);
  ts_event event;
  EXPECT_EQ(engine.core->poll(&event, 1, 1), 0) << "a time-out";
  EXPECT_EQ(engine.core->poll(&event, 0, 0), 0);
}

}  // namespace
}  // namespace ts
