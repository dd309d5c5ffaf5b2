// The engine part of the C ABI, over a plan with the tests' own kernels.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine.h"
#include "expect.h"
#include "host.h"
#include "make_plan.h"

namespace ts {
namespace {

using namespace ts::testing;  // NOLINT(google-build-using-namespace): helpers of these tests

ts_engine_options options() {
  ts_engine_options o{};
  o.size = sizeof(o);
  o.event_size = sizeof(ts_event);
  o.num_threads = 2;
  o.num_pages = 12;
  o.prefix_cache = 1;
  return o;
}

ts_request request(uint64_t id, const std::vector<int32_t> &prompt, int32_t max_tokens) {
  ts_request r{};
  r.size = sizeof(r);
  r.id = id;
  r.prompt = prompt.data();
  r.num_prompt = static_cast<int32_t>(prompt.size());
  r.max_tokens = max_tokens;
  r.top_p = 1;
  r.repetition_penalty = 1;
  r.ignore_eos = 1;
  r.num_logprobs = 2;
  return r;
}

class EngineAbi : public ::testing::Test {
 protected:
  EngineAbi() {
    write_file(folder_ / "plan.tsp", test_plan(host_targets().at(0), read_file(TS_TEST_KERNELS)).bytes());
    EXPECT_EQ(ts_plan_open((folder_ / "plan.tsp").c_str(), TS_VERIFY_AUTO, &plan, &error), TS_OK) << error.message;
  }
  ~EngineAbi() override {
    ts_engine_close(engine);
    ts_plan_close(plan);
  }

  Folder folder_;

 public:
  ts_plan *plan = nullptr;
  ts_engine *engine = nullptr;
  ts_error error{};
};

TEST_F(EngineAbi, ServesAndCounts) {
  ts_engine_options o = options();
  ASSERT_EQ(ts_engine_open(plan, &o, &engine, &error), TS_OK) << error.message;
  const std::vector<int32_t> prompt = {5, 6, 7, 8, 9, 10};
  for (uint64_t id = 1; id <= 6; ++id) {
    const ts_request r = request(id, prompt, 40);
    ASSERT_EQ(ts_engine_submit(engine, &r, &error), TS_OK) << error.message;
  }
  ts_engine_cancel(engine, 4);
  std::map<uint64_t, int> num_tokens;
  std::map<uint64_t, int> ends;
  std::vector<ts_event> events(3);
  while (ends.size() < 6) {
    const int32_t n = ts_engine_poll(engine, events.data(), 3, 30000);
    ASSERT_GT(n, 0);
    for (int32_t i = 0; i < n; ++i) {
      const ts_event &e = events[static_cast<size_t>(i)];
      if (e.kind == TS_EVENT_FINISHED) {
        if (e.id != 4 || num_tokens[4] == 40) {  // it may have been done before it was cancelled
          EXPECT_EQ(e.finish, TS_FINISH_LENGTH) << e.message;
        } else {
          EXPECT_EQ(e.finish, TS_FINISH_CANCELLED) << e.message;
        }
        ++ends[e.id];
        continue;
      }
      ++num_tokens[e.id];
      ASSERT_EQ(e.num_top, 2);
      EXPECT_EQ(e.top_tokens[0], e.token);
      EXPECT_EQ(e.top_logprobs[0], e.logprob);
      EXPECT_LE(e.top_logprobs[1], e.logprob);
    }
  }
  for (uint64_t id = 1; id <= 6; ++id) {
    EXPECT_EQ(ends[id], 1);
    if (id != 4) {
      EXPECT_EQ(num_tokens[id], 40);
    }
  }
  ts_stats stats{};
  stats.size = sizeof(stats);
  ts_engine_stats(engine, &stats);
  EXPECT_EQ(stats.size, sizeof(stats));
  EXPECT_EQ(stats.num_finished, 6);
  EXPECT_EQ(stats.num_pages, 12);
  EXPECT_EQ(stats.num_pages_free + stats.num_pages_cached, 12);
  EXPECT_EQ(stats.num_threads, 2);
  EXPECT_EQ(stats.page_size, kPageSize);
  EXPECT_EQ(stats.token_budget, kMaxTokens);
  EXPECT_EQ(stats.max_seqs, kMaxSeqs);
  EXPECT_EQ(std::string(stats.target), host_targets().at(0));
}

TEST_F(EngineAbi, StatsOfAnOlderCallerAreCutToItsSize) {
  ts_engine_options o = options();
  ASSERT_EQ(ts_engine_open(plan, &o, &engine, &error), TS_OK) << error.message;
  ts_stats stats{};
  std::memset(&stats, 0x55, sizeof(stats));
  stats.size = offsetof(ts_stats, num_pages_free);
  ts_engine_stats(engine, &stats);
  EXPECT_EQ(stats.num_pages, 12);
  EXPECT_EQ(stats.num_pages_free, 0x55555555);
}

TEST_F(EngineAbi, RefusesOptionsWithBothNumbers) {
  const auto refusal = [&](auto change, ts_status status = TS_BAD_REQUEST) {
    ts_engine_options o = options();
    change(o);
    EXPECT_EQ(ts_engine_open(plan, &o, &engine, &error), status);
    EXPECT_EQ(engine, nullptr);
    return std::string(error.message);
  };
  EXPECT_EQ(refusal([](auto &o) { o.size = 4; }),
            "ts_engine_options.size is 4, this engine's is " + std::to_string(sizeof(ts_engine_options)));
  expect_in(refusal([](auto &o) { o.event_size = 64; }), {"event_size is 64, but this engine's ts_event has "});
  EXPECT_EQ(refusal([](auto &o) { o.num_threads = -1; }), "num_threads is -1, wanted 0 (the default) or more");
  EXPECT_EQ(refusal([](auto &o) { o.kv_bytes = -5; }), "kv_bytes is -5, wanted 0 (the default) or more");
  const char *drafts = ", wanted 0 (none) to 16, or the negative of that, for drafts at any cost";
  EXPECT_EQ(refusal([](auto &o) { o.max_draft = 17; }), std::string("max_draft is 17") + drafts);
  EXPECT_EQ(refusal([](auto &o) { o.max_draft = -17; }), std::string("max_draft is -17") + drafts);
  EXPECT_EQ(refusal([](auto &o) { o.prefix_cache = 2; }), "prefix_cache is 2, wanted 0 (off) or 1 (on)");
  EXPECT_EQ(
      refusal([](auto &o) { o.token_budget = 25; }),
      "token_budget is 25, but the plan was arranged for at most 24: lower it, or build the plan with a larger limit");
  EXPECT_EQ(refusal([](auto &o) { o.max_seqs = 5; }),
            "max_seqs is 5, but the plan was arranged for at most 4: lower it, or build the plan with a larger limit");
  expect_in(refusal([](auto &o) { o.target = "cpu-none"; }, TS_NO_TARGET), {"cpu-none"});
}

TEST_F(EngineAbi, AShutdownLetsThePollThreadFinish) {
  const ts_engine_options o = options();
  ASSERT_EQ(ts_engine_open(plan, &o, &engine, &error), TS_OK) << error.message;
  int num_finished = 0;
  std::thread poller([&] {
    std::vector<ts_event> events(4);
    for (int32_t n = 0; n >= 0; n = ts_engine_poll(engine, events.data(), 4, -1)) {
      for (int32_t i = 0; i < n; ++i) num_finished += events[static_cast<size_t>(i)].kind == TS_EVENT_FINISHED ? 1 : 0;
    }
  });
  const std::vector<int32_t> prompt = {5, 6, 7};
  const ts_request r = request(1, prompt, 20);
  EXPECT_EQ(ts_engine_submit(engine, &r, &error), TS_OK) << error.message;
  ts_engine_shutdown(engine);
  ts_engine_shutdown(engine);
  poller.join();
  EXPECT_EQ(num_finished, 1);
  EXPECT_EQ(ts_engine_submit(engine, &r, &error), TS_CLOSED);
}

TEST_F(EngineAbi, NullsAreRefusedOrIgnored) {
  ts_engine_options o = options();
  EXPECT_EQ(ts_engine_open(nullptr, &o, &engine, &error), TS_BAD_REQUEST);
  EXPECT_EQ(ts_engine_open(plan, nullptr, &engine, &error), TS_BAD_REQUEST);
  EXPECT_EQ(ts_engine_open(plan, &o, nullptr, nullptr), TS_BAD_REQUEST);
  EXPECT_EQ(ts_engine_submit(nullptr, nullptr, &error), TS_BAD_REQUEST);
  EXPECT_EQ(ts_engine_poll(nullptr, nullptr, 1, 0), -1);
  ts_engine_cancel(nullptr, 1);
  ts_engine_shutdown(nullptr);
  ts_engine_stats(nullptr, nullptr);
  ts_engine_close(nullptr);
}

TEST_F(EngineAbi, RequestsThatCanNeverFitAreRefused) {
  ts_engine_options o = options();
  o.num_pages = 2;
  ASSERT_EQ(ts_engine_open(plan, &o, &engine, &error), TS_OK) << error.message;
  const std::vector<int32_t> prompt = {5, 6, 7};
  const ts_request r = request(1, prompt, 64);
  EXPECT_EQ(ts_engine_submit(engine, &r, &error), TS_BAD_REQUEST);
  expect_in(error.message, {"need 3 KV pages of 32 tokens, but the engine has 2"});
}

// ---- several ranks ----

class RanksAbi : public ::testing::Test {
 protected:
  RanksAbi() {
    write_file(folder_ / "plan.tsp",
               test_plan_of_ranks(tp(2), host_targets().at(0), read_file(TS_TEST_KERNELS)).bytes());
    EXPECT_EQ(ts_plan_open((folder_ / "plan.tsp").c_str(), TS_VERIFY_AUTO, &plan_, &error_), TS_OK) << error_.message;
    options_ = options();
    options_.num_threads = 1;
    options_.rendezvous = name_.c_str();
    follower_ = fork();
    if (follower_ == 0) {
      options_.rank = 1;
      _exit(ts_rank_run(plan_, &options_, &error_));
    }
    pids_[1] = follower_;
    options_.rank_pids = pids_;
  }
  ~RanksAbi() override {
    ts_engine_close(engine_);
    ts_plan_close(plan_);
    if (follower_ > 0) {
      kill(follower_, SIGKILL);
      waitpid(follower_, nullptr, 0);
    }
  }
  int exit_of_follower() {
    int status = 0;
    waitpid(std::exchange(follower_, -1), &status, 0);
    return status;
  }

  Folder folder_;
  std::string name_ = "abi-" + std::to_string(getpid());
  ts_plan *plan_ = nullptr;
  ts_engine *engine_ = nullptr;
  ts_error error_{};
  ts_engine_options options_{};
  pid_t follower_ = 0;
  int32_t pids_[2] = {0, 0};
  const std::vector<int32_t> prompt_ = {5, 6, 7, 8};
};

TEST_F(RanksAbi, ServeAndEnd) {
  EXPECT_EQ(ts_plan_num_ranks(plan_), 2);
  ASSERT_EQ(ts_engine_open(plan_, &options_, &engine_, &error_), TS_OK) << error_.message;
  EXPECT_EQ(ts_engine_failure(engine_, &error_), TS_OK);
  const ts_request r = request(7, prompt_, 30);
  ASSERT_EQ(ts_engine_submit(engine_, &r, &error_), TS_OK) << error_.message;
  std::vector<ts_event> events(64);
  bool finished = false;
  for (int num_tokens = 0; !finished;) {
    const int32_t n = ts_engine_poll(engine_, events.data(), 64, 30000);
    ASSERT_GT(n, 0);
    for (int32_t i = 0; i < n; ++i) {
      finished = events[static_cast<size_t>(i)].kind == TS_EVENT_FINISHED;
      num_tokens += finished ? 0 : 1;
    }
    if (finished) {
      EXPECT_EQ(num_tokens, 30);
    }
  }
  ts_engine_shutdown(engine_);
  EXPECT_EQ(ts_engine_poll(engine_, events.data(), 64, 30000), -1);
  EXPECT_EQ(exit_of_follower(), 0);  // though the engine is still there
}

TEST_F(RanksAbi, FailRequestsWhenOneDies) {
  ASSERT_EQ(ts_engine_open(plan_, &options_, &engine_, &error_), TS_OK) << error_.message;
  const std::string died = "rank 1 (process " + std::to_string(follower_) + ") died";
  kill(follower_, SIGSTOP);               // so that nothing is done before it dies
  for (uint64_t id = 1; id <= 9; ++id) {  // more than run at once
    const ts_request r = request(id, prompt_, 120);
    ASSERT_EQ(ts_engine_submit(engine_, &r, &error_), TS_OK) << error_.message;
  }
  kill(follower_, SIGKILL);
  std::vector<ts_event> events(16);
  int num_ends = 0, num_failed = 0;
  for (int32_t n = 0; (n = ts_engine_poll(engine_, events.data(), 16, 30000)) >= 0;) {
    ASSERT_GT(n, 0);
    for (int32_t i = 0; i < n; ++i) {
      const ts_event &e = events[static_cast<size_t>(i)];
      if (e.kind != TS_EVENT_FINISHED) continue;
      ++num_ends;
      if (e.finish != TS_FINISH_ERROR) continue;
      ++num_failed;
      expect_in(e.message, {died.c_str()});
    }
  }
  EXPECT_EQ(num_ends, 9);
  EXPECT_EQ(num_failed, 9);
  EXPECT_EQ(ts_engine_failure(engine_, &error_), TS_LOST_RANK);
  EXPECT_EQ(error_.message, died);
  const ts_request late = request(100, prompt_, 1);
  EXPECT_EQ(ts_engine_submit(engine_, &late, &error_), TS_LOST_RANK);
  EXPECT_EQ(error_.message, died);
}

TEST_F(RanksAbi, TellAnIdleEngine) {
  ASSERT_EQ(ts_engine_open(plan_, &options_, &engine_, &error_), TS_OK) << error_.message;
  kill(follower_, SIGKILL);
  ts_event event{};
  EXPECT_EQ(ts_engine_poll(engine_, &event, 1, 30000), -1);
  EXPECT_EQ(ts_engine_failure(engine_, &error_), TS_LOST_RANK);
}

TEST_F(RanksAbi, HaveTheirOwnCalls) {
  ts_engine_options wrong = options_;
  wrong.rank = 1;
  EXPECT_EQ(ts_engine_open(plan_, &wrong, &engine_, &error_), TS_BAD_REQUEST);
  expect_in(error_.message, {"rank 1 does not serve", "ts_rank_run"});
  EXPECT_EQ(ts_rank_run(plan_, &options_, &error_), TS_BAD_REQUEST);
  expect_in(error_.message, {"ts_engine_open"});
  wrong.rank = 2;
  EXPECT_EQ(ts_rank_run(plan_, &wrong, &error_), TS_BAD_REQUEST);
  expect_in(error_.message, {"rank is 2, the plan is for 2 (tp=2)"});
  wrong.rank = -1;
  EXPECT_EQ(ts_rank_run(plan_, &wrong, &error_), TS_BAD_REQUEST);
  wrong = options_;
  wrong.rank_timeout_ms = -1;
  EXPECT_EQ(ts_engine_open(plan_, &wrong, &engine_, &error_), TS_BAD_REQUEST);
  expect_in(error_.message, {"rank_timeout_ms is -1"});
  EXPECT_EQ(ts_engine_failure(nullptr, &error_), TS_BAD_REQUEST);
  EXPECT_EQ(ts_plan_num_ranks(nullptr), 0);
}

}  // namespace
}  // namespace ts
