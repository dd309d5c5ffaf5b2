#include "step_cost.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "check.h"
#include "json.h"
#include "text.h"

namespace ts {

StepCost::StepCost(const std::vector<Point> &points, int64_t decode_key_ps, int64_t prefill_key_ps)
    : decode_key_ns_(static_cast<double>(decode_key_ps) / 1e3),
      prefill_key_ns_(static_cast<double>(prefill_key_ps) / 1e3) {
  TS_ASSERT(!points.empty() && std::ranges::is_sorted(points, {}, &Point::num_tokens), "sizes are in order");
  for (const Point &point : points) sizes_.push_back({point.num_tokens, static_cast<double>(point.ns)});
  keep_order();
}

double StepCost::ns(const StepLoad &load) const {
  TS_ASSERT(known(), "a cost that nobody has predicted");
  return between(load.num_tokens, &Size::ns) + keys_ns(load) * between(load.num_tokens, &Size::key_scale);
}

void StepCost::learn(const StepLoad &load, int64_t took_ns) {
  if (!known() || took_ns <= 0) return;
  const double predicted = between(load.num_tokens, &Size::predicted_ns) + keys_ns(load);
  const size_t at = size_of(load.num_tokens);
  Size &mine = sizes_[at];
  const double measured =
      std::clamp(static_cast<double>(took_ns) / predicted, mine.scale / kMostChange, mine.scale * kMostChange);
  mine.num_learnt = std::min(mine.num_learnt + 1, kMemory);
  mine.scale += (measured - mine.scale) / mine.num_learnt;
  for (size_t i = 0; i < sizes_.size(); ++i) {
    Size &size = sizes_[i];
    const size_t distance = i < at ? at - i : i - at;
    if (size.num_learnt > 0) {
      size.scale += (mine.scale - size.scale) / kDrift;
    } else if (distance <= size.distance) {
      size.scale = mine.scale;
      size.distance = distance;
    }
  }
  keep_order();
}

double StepCost::keys_ns(const StepLoad &load) const {
  return static_cast<double>(load.decode_keys) * decode_key_ns_ +
         static_cast<double>(load.prefill_keys) * prefill_key_ns_;
}

/// The last size that is not above, or the first.
size_t StepCost::size_of(int32_t num_tokens) const {
  const auto above = std::ranges::upper_bound(sizes_, num_tokens, {}, &Size::num_tokens);
  return above == sizes_.begin() ? 0 : static_cast<size_t>(above - sizes_.begin()) - 1;
}

/// Linear between the sizes; that of the last one beyond it.
double StepCost::between(int32_t num_tokens, double Size::*value) const {
  const size_t i = size_of(num_tokens);
  const Size &low = sizes_[i];
  if (i + 1 == sizes_.size() || num_tokens <= low.num_tokens) return low.*value;
  const Size &high = sizes_[i + 1];
  const double part = static_cast<double>(num_tokens - low.num_tokens) / (high.num_tokens - low.num_tokens);
  return low.*value + part * (high.*value - low.*value);
}

void StepCost::keep_order() {
  double ns = 0, key_scale = 0;
  for (Size &size : sizes_) {
    size.ns = ns = std::max(ns, size.predicted_ns * size.scale);
    size.key_scale = key_scale = std::max(key_scale, size.scale);
  }
}

StepCost parse_step_cost(const JsonNode &node) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 1'000'000;
  node.expect_keys({"decode_key_ps", "prefill_key_ps", "step_ns"});
  std::vector<StepCost::Point> points;
  const JsonNode steps = node["step_ns"];
  for (size_t i = 0; i < steps.size(); ++i) {
    const JsonNode point = steps.at(i);
    if (point.size() != 2) fail(TS_BAD_PLAN, point.where(), " has ", point.size(), " items, wanted tokens and ns");
    const int64_t least = points.empty() ? 1 : points.back().num_tokens + 1;
    const int64_t num_tokens = point.at(0).integer(least, std::numeric_limits<int32_t>::max());
    points.push_back({static_cast<int32_t>(num_tokens), point.at(1).integer(1, kMost)});
  }
  if (points.empty()) fail(TS_BAD_PLAN, steps.where(), " is empty, wanted at least one step");
  return {points, node["decode_key_ps"].integer(0, kMost), node["prefill_key_ps"].integer(0, kMost)};
}

}  // namespace ts
