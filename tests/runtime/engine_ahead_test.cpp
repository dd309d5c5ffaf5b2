// The engine, with a step scheduled while the one before it runs.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <stdexcept>
#include <thread>
#include <vector>

#include "engine_core.h"
#include "toy.h"

namespace ts {
namespace {

using toy::request;

EngineOptions ahead() {
  EngineOptions o = toy::small();
  o.scheduler.ahead = true;
  return o;
}

/// The engine around the toy's model; `hook` is called before each step, by the thread that runs it.
class Engine {
 public:
  explicit Engine(const EngineOptions &options, std::function<void(Engine &engine, int step)> hook = {})
      : options(options), model_(options), core(options, [this, hook = std::move(hook)](const ts_batch &batch) {
          while (!ready_) std::this_thread::yield();
          if (hook) hook(*this, ++num_steps_);
          return model_.run(batch);
        }) {
    ready_ = true;
  }

  void collect(size_t num_finished) {
    std::vector<ts_event> events(16);
    for (int32_t n = 0; num_finished > 0 && n >= 0;) {
      n = core.poll(events.data(), 16, 10000);
      ASSERT_NE(n, 0) << "nothing happens any more";
      for (int32_t i = 0; i < n; ++i) {
        const ts_event &e = events[static_cast<size_t>(i)];
        toy::Result &result = results[e.id];
        if (e.kind == TS_EVENT_TOKEN) result.tokens.push_back(e.token);
        if (e.kind != TS_EVENT_FINISHED) continue;
        result.finish = static_cast<ts_finish>(e.finish);
        result.message = e.message;
        --num_finished;
      }
    }
  }

  void expect_solo(const toy::Request &r) {
    const toy::Result expected = toy::solo(r, options);
    EXPECT_EQ(results[r.id].tokens, expected.tokens) << "request " << r.id;
    EXPECT_EQ(results[r.id].finish, expected.finish) << "request " << r.id;
  }

  ts_stats stats() const {
    ts_stats s{};
    core.stats(s);
    return s;
  }

  /// Whether that comes to be while a step runs.
  template <class Condition>
  bool sees(const Condition &condition) const {
    for (int i = 0; i < 10000 && !condition(stats()); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return condition(stats());
  }

  EngineOptions options;
  std::map<uint64_t, toy::Result> results;

 private:
  toy::Model model_;
  std::atomic<bool> ready_ = false;
  int num_steps_ = 0;

 public:
  EngineCore core;  // last: its threads use the rest
};

TEST(EngineAhead, WhoComesWhileAStepRunsIsAdmittedBeforeItEnds) {
  bool admitted = false;
  Engine engine(ahead(), [&](Engine &e, int step) {
    if (step != 3) return;
    // The turn behind this step may be over already: then the next one takes it in.
    e.core.submit(request(2, 6, 10).abi());
    e.core.submit(request(3, 6, 10).abi());
  });
  Engine waiting(ahead(), [&](Engine &e, int step) {
    if (step == 1) e.core.submit(request(2, 6, 10).abi());
    if (step == 2) admitted = e.sees([](const ts_stats &s) { return s.num_waiting == 0 && s.num_running == 2; });
  });
  for (Engine *e : {&engine, &waiting}) {
    e->core.submit(request(1, 6, 10).abi());
    e->collect(e == &engine ? 3 : 2);
    for (uint64_t id = 1; id <= (e == &engine ? 3U : 2U); ++id) e->expect_solo(request(id, 6, 10));
  }
  EXPECT_TRUE(admitted) << "the third step was scheduled while the second ran";
}

TEST(EngineAhead, AStepThatThrowsEndsItsRequestsAndNoOthers) {
  Engine engine(ahead(), [](Engine &e, int step) {
    if (step == 4) e.core.submit(request(3, 6, 10).abi());
    if (step == 5) throw std::runtime_error("a kernel is broken");
  });
  engine.core.submit(request(1, 6, 30).abi());
  engine.collect(2);
  EXPECT_EQ(engine.results[1].message, "the step failed: a kernel is broken");
  if (engine.results[3].finish != TS_FINISH_ERROR) engine.expect_solo(request(3, 6, 10));
  engine.core.submit(request(4, 6, 10).abi());
  engine.collect(1);
  engine.expect_solo(request(4, 6, 10));
  EXPECT_EQ(engine.stats().num_pages_free + engine.stats().num_pages_cached, engine.options.scheduler.num_pages);
}

TEST(EngineAhead, AnEngineIsClosedAndAbandonedWhileStepsRun) {
  for (const bool abandoned : {false, true}) {
    Engine engine(ahead(), [abandoned](Engine &e, int step) {
      if (step == 5) abandoned ? e.core.abandon("rank 1 is gone") : e.core.close();
    });
    for (uint64_t id = 1; id <= 8; ++id) engine.core.submit(request(id, 6, 100).abi());
    engine.collect(SIZE_MAX);
    for (uint64_t id = 1; id <= 8; ++id) {
      EXPECT_EQ(engine.results[id].finish, abandoned ? TS_FINISH_ERROR : TS_FINISH_CANCELLED);
      EXPECT_EQ(engine.results[id].message, abandoned ? "rank 1 is gone" : "");
    }
  }
}

}  // namespace
}  // namespace ts
