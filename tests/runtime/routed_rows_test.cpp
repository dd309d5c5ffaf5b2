// Rows of routes between the ranks of their tokens and those of their experts, over shared memory, with ranks as threads of one process.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "collective.h"
#include "shared_group.h"
#include "workers.h"

namespace ts {
namespace {

using Values = std::vector<float>;

constexpr int64_t kMaxRows = 64;  // tokens of a step

struct Setting {
  Mesh mesh;
  int threads;
};

class RowsOfRoutes : public ::testing::TestWithParam<Setting> {};

INSTANTIATE_TEST_SUITE_P(Meshes, RowsOfRoutes,
                         ::testing::Values(Setting{{{{"ep", 1}}}, 2}, Setting{{{{"ep", 2}}}, 3},
                                           Setting{{{{"dp", 3}}}, 2}, Setting{{{{"ep", 8}}}, 2},
                                           Setting{{{{"dp", 2}, {"ep", 2}}}, 2}, Setting{{{{"dp", 4}, {"tp", 2}}}, 1}),
                         [](const auto &info) {
                           std::string name = info.param.mesh.text() + "x" + std::to_string(info.param.threads);
                           std::ranges::replace_if(name, [](char c) { return c == '=' || c == ','; }, '_');
                           return name;
                         });

/// Rows of routes over one axis: all ranks of a group have its counts, and each the rows of its tokens.
struct Routes {
  Collective what;
  std::vector<std::vector<int32_t>> counts;  // of each rank [ranks on the axis][experts]
  std::vector<Values> in, there, back;       // of each rank
};

Routes random_routes(std::mt19937 &random, const Mesh &mesh, int32_t axis) {
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  Routes c;
  Collective &w = c.what;
  w.kind = Collective::Kind::ragged_all_to_all;
  w.axis = axis;
  w.num_ranks = mesh.axes[static_cast<size_t>(axis)].size;
  w.experts = w.num_ranks * (1 + below(4));
  w.top = 1 + below(3);
  w.run = 1 + below(40);
  c.counts.resize(static_cast<size_t>(mesh.num_ranks()));
  for (int32_t r = 0; r < mesh.num_ranks(); ++r) {
    auto &counts = c.counts[static_cast<size_t>(r)];
    const int32_t first = mesh.peer(r, axis, 0);
    if (first != r) {
      counts = c.counts[static_cast<size_t>(first)];
    } else {
      counts.resize(static_cast<size_t>(w.num_ranks * w.experts));
      const int64_t busy = 1 + below(w.experts);  // the others get no rows
      for (int64_t q = 0; q < w.num_ranks; ++q) {
        const int64_t routes = below(3) == 0 ? 0 : w.top * below(kMaxRows / w.num_ranks + 1);
        for (int64_t i = 0; i < routes; ++i) ++counts[static_cast<size_t>(q * w.experts + below(busy))];
      }
    }
    const int64_t mine = mesh.coordinate(r, axis);
    const int64_t rows = w.rows_for(counts.data(), mine, 0, w.experts);
    Values &in = c.in.emplace_back();
    for (int64_t i = 0; i < rows * w.run; ++i) in.push_back(static_cast<float>(r * 1000000 + i));
    c.there.emplace_back(static_cast<size_t>(kMaxRows * w.top * w.run) + 1, -7.0F);
    c.back.emplace_back(in.size() + 1, -7.0F);
  }
  return c;
}

/// The rows of a rank's experts: by expert, then by the rank of their tokens.
Values rows_of_experts(const Routes &c, const Mesh &mesh, int32_t rank) {
  const Collective &w = c.what;
  const auto &counts = c.counts[static_cast<size_t>(rank)];
  const int64_t own = w.experts / w.num_ranks, first = mesh.coordinate(rank, w.axis) * own;
  Values found;
  for (int64_t e = first; e < first + own; ++e) {
    for (int32_t q = 0; q < w.num_ranks; ++q) {
      const Values &in = c.in[static_cast<size_t>(mesh.peer(rank, w.axis, q))];
      const auto begin = in.begin() + w.rows_for(counts.data(), q, 0, e) * w.run;
      found.insert(found.end(), begin, begin + counts[static_cast<size_t>(q * w.experts + e)] * w.run);
    }
  }
  return found;
}

Collective one_way(const Routes &c, bool to_experts) {
  Collective what = c.what;
  what.to_experts = to_experts;
  return what;
}

TEST_P(RowsOfRoutes, GoToTheirExpertsAndBack) {
  const auto &[mesh, threads] = GetParam();
  std::mt19937 random(20262);
  std::vector<Routes> cases;
  RankLayout layout;
  layout.num_ranks = mesh.num_ranks();
  Limits limits;
  limits.max_tokens = limits.max_seqs = kMaxRows;
  for (int32_t i = 0; i < 30; ++i) {
    cases.push_back(random_routes(random, mesh, i % static_cast<int32_t>(mesh.axes.size())));
    for (const bool there : {true, false}) {
      layout.staging_bytes =
          std::max(layout.staging_bytes, BoundCollective::staging_bytes(one_way(cases.back(), there), limits, mesh));
    }
  }
  for (int32_t r = 0; r < mesh.num_ranks(); ++r) layout.num_threads[static_cast<size_t>(r)] = threads + r % 2;
  const auto memory = std::make_shared<SharedMemory>(SharedGroup::bytes(layout));
  std::vector<std::thread> ranks;
  for (int32_t r = 0; r < mesh.num_ranks(); ++r) {
    ranks.emplace_back([&, r] {
      const auto i = static_cast<size_t>(r);
      SharedGroup group(memory, layout, r, {});
      std::vector<BoundCollective> bound;
      for (Routes &c : cases) {
        for (const bool there : {true, false}) {
          bound.emplace_back(one_way(c, there), mesh, r, &group, there ? 0 : 1,
                             there ? c.in[i].data() : c.there[i].data(), there ? c.there[i].data() : c.back[i].data(),
                             c.counts[i].data());
        }
      }
      const TokenParts tokens(mesh, r, 1, 1);
      Workers workers(layout.num_threads[i], 0);
      auto job = [&](int thread, int num_threads, Barrier &barrier) {
        for (const BoundCollective &collective : bound) {
          barrier.wait();
          ASSERT_TRUE(collective.run(tokens, thread, num_threads));
        }
      };
      workers.run(job);
    });
  }
  for (std::thread &rank : ranks) rank.join();
  for (const Routes &c : cases) {
    for (int32_t r = 0; r < mesh.num_ranks(); ++r) {
      const auto i = static_cast<size_t>(r);
      Values wanted = rows_of_experts(c, mesh, r), own = c.in[i];
      wanted.resize(c.there[i].size(), -7.0F);
      own.push_back(-7.0F);
      EXPECT_EQ(c.there[i], wanted);
      EXPECT_EQ(c.back[i], own);
    }
  }
}

}  // namespace
}  // namespace ts
