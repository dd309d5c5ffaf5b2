#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "../runtime/toy.h"

namespace sim {

/// Who must be admitted when, kept by the plainest means: what FairQueue promises, written a second time.
class Turns {
 public:
  explicit Turns(int64_t patience_ms) : patience_ms_(patience_ms) {}

  void arrive(const toy::Request &request, int64_t now_ms) {
    Flow &flow = flows_[{request.priority, request.tenant}];
    if (flow.waiting.empty()) {
      flow.charged = std::max(flow.charged, floor(request.priority));
      flow.due_ms = now_ms + patience(request.priority);
      flow.num_passed_over = 0;
    }
    const int64_t deadline = request.timeout_ms > 0 ? now_ms + request.timeout_ms : INT64_MAX;
    flow.waiting.push_back({request.id, next_arrival_++, deadline});
    flow_of_[request.id] = {request.priority, request.tenant};
  }

  /// It waits no longer, if it still did.
  void leave(uint64_t id) {
    const auto found = flow_of_.find(id);
    if (found == flow_of_.end()) return;
    std::erase_if(flows_.at(found->second).waiting, [id](const Waiting &w) { return w.id == id; });
  }

  void leave_all() {
    for (auto &[key, flow] : flows_) flow.waiting.clear();
  }

  void time_out(int64_t now_ms) {
    for (auto &[key, flow] : flows_) {
      std::erase_if(flow.waiting, [now_ms](const Waiting &w) { return w.deadline_ms <= now_ms; });
    }
  }

  void output(uint64_t id) { flows_.at(flow_of_.at(id)).charged += 2; }

  /// A step: whoever is in it and waited until now was admitted, one after the other.
  void step(const ts::Batch &batch, int64_t now_ms) {
    std::vector<const ts::Sequence *> admitted;
    for (int32_t row = 0; row < batch.arrays().num_seqs; ++row) {
      const ts::Sequence &sequence = batch.running(row);
      if (!admitted_.contains(sequence.id)) admitted.push_back(&sequence);
    }
    std::ranges::sort(admitted, {}, &ts::Sequence::turn);
    for (const ts::Sequence *sequence : admitted) admit(*sequence, now_ms);
  }

 private:
  using Key = std::pair<int32_t, uint64_t>;  // class, tenant
  struct Waiting {
    uint64_t id, arrival;
    int64_t deadline_ms;
  };
  struct Flow {
    int64_t charged = 0, due_ms = 0;
    size_t num_passed_over = 0;  // since it is overdue
    std::deque<Waiting> waiting;
  };

  int64_t patience(int32_t priority) const { return patience_ms_ * (priority - ts::kPriorityMin + 1); }

  int64_t floor(int32_t priority) {
    std::optional<int64_t> least;
    for (const auto &[key, flow] : flows_) {
      if (key.first != priority || flow.waiting.empty()) continue;
      least = std::min(least.value_or(flow.charged), flow.charged);
    }
    if (least) return *least;
    return last_.contains(priority) ? flows_.at(last_.at(priority)).charged : 0;
  }

  Key next(int64_t now_ms) const {
    // Overdue first, by how long; then by class; then by charge; of those alike the one that came first.
    const auto rank = [&](const Key &key, const Flow &flow) {
      const bool overdue = flow.due_ms <= now_ms;
      return std::tuple(!overdue, overdue ? 0 : key.first, overdue ? flow.due_ms : flow.charged,
                        flow.waiting.front().arrival);
    };
    std::optional<Key> best;
    for (const auto &[key, flow] : flows_) {
      if (flow.waiting.empty()) continue;
      if (!best || rank(key, flow) < rank(*best, flows_.at(*best))) best = key;
    }
    return best.value_or(Key{});
  }

  void admit(const ts::Sequence &sequence, int64_t now_ms) {
    const Key key = next(now_ms);
    Flow &flow = flows_[key];
    ASSERT_FALSE(flow.waiting.empty()) << "request " << sequence.id << " is admitted, but nobody waits";
    ASSERT_EQ(sequence.id, flow.waiting.front().id) << "another's turn was taken";
    for (auto &[other, passed] : flows_) {
      if (other == key || passed.waiting.empty() || passed.due_ms > now_ms) continue;
      ASSERT_LT(++passed.num_passed_over, flows_.size()) << "the wait of tenant " << other.second << " is not bounded";
    }
    flow.waiting.pop_front();
    flow.charged += sequence.num_tokens() - sequence.num_cached;
    flow.due_ms = now_ms + patience(key.first);
    flow.num_passed_over = 0;
    last_[key.first] = key;
    admitted_.insert(sequence.id);
  }

  int64_t patience_ms_;
  uint64_t next_arrival_ = 0;
  std::map<Key, Flow> flows_;
  std::map<int32_t, Key> last_;  // served, of each class
  std::map<uint64_t, Key> flow_of_;
  std::set<uint64_t> admitted_;
};

}  // namespace sim
