// Collectives over shared memory against what they mean, with ranks as threads of one process, so that ThreadSanitizer sees both sides.
#include "collective.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "shared_group.h"
#include "workers.h"

namespace ts {
namespace {

using Kind = Collective::Kind;
using Values = std::vector<float>;

constexpr int64_t kMaxRows = 64;

struct Case {
  Collective what;
  int64_t num_tokens, num_logits;
  std::vector<Values> in;  // of each rank
  std::vector<Values> out;
  std::vector<int64_t> owners = {};  // by sequence: of each token, which is a sequence of its own
  int32_t stage = Launch::kEveryStage;
};

bool is_here(const Case &c, const Mesh &mesh, int32_t rank) {
  return c.stage == Launch::kEveryStage || c.stage == mesh.stage(rank);
}

/// The step as the engine has it: token i is sequence i, in the only slot that its owner has.
struct Step {
  std::vector<int32_t> zeros, query_start, slots;
  ts_batch batch{};

  explicit Step(const Case &c) : zeros(static_cast<size_t>(kMaxRows) + 1) {
    for (int32_t s = 0; s <= kMaxRows; ++s) query_start.push_back(s);
    for (const int64_t owner : c.owners) slots.push_back(static_cast<int32_t>(owner));
    slots.resize(static_cast<size_t>(kMaxRows));
    batch = {static_cast<int32_t>(c.num_tokens),
             static_cast<int32_t>(c.num_tokens),
             static_cast<int32_t>(c.num_logits),
             1,
             zeros.data(),
             zeros.data(),
             slots.data(),
             query_start.data(),
             zeros.data(),
             zeros.data(),
             zeros.data()};
  }
};

/// Tokens that a rank has over an axis, counted one by one.
int64_t tokens_of(const Case &c, const Mesh &mesh, int32_t rank, int32_t axis) {
  const int64_t mine = mesh.coordinate(rank, axis), ranks = mesh.axes[static_cast<size_t>(axis)].size;
  if (mesh.by_sequence(axis)) return std::ranges::count(c.owners, mine);
  const int64_t each = (c.num_tokens + ranks - 1) / ranks;
  int64_t found = 0;
  for (int64_t token = 0; token < c.num_tokens; ++token) found += token / each == mine ? 1 : 0;
  return found;
}

int64_t outer_of(const Case &c, const Mesh &mesh, int32_t rank) {
  const int64_t rows = c.what.rows_axis < 0 ? c.num_tokens : tokens_of(c, mesh, rank, c.what.rows_axis);
  return c.what.outer(rows, c.num_logits);
}

/// Where the ranks' parts of a dim begin, `unit` each, or tokens of a step; and the end.
std::vector<int64_t> begins(const Case &c, const Mesh &mesh, int64_t unit) {
  std::vector<int64_t> found;
  const int64_t ranks = c.what.num_ranks, each = (c.num_tokens + ranks - 1) / ranks;
  for (int64_t q = 0; q <= ranks; ++q) {
    int64_t first = q;
    if (c.what.tokens && mesh.by_sequence(c.what.axis)) {
      first = std::ranges::count_if(c.owners, [&](int64_t owner) { return owner < q; });  // a token a sequence
    } else if (c.what.tokens) {
      first = std::min(q * each, c.num_tokens);
    }
    found.push_back(first * unit);
  }
  return found;
}

/// What a rank has of an all_to_all, element by element as csrc/program.h has it.
Values exchanged(const Case &c, const Mesh &mesh, int32_t rank, int64_t outer) {
  const Collective &w = c.what;
  const std::vector<int64_t> begin = begins(c, mesh, w.part);
  const int64_t n = w.num_ranks;
  const auto mine = static_cast<size_t>(mesh.coordinate(rank, w.axis));
  Values out;
  const auto take = [&](size_t q, int64_t run) {
    const Values &in = c.in[static_cast<size_t>(mesh.peer(rank, w.axis, static_cast<int32_t>(q)))];
    for (int64_t e = 0; e < w.run; ++e) out.push_back(in[static_cast<size_t>(run * w.run + e)]);
  };
  for (int64_t o = 0; o < outer; ++o) {
    if (w.gathers_first) {
      for (size_t q = 0; q < static_cast<size_t>(n); ++q) {
        const int64_t size = begin[q + 1] - begin[q];
        for (int64_t p = 0; p < size; ++p) take(q, (o * size + p) * n + static_cast<int64_t>(mine));
      }
    } else {
      for (int64_t p = begin[mine]; p < begin[mine + 1]; ++p) {
        for (size_t q = 0; q < static_cast<size_t>(n); ++q) take(q, o * begin.back() + p);
      }
    }
  }
  return out;
}

/// What each rank gets, element by element as csrc/program.h has it.
Values expected(const Case &c, const Mesh &mesh, int32_t rank) {
  const Collective &w = c.what;
  const int64_t n = w.num_ranks, mine = mesh.coordinate(rank, w.axis), outer = outer_of(c, mesh, rank);
  if (!is_here(c, mesh, rank) || (w.kind == Kind::send && mine != w.dst)) {
    return Values(c.out[static_cast<size_t>(rank)].size() - 1, -7.0F);  // as it was
  }
  if (w.kind == Kind::all_to_all) return exchanged(c, mesh, rank, outer);
  const std::vector<int64_t> begin = begins(c, mesh, w.run);
  const auto size = [&](int64_t q) { return begin[static_cast<size_t>(q) + 1] - begin[static_cast<size_t>(q)]; };
  const auto of = [&](int64_t q, int64_t i) {
    return c.in[static_cast<size_t>(mesh.peer(rank, w.axis, static_cast<int32_t>(q)))][static_cast<size_t>(i)];
  };
  const auto reduced = [&](int64_t i) {
    float sum = of(0, i);
    for (int64_t q = 1; q < n; ++q)
      sum = w.reduce == Collective::Reduce::sum ? sum + of(q, i) : std::fmax(sum, of(q, i));
    return sum;
  };
  Values out;
  for (int64_t i = 0; w.kind == Kind::send && i < outer * w.run; ++i) out.push_back(of(w.src, i));
  for (int64_t o = 0; o < outer && w.kind != Kind::send; ++o) {
    if (w.kind == Kind::all_gather) {
      for (int64_t q = 0; q < n; ++q) {
        for (int64_t e = 0; e < size(q); ++e) out.push_back(of(q, o * size(q) + e));
      }
      continue;
    }
    for (int64_t e = 0; w.kind == Kind::all_reduce && e < w.run; ++e) out.push_back(reduced(o * w.run + e));
    if (w.kind == Kind::all_reduce) continue;
    for (int64_t e = 0; e < size(mine); ++e) {
      const int64_t at = o * begin.back() + begin[static_cast<size_t>(mine)] + e;
      out.push_back(w.kind == Kind::slice ? of(mine, at) : reduced(at));
    }
  }
  return out;
}

Case random_case(std::mt19937 &random, const Mesh &mesh) {
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  Case c;
  Collective &w = c.what;
  w.kind = static_cast<Kind>(below(6));
  w.reduce = static_cast<Collective::Reduce>(below(2));
  w.rows = static_cast<Collective::Rows>(below(3));
  w.axis = static_cast<int32_t>(below(static_cast<int64_t>(mesh.axes.size())));
  w.num_ranks = mesh.axes[static_cast<size_t>(w.axis)].size;
  w.times = 1 + below(3);
  w.run = below(4) == 0 ? 1 + below(2000) : 1 + below(40);  // large ones go in two steps
  c.num_tokens = 1 + below(kMaxRows);
  c.num_logits = below(3) == 0 ? 0 : below(c.num_tokens + 1);
  if (w.kind == Kind::all_to_all) {
    w.part = 1 + below(5);
    w.gathers_first = below(2) == 0;
  }
  if (w.kind == Kind::send && w.num_ranks == 1) w.kind = Kind::slice;
  if (w.kind == Kind::send) {
    w.src = static_cast<int32_t>(below(w.num_ranks));
    w.dst = (w.src + 1 + static_cast<int32_t>(below(w.num_ranks - 1))) % w.num_ranks;
  } else if (mesh.num_stages() > 1 && mesh.axes[static_cast<size_t>(w.axis)].name != "pp") {
    c.stage = static_cast<int32_t>(below(mesh.num_stages() + 1)) - 1;
  }
  if (w.kind != Kind::all_reduce && w.kind != Kind::send && below(2) == 0) {
    w.tokens = true;
    w.rows = Collective::Rows::one;
  }
  if (w.rows == Collective::Rows::tokens && mesh.axes.size() > 1 && below(2) == 0) w.rows_axis = w.axis == 0 ? 1 : 0;
  for (int64_t token = 0; token < c.num_tokens; ++token) c.owners.push_back(below(mesh.num_owners()));
  std::ranges::sort(c.owners);
  std::normal_distribution<float> normal(0, 100);
  for (int32_t r = 0; r < mesh.num_ranks(); ++r) {
    const int64_t outer = outer_of(c, mesh, r), mine = tokens_of(c, mesh, r, w.axis);
    Values &in = c.in.emplace_back(static_cast<size_t>(outer * w.in_run(mine, c.num_tokens)) + 1);
    for (float &x : in) x = normal(random);
    c.out.emplace_back(static_cast<size_t>(outer * w.out_run(mine, c.num_tokens)) + 1,
                       -7.0F);  // one beyond, which stays
  }
  return c;
}

struct Setting {
  Mesh mesh;
  int threads;
};

class Collectives : public ::testing::TestWithParam<Setting> {};

INSTANTIATE_TEST_SUITE_P(Meshes, Collectives,
                         ::testing::Values(Setting{{{{"tp", 1}}}, 2}, Setting{{{{"tp", 2}}}, 1},
                                           Setting{{{{"tp", 2}}}, 3}, Setting{{{{"tp", 3}}}, 2},
                                           Setting{{{{"tp", 5}}}, 1}, Setting{{{{"tp", 8}}}, 2},
                                           Setting{{{{"ep", 2}, {"tp", 4}}}, 1}, Setting{{{{"ep", 4}, {"tp", 2}}}, 2},
                                           Setting{{{{"dp", 1}, {"tp", 3}, {"ep", 2}}}, 1}, Setting{{{{"dp", 3}}}, 2},
                                           Setting{{{{"dp", 2}, {"ep", 2}}}, 2}, Setting{{{{"dp", 4}, {"tp", 2}}}, 1},
                                           Setting{{{{"dp", 2}, {"tp", 4}}}, 1}, Setting{{{{"pp", 3}}}, 2},
                                           Setting{{{{"pp", 2}, {"dp", 1}, {"tp", 3}}}, 1},
                                           Setting{{{{"pp", 2}, {"dp", 2}, {"ep", 2}}}, 1}),
                         [](const auto &info) {
                           std::string name = info.param.mesh.text() + "x" + std::to_string(info.param.threads);
                           std::ranges::replace_if(name, [](char c) { return c == '=' || c == ','; }, '_');
                           return name;
                         });

TEST_P(Collectives, AreWhatTheyMean) {
  const auto &[mesh, threads] = GetParam();
  const int32_t num_ranks = mesh.num_ranks();
  std::mt19937 random(20261);
  std::vector<Case> cases;
  RankLayout layout;
  layout.num_ranks = num_ranks;
  Limits limits;
  limits.max_tokens = limits.max_seqs = kMaxRows;
  for (int i = 0; i < 120; ++i) {
    cases.push_back(random_case(random, mesh));
    layout.staging_bytes =
        std::max(layout.staging_bytes, BoundCollective::staging_bytes(cases.back().what, limits, mesh));
  }
  for (int32_t r = 0; r < num_ranks; ++r) layout.num_threads[static_cast<size_t>(r)] = threads + r % 2;
  const auto memory = std::make_shared<SharedMemory>(SharedGroup::bytes(layout));
  std::vector<std::thread> ranks;
  for (int32_t r = 0; r < num_ranks; ++r) {
    ranks.emplace_back([&, r] {
      SharedGroup group(memory, layout, r, {});
      std::vector<BoundCollective> bound;
      int32_t half = 0;
      for (Case &c : cases) {
        const auto i = static_cast<size_t>(r);
        bound.emplace_back(c.what, mesh, r, &group, half, c.in[i].data(), c.out[i].data(), nullptr,
                           is_here(c, mesh, r));
        if (BoundCollective::staging_bytes(c.what, limits, mesh) > 0) half = 1 - half;
      }
      std::vector<std::unique_ptr<TokenParts>> tokens;
      for (const Case &c : cases) {
        const Step step(c);  // what is shared out stays behind
        tokens.push_back(std::make_unique<TokenParts>(mesh, r, kMaxRows, 1));
        tokens.back()->set(step.batch);
      }
      Workers workers(layout.num_threads[static_cast<size_t>(r)], 0);
      auto job = [&](int thread, int num_threads, Barrier &barrier) {
        for (size_t i = 0; i < cases.size(); ++i) {
          barrier.wait();
          if (i % 2 == 0 || !cases[i].what.exchanges()) {
            ASSERT_TRUE(bound[i].run(*tokens[i], thread, num_threads));
            continue;
          }
          const uint32_t started = bound[i].start(*tokens[i], thread, num_threads);
          if (i % 4 == 1) barrier.wait();  // as between launches that run meanwhile
          ASSERT_TRUE(bound[i].finish(started, *tokens[i], thread, num_threads));
        }
      };
      workers.run(job);
    });
  }
  for (std::thread &rank : ranks) rank.join();
  for (size_t i = 0; i < cases.size(); ++i) {
    for (int32_t r = 0; r < num_ranks; ++r) {
      Values wanted = expected(cases[i], mesh, r);
      wanted.push_back(-7.0F);
      const Values &found = cases[i].out[static_cast<size_t>(r)];
      ASSERT_EQ(found.size(), wanted.size());
      ASSERT_EQ(std::memcmp(found.data(), wanted.data(), wanted.size() * sizeof(float)), 0)
          << "case " << i << ", kind " << static_cast<int>(cases[i].what.kind) << ", rank " << r;
    }
  }
}

/// Runs the collective between two ranks of one thread each.
template <class Element>
void between_two(const Mesh &mesh, const Collective &what, const std::vector<std::vector<Element>> &in,
                 std::vector<std::vector<Element>> &out) {
  RankLayout layout;
  layout.num_ranks = 2;
  layout.num_threads = {1, 1};
  layout.staging_bytes = 4096;
  const auto memory = std::make_shared<SharedMemory>(SharedGroup::bytes(layout));
  const auto run = [&](int32_t r) {
    SharedGroup group(memory, layout, r, {});
    const auto i = static_cast<size_t>(r);
    const TokenParts tokens(mesh, r, 1, 1);
    EXPECT_TRUE(BoundCollective(what, mesh, r, &group, 0, in[i].data(), out[i].data()).run(tokens, 0, 1));
  };
  std::thread other([&] { run(1); });
  run(0);
  other.join();
}

TEST(CollectiveInTwo, EndsForAllThreadsAlikeIfTheGroupIsAborted) {
  const Mesh mesh{{{"tp", 2}}};
  Collective what;
  what.num_ranks = 2;
  what.run = 2;
  RankLayout layout;
  layout.num_ranks = 2;
  layout.num_threads = {2, 1};
  layout.staging_bytes = 4096;
  SharedGroup group(std::make_shared<SharedMemory>(SharedGroup::bytes(layout)), layout, 0, {});
  const Values in = {1, 2};
  Values out = {-7, -7};
  const BoundCollective sum(what, mesh, 0, &group, 0, in.data(), out.data());
  const TokenParts tokens(mesh, 0, 1, 1);
  const uint32_t before = sum.start(tokens, 0, 2);  // the first thread is there when rank 1 is lost
  group.abort("rank 1 died");
  const uint32_t after = sum.start(tokens, 1, 2);
  EXPECT_FALSE(sum.finish(before, tokens, 0, 2));
  EXPECT_FALSE(sum.finish(after, tokens, 1, 2));
  EXPECT_EQ(out, (Values{-7, -7}));
}

TEST(CollectiveSum, OfIntegers) {
  const Mesh mesh{{{"tp", 2}}};
  Collective what;
  what.kind = Kind::reduce_scatter;
  what.integers = true;
  what.num_ranks = 2;
  what.run = 2;
  // no f32 holds them
  const std::vector<std::vector<int32_t>> in = {{16777217, 1, 2, 3}, {-1, 5, 1 << 30, 16777216}};
  std::vector<std::vector<int32_t>> out(2, std::vector<int32_t>(2));
  between_two(mesh, what, in, out);
  EXPECT_EQ(out[0], (std::vector<int32_t>{16777216, 6}));
  EXPECT_EQ(out[1], (std::vector<int32_t>{(1 << 30) + 2, 16777219}));
}

TEST(CollectiveMax, KeepsNaN) {
  const Mesh mesh{{{"tp", 2}}};
  Collective what;
  what.reduce = Collective::Reduce::max;
  what.num_ranks = 2;
  what.run = 3;
  const std::vector<Values> in = {{NAN, 1, 2}, {5, NAN, 1}};
  std::vector<Values> out(2, Values(3));
  between_two(mesh, what, in, out);
  for (const Values &values : out) {
    EXPECT_TRUE(std::isnan(values[0]) && std::isnan(values[1]));
    EXPECT_EQ(values[2], 2);
  }
}

}  // namespace
}  // namespace ts
