// Runs of the real engine around the toy model, written down and repeated.
#include "recording.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <stdexcept>
#include <thread>

#include "allocations.h"
#include "engine_core.h"
#include "expect.h"
#include "toy.h"
#include "toy_run.h"

namespace ts {
namespace {

using namespace ts::testing;  // NOLINT(google-build-using-namespace): helpers of these tests
using namespace std::chrono_literals;
using toy::kPlan;
using toy::recording;
using toy::replaying;
using toy::ToyRun;

EngineOptions roomless() {
  EngineOptions o = toy::small();
  o.scheduler.num_pages = 40;
  o.scheduler.max_draft = 4;
  return o;
}

toy::Request request(uint64_t id) {
  toy::Request r =
      toy::request(id, static_cast<int32_t>(1 + id * 7 % 60), static_cast<int32_t>(8 + id % 40), id % 3 + 1);
  if (id % 4 == 1) r.top_k = 7, r.top_p = 0.9F;
  if (id % 5 == 2) r.presence_penalty = 0.5F, r.logit_bias = {{9, 2.0F}};
  if (id % 8 == 3) r.logit_bias = {{9, 100}};  // repeats itself
  if (id % 6 == 0) r.ignore_eos = 0, r.stop = {11, 12};
  if (id % 7 == 0) r.cache_salt = "a secret of " + std::to_string(id % 2);
  if (id % 3 == 0) r.session = id % 2 + 1, r.lease_ms = 1000;
  r.tenant = id % 4;
  r.priority = static_cast<int32_t>(id % 3) - 1;
  return r;
}

/// Replays to the end. Returns how it differs.
std::string difference(const std::string &file, const EngineOptions &options, int32_t shift = 0) {
  ToyRun run(options, replaying(file), {}, shift);
  run.collect(SIZE_MAX);
  EXPECT_TRUE(run.core.failure().empty() || run.core.failure_status() == TS_DIFFERS) << run.core.failure();
  return run.core.failure();
}

std::string bytes_of(const std::string &file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

void write(const std::string &file, const std::string &bytes) {
  std::ofstream(file, std::ios::binary | std::ios::trunc) << bytes;
}

/// Whatever can happen to requests, most of it at a known step.
void eventful(uint64_t step, EngineCore &core) {
  constexpr uint64_t kRequests = 48;
  if (step < kRequests) core.submit(request(step + 1).abi());
  if (step % 9 == 4) core.cancel(step / 2);
  if (step == 20) {
    toy::Request late = request(100);
    late.timeout_ms = 1;
    late.max_tokens = 60;
    core.submit(late.abi());
  }
  if (step == 22) std::this_thread::sleep_for(5ms);
  if (step == 30) throw std::runtime_error("a kernel is broken");
  if (step == 40) throw std::bad_alloc();
}

class Recording : public ::testing::Test {
 protected:
  void record(const ToyRun::Hook &hook, size_t num_requests, const EngineOptions &options = roomless()) {
    ToyRun run(options, recording(file_), hook);
    run.core.submit(request(1).abi());
    run.collect(num_requests);
    run.core.close();
    run.collect(SIZE_MAX);
    tokens_ = run.tokens;
    finishes_ = run.finishes;
    stats_ = run.stats();
  }

  void record_requests(uint64_t num) {
    record(
        [num](uint64_t step, EngineCore &core) {
          if (step < num) core.submit(request(step + 1).abi());
        },
        num);
  }

  Folder folder_;
  std::string file_ = folder_ / "run.trace";
  std::map<uint64_t, std::vector<int32_t>> tokens_;
  std::map<uint64_t, int32_t> finishes_;
  ts_stats stats_{};
};

TEST_F(Recording, SoIsOneOfSeveralCacheGroups) {
  EngineOptions options = roomless();
  options.scheduler.groups = {{}, {CacheGroup::Kind::window, 12}, {CacheGroup::Kind::recurrent}};
  options.scheduler.num_pages = 80;
  record(eventful, 49, options);
  EXPECT_EQ(difference(file_, options), "");
  options.scheduler.groups[1].window = 30;  // other pages, and other tokens
  EXPECT_NE(difference(file_, options), "");
}

TEST_F(Recording, SoIsOneWhoseStepsAreScheduledAhead) {
  EngineOptions options = roomless();
  options.scheduler.max_draft = 0;
  options.scheduler.ahead = true;
  record(eventful, 49, options);
  EXPECT_EQ(difference(file_, options), "");
  EXPECT_GT(stats_.num_preemptions, 0);
  options.scheduler.num_pages = 30;
  expect_in(difference(file_, options), {"step ", " differs: "});
}

TEST_F(Recording, AnEventfulRunIsTheSameAgain) {
  record(eventful, 49);
  std::map<int32_t, int> ends;
  for (const auto &[id, finish] : finishes_) ++ends[finish];
  EXPECT_GT(ends[TS_FINISH_LENGTH], 0);
  EXPECT_GT(ends[TS_FINISH_CANCELLED], 0);
  EXPECT_EQ(ends[TS_FINISH_TIMEOUT], 1);
  EXPECT_GT(ends[TS_FINISH_ERROR], 1);
  EXPECT_GT(stats_.num_preemptions, 0);
  EXPECT_GT(stats_.num_accepted_tokens, 0);
  EXPECT_GT(stats_.num_cached_tokens, 0);

  ToyRun again(roomless(), replaying(file_));
  again.collect(SIZE_MAX);
  EXPECT_EQ(again.core.failure(), "");
  EXPECT_EQ(again.finishes, finishes_);
  EXPECT_EQ(again.tokens, tokens_);
  EXPECT_EQ(again.stats().num_steps, stats_.num_steps);
  EXPECT_EQ(again.stats().num_preemptions, stats_.num_preemptions);
  EXPECT_EQ(again.core.tape().replay->num_requests(), 49);
  EXPECT_EQ(again.core.tape().replay->num_bytes_cut_off(), 0);
}

TEST_F(Recording, WhatStepsTookDecidesAgain) {
  EngineOptions o = toy::small();
  o.scheduler.cost = StepCost({{1, 1000}, {32, 32000}}, 0, 0);
  o.scheduler.target_step_ns = 200'000;
  {
    ToyRun run(o, recording(file_), [](uint64_t step, EngineCore &core) {
      if (step <= 20) core.submit(request(step + 1).abi());
      std::this_thread::sleep_for(std::chrono::microseconds(step % 7 * 20));
    });
    run.core.submit(request(1).abi());
    run.collect(21);
  }
  EXPECT_EQ(difference(file_, o), "");
  // However long steps took here, the target was met by some other chunks than no target would give, or an impossible one.
  std::string differs;
  for (const int64_t target : {int64_t{1}, int64_t{1} << 60}) {
    o.scheduler.target_step_ns = target;
    if (differs.empty()) differs = difference(file_, o);
  }
  expect_in(differs, {"step ", " differs: the trace has ", " tokens, this run "});
}

TEST_F(Recording, SaysWhatDiffersFirst) {
  record_requests(5);
  EngineOptions other = roomless();
  other.scheduler.max_seqs = 1;
  expect_in(difference(file_, other), {"step ", " differs: the trace has ", " sequences, this run 1"});
  other = roomless();
  other.scheduler.num_owners = 1;
  other.scheduler.max_draft = 0;
  expect_in(difference(file_, other), {" differs: "});
  expect_in(difference(file_, roomless(), 1), {"output token 0 of request 1 differs: it was ", " and is "});
  EXPECT_EQ(difference(file_, roomless()), "");
}

TEST_F(Recording, BelongsToItsUserAndItsPlan) {
  record({}, 1);
  struct stat status{};
  ASSERT_EQ(stat(file_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0600);
  expect_in(refusal([&] { TraceWriter again(file_); }, TS_IO), {file_.c_str(), "is there already"});
  TraceReader reader(file_);
  expect_in(refusal([&] { read_header(reader, {9}); }, TS_BAD_REQUEST), {"another plan", "010203", "0900"});
}

TEST_F(Recording, HasNoSaltInIt) {
  toy::Request r = request(7);
  r.cache_salt = "a salt that nobody may read";
  {
    ToyRun run(toy::small(), recording(file_));
    run.core.submit(r.abi());
    run.collect(1);
  }
  EXPECT_EQ(bytes_of(file_).find("nobody may"), std::string::npos);
  EXPECT_EQ(difference(file_, toy::small()), "");
}

TEST_F(Recording, AChangedByteIsNoticed) {
  record_requests(3);
  const std::string whole = bytes_of(file_);
  const std::string other = folder_ / "other.trace";
  for (size_t at = 0; at < whole.size(); ++at) {
    std::string changed = whole;
    changed[at] = static_cast<char>(changed[at] ^ (1 << at % 8));
    write(other, changed);
    const std::string said = refusal(
        [&] {
          TraceReader reader(other);
          while (reader.next()) {
          }
        },
        TS_BAD_REQUEST);
    ASSERT_NE(said.find("is damaged"), std::string::npos) << "byte " << at << ": " << said;
  }
  expect_in(refusal([&] { read_header(*std::make_unique<TraceReader>("/proc/self/status"), kPlan); }, TS_BAD_REQUEST),
            {"is no trace"});
}

TEST_F(Recording, DamageEndsTheReplayAndIsTold) {
  record_requests(9);
  std::string changed = bytes_of(file_);
  changed[changed.size() / 2] ^= 4;
  write(file_, changed);
  ToyRun run(roomless(), replaying(file_));
  run.collect(SIZE_MAX);
  EXPECT_EQ(run.core.failure_status(), TS_BAD_REQUEST);
  expect_in(run.core.failure(), {"is damaged", "the record at byte "});
  EXPECT_GT(run.stats().num_steps, 0);
}

TEST_F(Recording, ATornEndIsLeftOut) {
  record_requests(3);
  const std::string whole = bytes_of(file_);
  const std::string other = folder_ / "other.trace";
  size_t num_torn = 0;
  for (size_t size = 0; size <= whole.size(); ++size) {
    write(other, whole.substr(0, size));
    TraceReader reader(other);
    size_t num_bytes = 0;
    while (reader.next()) num_bytes += (reader.words().size() + 7) * sizeof(int32_t);
    ASSERT_EQ(num_bytes + reader.num_bytes_cut_off(), size);
    num_torn += reader.num_bytes_cut_off() > 0 ? 1 : 0;
  }
  EXPECT_GT(num_torn, whole.size() / 2);
  for (size_t size = whole.size(); size > whole.size() - 600; size -= 13) {
    write(other, whole.substr(0, size));
    ASSERT_EQ(difference(other, roomless()), "") << "of " << whole.size() << " bytes the first " << size;
  }
}

/// The process dies in the middle of its work: all that it did is there.
TEST_F(Recording, SurvivesItsProcess) {
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ToyRun run(roomless(), recording(file_),
               [](uint64_t step, EngineCore &core) { core.submit(request(step + 1).abi()); });
    run.core.submit(request(1).abi());
    run.collect(SIZE_MAX);
    _exit(1);
  }
  const auto size = [this] {
    std::error_code none;
    const auto bytes = std::filesystem::file_size(file_, none);
    return none ? 0 : bytes;
  };
  while (size() < 100'000) std::this_thread::sleep_for(1ms);
  kill(child, SIGKILL);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status)) << "it ended by itself";
  ToyRun again(roomless(), replaying(file_));
  again.collect(SIZE_MAX);
  EXPECT_EQ(again.core.failure(), "");
  EXPECT_GT(again.stats().num_steps, 50);
  EXPECT_GT(again.core.tape().replay->num_output_tokens(), 200);
}

TEST_F(Recording, AnEngineThatStartedOverIsTheSameAgain) {
  if (!allocations::kReplaced) GTEST_SKIP() << "a sanitizer has its own operator new";
  int num_restarts = 0;
  for (int pass = 0; pass < 120; ++pass) {
    const std::string file = folder_ / std::to_string(pass);
    EngineOptions options = roomless();
    options.scheduler.ahead = pass % 2 == 1;
    if (options.scheduler.ahead) options.scheduler.max_draft = 0;
    std::map<uint64_t, int32_t> finishes;
    {
      ToyRun run(options, recording(file), [](uint64_t step, EngineCore &core) {
        if (step < 10) core.submit(request(step + 1).abi());
      });
      run.on_sample = [pass](uint64_t step) {
        if (step != 10) return;
        allocations::num_to_pass = pass / 2;
        allocations::num_to_fail = 1;
      };
      run.core.submit(request(1).abi());
      run.collect(10);
      finishes = run.finishes;
      num_restarts += run.message.find("start over") != std::string::npos ? 1 : 0;
    }
    ToyRun again(options, replaying(file));
    again.collect(SIZE_MAX);
    ASSERT_EQ(again.core.failure(), "") << pass;
    ASSERT_EQ(again.finishes, finishes) << pass;
  }
  EXPECT_GT(num_restarts, 10);
}

TEST_F(Recording, TheRunGoesOnWithoutItsTrace) {
  const auto old_handler = signal(SIGXFSZ, SIG_IGN);
  rlimit old_limit{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  const rlimit small = {20'000, old_limit.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  {
    ToyRun run(roomless(), recording(file_), [](uint64_t step, EngineCore &core) {
      if (step < 200) core.submit(request(step + 1).abi());
    });
    run.core.submit(request(1).abi());
    run.collect(200);
    EXPECT_EQ(run.finishes.size(), 200);
    expect_in(run.core.recording_failure(), {file_.c_str(), "cannot be written any more: File too large"});
  }
  setrlimit(RLIMIT_FSIZE, &old_limit);
  signal(SIGXFSZ, old_handler);
  EXPECT_EQ(difference(file_, roomless()), "");
}

}  // namespace
}  // namespace ts
