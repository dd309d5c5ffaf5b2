#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ts {

class JsonNode;

/// What a step computes, as far as its time depends on it. A token of position p reads p + 1 keys.
struct StepLoad {
  int32_t num_tokens = 0;
  int64_t decode_keys = 0;  ///< that tokens of decodes read
  int64_t prefill_keys = 0;
};

/// How long a step takes: the compiler's prediction (`tsp/costs`), scaled by what steps really took. A plain function of what it
/// was told: nothing here reads a clock.
///
/// Each size of step has a scale of its own: an average with a memory of kMemory steps, to which one step adds at most a factor of
/// kMostChange, so that a hiccup is soon forgotten. A size that no step had yet has the scale of the nearest that one had. What a
/// size was told drifts into the others, slowly: one that is avoided because it was slow once is tried again.
class StepCost {
 public:
  /// A step of so many tokens that read no keys.
  struct Point {
    int32_t num_tokens;
    int64_t ns;
  };

  StepCost() = default;  ///< knows nothing

  /// `points`: by ascending num_tokens. `decode_key_ps` and `prefill_key_ps`: of each key that is read.
  StepCost(const std::vector<Point> &points, int64_t decode_key_ps, int64_t prefill_key_ps);

  bool known() const { return !sizes_.empty(); }

  double ns(const StepLoad &load) const;  ///< demands known(); never falls where the load grows

  void learn(const StepLoad &load, int64_t took_ns);  ///< a step of this load took so long

 private:
  static constexpr int kMemory = 8;      // steps
  static constexpr double kDrift = 256;  // steps
  static constexpr double kMostChange = 4;

  struct Size {
    int32_t num_tokens;
    double predicted_ns;
    double scale = 1;            // measured / predicted
    double ns = 0;               // scaled, but never less than that of a smaller size
    double key_scale = 1;        // the same of its keys
    int num_learnt = 0;          // steps, kMemory at most
    size_t distance = SIZE_MAX;  // without any: of the size whose scale it has
  };

  size_t size_of(int32_t num_tokens) const;
  double between(int32_t num_tokens, double Size::*value) const;
  double keys_ns(const StepLoad &load) const;
  void keep_order();

  std::vector<Size> sizes_;
  double decode_key_ns_ = 0, prefill_key_ns_ = 0;
};

/// A target's part of `tsp/costs`. Throws Error (TS_BAD_PLAN).
StepCost parse_step_cost(const JsonNode &node);

}  // namespace ts
