#include "fair_queue.h"

#include <algorithm>

#include "check.h"

namespace ts {

FairQueue::~FairQueue() {
  for (const auto &[key, flow] : flows_) flow->waiting.clear();  // which hold the flow in turn
}

void FairQueue::push(std::unique_ptr<Sequence> sequence, int64_t now_ms) {
  sweep();
  std::shared_ptr<Flow> &flow = flows_[{sequence->priority, sequence->tenant}];
  if (!flow) {
    flow = std::make_shared<Flow>();
    flow->priority = sequence->priority;
  }
  sequence->flow = flow;
  ++size_;
  const bool waits = !flow->waiting.empty();
  flow->waiting.emplace_back(std::move(sequence));
  if (waits) return;
  flow->charged = std::max(flow->charged, floor(classes_[flow->priority]));
  flow->due_ms = now_ms + patience(*flow);
  link(*flow);
}

const Sequence &FairQueue::first(int64_t now_ms) { return next(now_ms).waiting.front().sequence(); }

Queued FairQueue::pop(int64_t now_ms, int32_t num_tokens) {
  Flow &flow = next(now_ms);
  unlink(flow);
  Queued first = std::move(flow.waiting.front());
  flow.waiting.pop_front();
  --size_;
  flow.charged += num_tokens * kInputCost;
  flow.due_ms = now_ms + patience(flow);
  classes_.at(flow.priority).last = first.sequence().flow;
  if (!flow.waiting.empty()) link(flow);
  return first;
}

Flow &FairQueue::next(int64_t now_ms) {
  TS_ASSERT(!empty(), "nobody waits");
  if (by_due_.begin()->value <= now_ms) return *by_due_.begin()->flow;
  const auto found = std::ranges::find_if(classes_, [](const auto &c) { return !c.second.by_charge.empty(); });
  return least(found->second);
}

/// Of those that wait in the class, the flow that was charged least. Flows are charged without their keys being moved, and
/// charges only grow: so a first key that is up to date is the least.
Flow &FairQueue::least(Class &of) {
  for (;;) {
    const auto begin = of.by_charge.begin();
    Flow &flow = *begin->flow;
    if (begin->value == flow.charged) return flow;
    auto node = of.by_charge.extract(begin);
    node.value().value = flow.key = flow.charged;
    of.by_charge.insert(std::move(node));
  }
}

/// What a flow that begins to wait is lifted to. It falls to what the last one was charged when all who wait leave unserved.
int64_t FairQueue::floor(Class &of) {
  if (!of.by_charge.empty()) return least(of).charged;
  return of.last ? of.last->charged : 0;
}

void FairQueue::link(Flow &flow) {
  const uint64_t arrival = flow.waiting.front().sequence().arrival;
  flow.key = flow.charged;
  classes_[flow.priority].by_charge.insert({flow.key, arrival, &flow});
  by_due_.insert({flow.due_ms, arrival, &flow});
}

void FairQueue::unlink(Flow &flow) {
  const uint64_t arrival = flow.waiting.front().sequence().arrival;
  const size_t erased = classes_.at(flow.priority).by_charge.erase({flow.key, arrival, &flow}) +
                        by_due_.erase({flow.due_ms, arrival, &flow});
  TS_ASSERT(erased == 2, "a flow that waits is in both orders");
}

/// Forgets a flow or two of which nothing is left: that nobody holds, and that would be lifted above what it was charged, whenever
/// it came back. A floor may fall, but never below what its class's last was charged; and the lesser of the two never falls, as
/// whoever waits was lifted to it and who is served last is one of those.
void FairQueue::sweep() {
  for (int i = 0; i < 2 && !flows_.empty(); ++i) {
    auto at = flows_.upper_bound(swept_);
    if (at == flows_.end()) at = flows_.begin();
    swept_ = at->first;
    const std::shared_ptr<Flow> &flow = at->second;
    Class &of = classes_[flow->priority];
    const int64_t least_floor = std::min(floor(of), of.last ? of.last->charged : 0);
    if (flow.use_count() == 1 && flow->charged <= least_floor) flows_.erase(at);
  }
}

void FairQueue::check() const {
  size_t num_waiting = 0, num_flows = 0;
  for (const auto &[key, flow] : flows_) {
    if (flow->waiting.empty()) continue;
    ++num_flows;
    num_waiting += flow->waiting.size();
    const uint64_t arrival = flow->waiting.front().sequence().arrival;
    TS_ASSERT(flow->key <= flow->charged, "charges only grow");
    TS_ASSERT(by_due_.contains({flow->due_ms, arrival, flow.get()}), "a flow that waits has a time when it is due");
    TS_ASSERT(classes_.at(flow->priority).by_charge.contains({flow->key, arrival, flow.get()}), "and is in its class");
    for (const Queued &queued : flow->waiting) {
      TS_ASSERT(queued.sequence().flow == flow, "a request waits in its own flow");
    }
  }
  TS_ASSERT(num_waiting == static_cast<size_t>(size_) && num_flows == by_due_.size(), "nobody is counted twice");
}

}  // namespace ts
