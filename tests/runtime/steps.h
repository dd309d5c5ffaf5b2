// Steps over the tests' own program, and what it computes, written again without launches, threads, ranks or pages.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "executor.h"
#include "host.h"
#include "make_plan.h"

namespace ts::testing {

inline std::string best_target() { return host_targets().at(0); }

/// A plan that this host runs, in memory that lives as long as it.
struct Loaded {
  explicit Loaded(const TestPlan &plan) : Loaded(plan.bytes()) {}
  explicit Loaded(const Bytes &bytes) : storage(bytes.size() + 64) {
    const size_t skip = (64 - reinterpret_cast<uintptr_t>(storage.data()) % 64) % 64;
    std::ranges::copy(bytes, storage.begin() + static_cast<ptrdiff_t>(skip));
    plan = Plan::from_memory(std::span(storage).subspan(skip, bytes.size()));
  }
  Bytes storage;
  std::shared_ptr<const Plan> plan;
};

/// A step of several sequences, with the arrays that the batch points to.
struct Step {
  std::vector<int32_t> token_ids, positions, slots, query_start{0}, context_len, page_table, logit_rows;
  ts_batch batch{};

  /// Adds tokens at `positions` first.. of the sequence whose pages are `pages`.
  void add(const std::vector<int32_t> &ids, int first, const std::vector<int32_t> &pages) {
    for (const int32_t id : ids) {
      const int32_t position = first++;
      token_ids.push_back(id);
      positions.push_back(position);
      slots.push_back(pages[position / kPageSize] * kPageSize + position % kPageSize);
    }
    query_start.push_back(static_cast<int32_t>(token_ids.size()));
    context_len.push_back(first);
    page_table.insert(page_table.end(), pages.begin(), pages.end());
    page_table.resize(query_start.size() * 4 - 4);
    logit_rows.push_back(query_start.back() - 1);
  }

  const ts_batch &take() {
    memory_.resize(1000);
    return take(memory_);
  }

  /// With the arrays in `memory`, where ranks share it.
  const ts_batch &take(std::span<int32_t> memory) {
    const auto put = [&](const std::vector<int32_t> &array) {
      const int32_t *at = std::ranges::copy(array, memory.begin()).out.base();
      memory = memory.subspan(array.size());
      return at - array.size();
    };
    batch.num_tokens = static_cast<int32_t>(token_ids.size());
    batch.num_seqs = static_cast<int32_t>(context_len.size());
    batch.num_logits = static_cast<int32_t>(logit_rows.size());
    batch.page_table_stride = 4;
    batch.token_ids = put(token_ids);
    batch.positions = put(positions);
    batch.slots = put(slots);
    batch.query_start = put(query_start);
    batch.context_len = put(context_len);
    batch.page_table = put(page_table);
    batch.logit_rows = put(logit_rows);
    return batch;
  }

 private:
  std::vector<int32_t> memory_;
};

/// What the test program computes, written again without launches, threads or pages.
class Reference {
 public:
  std::vector<std::vector<float>> run(const Step &step, const std::vector<int> &sequences) {
    std::vector<Row> x;
    for (const int32_t id : step.token_ids)
      x.emplace_back(table_.begin() + id * kWidth, table_.begin() + (id + 1) * kWidth);
    for (auto &layer : caches_) {
      mix(x);
      size_t t = 0;
      for (size_t s = 0; s < sequences.size(); ++s) {
        std::map<int, Row> &cache = layer[sequences[s]];
        const size_t begin = t;
        for (; t < static_cast<size_t>(step.query_start[s + 1]); ++t) cache[step.positions[t]] = x[t];
        for (size_t i = begin; i < t; ++i) {
          Row sum(kWidth);
          for (int key = 0; key <= step.positions[i]; ++key) {
            for (int c = 0; c < kWidth; ++c) sum[c] += cache.at(key)[c];
          }
          x[i] = sum;
        }
      }
    }
    std::vector<std::vector<float>> logits;
    for (const int32_t row : step.logit_rows) {
      logits.emplace_back(kVocab);
      for (int v = 0; v < kVocab; ++v) {
        for (int c = 0; c < kWidth; ++c) logits.back()[v] += x[row][c] * table_[v * kWidth + c];
      }
    }
    return logits;
  }

 private:
  using Row = std::vector<float>;

  static void mix(std::vector<Row> &x) {
    const std::vector<Row> before = x;
    for (size_t t = 0; t < x.size(); ++t) {
      for (int c = 0; c < kWidth; ++c) x[t][c] += 0.5F * before[(t + 1) % x.size()][c];
    }
  }

  std::vector<float> table_ = test_table();
  std::map<int, std::map<int, Row>> caches_[2];  // layer, sequence, position
};

template <class Computes>
void expect_logits(const Computes &executor, const std::vector<std::vector<float>> &wanted) {
  for (size_t l = 0; l < wanted.size(); ++l) {
    const float *row = executor.logits() + static_cast<int64_t>(l) * executor.logits_stride();
    for (int v = 0; v < kVocab; ++v) ASSERT_EQ(row[v], wanted[l][v]) << "row " << l << ", token " << v;
  }
}

}  // namespace ts::testing
