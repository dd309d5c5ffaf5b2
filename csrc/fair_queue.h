#pragma once

#include <compare>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "states.h"

namespace ts {

/// A tenant's requests of one class. Sequences that have been admitted keep it, to be charged.
struct Flow {
  int32_t priority = 0;
  int64_t charged = 0;
  int64_t key = 0;     ///< `charged` as its class has it
  int64_t due_ms = 0;  ///< when it is overdue
  std::deque<Queued> waiting;
};

/// Requests that wait to be admitted for the first time, and which of them is next.
///
/// Of two classes (Sequence::priority) the lower number goes first. In a class, tenants share the engine by virtual token
/// counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2): a tenant is charged for what is
/// computed for it, and whoever was charged least goes first; one that begins to wait is lifted to the least of those that wait,
/// so that nobody saves up. A tenant's requests of one class, its flow, are first come first served.
///
/// Nobody starves: a flow is overdue once it has waited patience_ms (twice that in the second class, and so on) since it was last
/// served, or since it began to wait. Whoever is overdue the longest goes before all others. So of F flows, at most F - 1 others
/// are served between when one is overdue and when it is served.
///
/// O(log(flows)) amortised for each request and charge.
class FairQueue {
 public:
  static constexpr int64_t kInputCost = 1, kOutputCost = 2;  ///< of a token, as in the paper

  explicit FairQueue(int64_t patience_ms) : patience_ms_(patience_ms) {}
  FairQueue(const FairQueue &) = delete;
  FairQueue &operator=(const FairQueue &) = delete;
  ~FairQueue();

  bool empty() const { return size_ == 0; }
  int32_t size() const { return size_; }
  size_t num_flows() const { return flows_.size(); }  ///< that it remembers

  /// `sequence` has its arrival, and has come at now_ms.
  void push(std::unique_ptr<Sequence> sequence, int64_t now_ms);

  const Sequence &first(int64_t now_ms);  ///< demands that there is one

  /// Takes out the first, of whose tokens so many are to be computed.
  Queued pop(int64_t now_ms, int32_t num_tokens);

  /// A sequence that came through this queue has one more output token.
  static void charge_output(const Sequence &sequence) { sequence.flow->charged += kOutputCost; }

  /// Takes out every request of which `wanted` is true.
  template <class Wanted>
  std::vector<Queued> take_all(Wanted &&wanted);

  void check() const;  ///< asserts that the orders agree; O(waiting), for tests

 private:
  struct Key {
    int64_t value;
    uint64_t arrival;  // of the flow's first request: no two are equal
    Flow *flow;
    auto operator<=>(const Key &other) const {
      return std::pair(value, arrival) <=> std::pair(other.value, other.arrival);
    }
  };
  struct Class {
    std::set<Key> by_charge;     // flows that wait; a key may lag behind its flow's charge
    std::shared_ptr<Flow> last;  // that was served
  };
  using Flows = std::map<std::pair<int32_t, uint64_t>, std::shared_ptr<Flow>>;  // of class and tenant

  int64_t patience(const Flow &flow) const { return patience_ms_ * (1 + flow.priority - kPriorityMin); }
  Flow &next(int64_t now_ms);
  Flow &least(Class &of);
  int64_t floor(Class &of);
  void link(Flow &flow);
  void unlink(Flow &flow);
  void sweep();

  int64_t patience_ms_;
  int32_t size_ = 0;
  Flows flows_;
  std::pair<int32_t, uint64_t> swept_;  // flows up to here
  std::map<int32_t, Class> classes_;
  std::set<Key> by_due_;  // flows that wait
};

template <class Wanted>
std::vector<Queued> FairQueue::take_all(Wanted &&wanted) {
  std::vector<Queued> taken;
  for (auto &[key, flow] : flows_) {
    if (flow->waiting.empty()) continue;
    unlink(*flow);
    std::deque<Queued> kept;
    for (Queued &queued : flow->waiting) {
      if (wanted(queued.sequence())) {
        taken.push_back(std::move(queued));
      } else {
        kept.push_back(std::move(queued));
      }
    }
    flow->waiting = std::move(kept);
    if (!flow->waiting.empty()) link(*flow);
  }
  size_ -= static_cast<int32_t>(taken.size());
  return taken;
}

}  // namespace ts
