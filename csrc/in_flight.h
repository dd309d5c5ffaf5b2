#pragma once

#include <string>
#include <vector>

#include "json.h"
#include "program.h"

namespace ts {

/// A bucket's launches, as they are read: of a collective in two, the one whose "phase" is "finish" ends what began with "start". Ranks
/// have one at a time. In between nobody uses its output, and nobody writes its inputs: a buffer is written by the launch that names it
/// first, so inputs are named before, and what else is named meanwhile lies apart from them. Throws Error (TS_BAD_PLAN).
class InFlight {
 public:
  explicit InFlight(const std::vector<Buffer> &buffers) : buffers_(buffers), named_(buffers.size()) {}

  /// Each launch but a finish, in order.
  void take(const JsonNode &node, const Launch &launch);

  /// The launch, of the ranks of `stage`, that finishes what is in flight.
  Launch finish(const JsonNode &node, int32_t stage);

  /// After the last.
  void end(const JsonNode &launches) const;

 private:
  void start(const JsonNode &node, const Launch &launch);
  void check_apart(const JsonNode &node, const Launch &launch) const;

  const std::vector<Buffer> &buffers_;
  std::vector<bool> named_;  // buffers, by launches so far
  bool any_ = false;
  Launch started_;
};

}  // namespace ts
