// Several ranks: that they meet, compute what one computes, and that whatever happens to one of them is told and ends the others.
#include "ranks.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "executor.h"
#include "expect.h"
#include "rendezvous.h"
#include "steps.h"

namespace ts {
namespace {

using namespace ts::testing;  // NOLINT(google-build-using-namespace): helpers of these tests

std::string new_name() {
  static std::atomic<int> next = 0;
  return "test-" + std::to_string(getpid()) + "-" + std::to_string(next++);
}

ExecutorOptions rank_options(const std::string &name, int32_t rank, int num_threads, int timeout_ms = 20000) {
  ExecutorOptions o;
  o.num_threads = num_threads;
  o.num_pages = 16;
  o.ranks.rank = rank;
  o.ranks.rendezvous = name;
  o.ranks.timeout_ms = timeout_ms;
  return o;
}

TestPlan plan_of(const Json &mesh) { return test_plan_of_ranks(mesh, best_target(), read_file(TS_TEST_KERNELS)); }

// ---- computing ----

struct Setting {
  Json mesh;
  int num_threads;
  bool in_two = false;  // its collectives
};

void PrintTo(const Setting &setting, std::ostream *out) {
  *out << setting.mesh << ", threads of each " << setting.num_threads << (setting.in_two ? ", in two" : "");
}

class RankMeshes : public ::testing::TestWithParam<Setting> {};

INSTANTIATE_TEST_SUITE_P(Meshes, RankMeshes,
                         ::testing::Values(Setting{tp(1), 2}, Setting{tp(2), 1}, Setting{tp(2), 3}, Setting{tp(4), 1},
                                           Setting{tp(8), 1}, Setting{tp(2), 3, true}, Setting{tp(4), 1, true},
                                           Setting{Json::array({Json::array({"ep", 2}), Json::array({"tp", 2})}), 2},
                                           Setting{Json::array({Json::array({"ep", 2}), Json::array({"tp", 2})}), 2,
                                                   true}));

TEST_P(RankMeshes, ComputeWhatOneComputes) {
  const auto &[mesh, num_threads, in_two] = GetParam();
  TestPlan plan = plan_of(mesh);
  if (in_two) plan.edit_program(best_target(), [&mesh = mesh](Json &program) { put_in_two(program, mesh); });
  const Loaded loaded(plan);
  const int32_t num_ranks = loaded.plan->mesh().num_ranks();
  const std::string name = new_name();
  std::vector<std::thread> followers;
  for (int32_t r = 1; r < num_ranks; ++r) {
    followers.emplace_back([&, r] {
      ExecutorOptions o = rank_options(name, r, num_threads + r % 2);
      o.num_pages = 0;  // rank 0 says
      Executor follower(loaded.plan, o);
      EXPECT_EQ(follower.num_pages(), 16);
      follower.follow();
    });
  }
  std::optional<Executor> executor(std::in_place, loaded.plan, rank_options(name, 0, num_threads));
  Reference reference;
  std::mt19937 random(11);
  std::vector<int> lengths(3);
  std::vector<int32_t> own(executor->batch_memory().size() + 4096);
  for (int round = 0; round < 8; ++round) {
    Step step;
    std::vector<int> sequences;
    for (int s = 0; s < 3; ++s) {
      std::vector<int32_t> ids(1 + random() % 8);
      for (int32_t &id : ids) id = static_cast<int32_t>(random() % kVocab);
      step.add(ids, lengths[s], {3 + s, 9 - s, 10 + s});
      lengths[s] += static_cast<int>(ids.size());
      sequences.push_back(s);
    }
    executor->run(step.take(num_ranks == 1 ? std::span(own) : executor->batch_memory()));
    expect_logits(*executor, reference.run(step, sequences));
  }
  executor.reset();
  for (std::thread &follower : followers) follower.join();
}

// ---- meeting ----

std::string refused_to_lead(const std::string &name, int timeout_ms, std::vector<int32_t> children = {},
                            ts_status status = TS_LOST_RANK) {
  const Loaded loaded(plan_of(tp(2)));
  ExecutorOptions o = rank_options(name, 0, 1, timeout_ms);
  o.ranks.children = std::move(children);
  return refusal([&] { const Executor executor(loaded.plan, o); }, status);
}

TEST(RanksMeet, OrNameWhoIsMissing) {
  const std::string name = new_name();
  const Loaded loaded(plan_of(tp(4)));
  std::string told;
  std::thread other(
      [&] { told = refusal([&] { const Executor executor(loaded.plan, rank_options(name, 2, 1)); }, TS_LOST_RANK); });
  const auto o = rank_options(name, 0, 1, 500);
  const std::string message = refusal([&] { const Executor executor(loaded.plan, o); }, TS_LOST_RANK);
  other.join();
  expect_in(message, {"not all of 4 ranks came within 0.500 s", "missing is rank 1, rank 3"});
  EXPECT_EQ(told, message);
}

TEST(RanksMeet, OrMissRankZero) {
  const Loaded loaded(plan_of(tp(2)));
  const auto o = rank_options("nobody", 1, 1, 200);
  expect_in(refusal([&] { const Executor executor(loaded.plan, o); }, TS_LOST_RANK),
            {"rank 0 did not come within 0.200 s", "rank 1", "'nobody'"});
}

TEST(RanksMeet, WithTheSamePlan) {
  const std::string name = new_name();
  TestPlan changed = plan_of(tp(2));
  changed.model["name"] = "another";
  const Loaded loaded(changed);
  std::string told;
  std::thread other(
      [&] { told = refusal([&] { const Executor executor(loaded.plan, rank_options(name, 1, 1)); }, TS_LOST_RANK); });
  const std::string message = refused_to_lead(name, 20000);
  other.join();
  expect_in(message, {"rank 1 (process ", "has another plan than rank 0: their seals are "});
  EXPECT_EQ(told, message);
}

TEST(RanksMeet, OnePerRank) {
  const std::string name = new_name();
  const Loaded loaded(plan_of(tp(4)));
  const auto come = [&] {
    refusal([&] { const Executor executor(loaded.plan, rank_options(name, 1, 1)); }, TS_LOST_RANK);
  };
  std::thread one(come), two(come);
  const auto o = rank_options(name, 0, 1);
  expect_in(refusal([&] { const Executor executor(loaded.plan, o); }, TS_LOST_RANK), {"both say that they are rank 1"});
  one.join();
  two.join();
}

TEST(RanksMeet, UnderANameOfTheirOwn) {
  const std::string name = new_name();
  const Loaded loaded(plan_of(tp(2)));
  std::thread first([&] {
    const auto o = rank_options(name, 0, 1, 1000);
    refusal([&] { const Executor executor(loaded.plan, o); }, TS_LOST_RANK);
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  expect_in(refused_to_lead(name, 5000, {}, TS_BAD_REQUEST), {"another run", "rendezvous name", name.c_str()});
  first.join();
  expect_in(refused_to_lead("", 5000, {}, TS_BAD_REQUEST), {"the plan is for 2 ranks (tp=2)", "rendezvous name"});
  const auto beyond = rank_options(name, 2, 1);
  expect_in(refusal([&] { const Executor executor(loaded.plan, beyond); }, TS_BAD_REQUEST),
            {"rank is 2, the plan is for 2 (tp=2)"});
}

TEST(RanksMeet, AndTellWhatKeptOneFromLoading) {
  const std::string name = new_name();
  TestPlan damaged = plan_of(tp(2));
  Bytes bytes = damaged.bytes();
  // The weights are parts@tp=0, parts@tp=1 and table, in this order: rank 0 reads the first and the last.
  const uint64_t data_begin = 8 + bytes[0] + 256U * bytes[1];
  bytes[data_begin + kVocab * kWidth * 4 + 17] ^= 1;
  const Loaded loaded(bytes);
  std::thread other([&] {
    expect_in(refusal([&] { const Executor executor(loaded.plan, rank_options(name, 1, 1)); }),
              {"'parts@tp=1' is damaged"});
  });
  const auto o = rank_options(name, 0, 1);
  expect_in(refusal([&] { const Executor executor(loaded.plan, o); }, TS_LOST_RANK),
            {"rank 1: ", "'parts@tp=1' is damaged"});
  other.join();
}

// ---- dying ----

/// A process that runs body(), and then ends.
class Process {
 public:
  explicit Process(const std::function<void()> &body) : pid_(fork()) {
    if (pid_ != 0) return;
    body();
    _exit(0);
  }
  ~Process() {
    end(SIGKILL);
    int status = 0;
    waitpid(pid_, &status, 0);
  }
  Process(const Process &) = delete;
  Process &operator=(const Process &) = delete;
  pid_t pid() const { return pid_; }
  void end(int signal) const { kill(pid_, signal); }

 private:
  pid_t pid_;
};

/// Runs steps over tp=2 until one fails, and returns why. `between` is called after the first.
std::string failure_of_leader(const std::string &name, int timeout_ms, const std::function<void()> &between) {
  const Loaded loaded(plan_of(tp(2)));
  Executor executor(loaded.plan, rank_options(name, 0, 1, timeout_ms));
  std::atomic<int> num_told = 0;
  executor.on_failure([&](const std::string &message) {
    EXPECT_NE(message, "");
    ++num_told;
  });
  Step step;
  step.add({1, 2, 3}, 0, {0});
  const ts_batch &batch = step.take(executor.batch_memory());
  executor.run(batch);
  between();
  const std::string message = refusal(
      [&] {
        for (;;) executor.run(batch);
      },
      TS_LOST_RANK);
  EXPECT_EQ(refusal([&] { executor.run(batch); }, TS_LOST_RANK), message);
  for (int i = 0; i < 1000 && num_told == 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_EQ(num_told, 1);
  return message;
}

void follow(const std::string &name, int timeout_ms = 20000) {
  const Loaded loaded(plan_of(tp(2)));
  Executor(loaded.plan, rank_options(name, 1, 1, timeout_ms)).follow();
}

TEST(RanksDie, AndAreNamed) {
  const std::string name = new_name();
  const Process follower([&] { follow(name); });
  const std::string message = failure_of_leader(name, 20000, [&] { follower.end(SIGKILL); });
  EXPECT_EQ(message, "rank 1 (process " + std::to_string(follower.pid()) + ") died");
}

TEST(RanksDie, OrStopAndAreNamed) {
  const std::string name = new_name();
  const Process follower([&] { follow(name); });
  const std::string message = failure_of_leader(name, 800, [&] { follower.end(SIGSTOP); });
  expect_in(message, {"rank 1 (process ", "has not moved for 1 s: it is stopped"});
}

TEST(RanksDie, SoDoesRankZero) {
  const std::string name = new_name();
  const Process leader([&] {
    const Loaded loaded(plan_of(tp(2)));
    const Executor executor(loaded.plan, rank_options(name, 0, 1));
    raise(SIGKILL);
  });
  EXPECT_EQ(refusal([&] { follow(name); }, TS_LOST_RANK), "rank 0 (process " + std::to_string(leader.pid()) + ") died");
}

TEST(RanksDie, BeforeTheyCome) {
  const Process child([] {});
  expect_in(refused_to_lead(new_name(), 20000, {0, child.pid()}),
            {("rank 1 (process " + std::to_string(child.pid()) + ") ended before all ranks had come").c_str()});
}

TEST(RanksDie, OrAreStoppedBeforeTheyCome) {
  const std::string name = new_name();
  const Process child([&] {
    raise(SIGSTOP);
    follow(name);
  });
  expect_in(refused_to_lead(name, 300, {0, child.pid()}),
            {"not all of 2 ranks came within 0.300 s",
             ("missing is rank 1 (process " + std::to_string(child.pid()) + ")").c_str()});
}

// ---- cores ----

TEST(RanksShare, TheCoresThatTheyMayUse) {
  const auto hello = [](std::initializer_list<int> cores, int num_threads = 0) {
    RankHello h;
    CPU_ZERO(&h.cores);
    for (const int core : cores) CPU_SET(core, &h.cores);
    h.usable_cores = static_cast<int32_t>(cores.size());
    h.num_threads = num_threads;
    return h;
  };
  const auto shared = [](const std::vector<RankHello> &hellos) {
    RankLayout layout;
    share_cores(hellos, layout);
    return layout;
  };
  const RankLayout two = shared({hello({0, 1, 2, 3}), hello({0, 1, 2, 3})});
  EXPECT_EQ(two.num_threads[0], 2);
  EXPECT_EQ(two.num_threads[1], 2);
  EXPECT_GT(two.most_turns[0], 0);
  const RankLayout bound = shared({hello({0, 1}), hello({2, 3})});  // as mpirun binds
  EXPECT_EQ(bound.num_threads[1], 2);
  EXPECT_GT(bound.most_turns[0], 0);
  const RankLayout many = shared({hello({0, 1}), hello({0, 1}), hello({0, 1})});
  EXPECT_EQ(many.num_threads[2], 1);
  EXPECT_EQ(many.most_turns[0], 0);  // who waits makes room
  EXPECT_EQ(shared({hello({0, 1}, 2), hello({0, 1})}).most_turns[0], 0);
  EXPECT_EQ(shared({hello({0, 1}, 2), hello({0, 1})}).num_threads[0], 2);
}

}  // namespace
}  // namespace ts
