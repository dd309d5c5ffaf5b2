#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "plan.h"

namespace ts {

/// The limits that a program was arranged for; the scheduler never exceeds them.
struct Limits {
  int32_t max_tokens = 0;   ///< T of a step
  int32_t max_seqs = 0;     ///< S of a step
  int32_t max_context = 0;  ///< tokens of one sequence
  int32_t page_size = 0;    ///< tokens of a page
  int32_t vocab_size = 0;
};

/// A range of the arena, in bytes. Buffers whose lifetimes do not overlap may share memory.
struct Buffer {
  std::string name;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

/// One argument of a launch.
struct Argument {
  enum class Kind : uint8_t { buffer, weight, kv };
  Kind kind = Kind::buffer;
  int32_t index = 0;                ///< of the buffer, or of the layer
  const uint8_t *weight = nullptr;  ///< the entry's bytes, in the mapped file
};

struct Launch {
  std::string kernel;  ///< symbol in the target's shared object
  std::string op;      ///< what it computes, for messages and profiles
  std::vector<Argument> arguments;
};

/// What one step of a target runs, checked against the plan it came from.
struct Program {
  std::string target;
  Limits limits;
  uint64_t arena_bytes = 0;
  std::vector<Buffer> buffers;
  int32_t num_layers = 0;   ///< of the KV cache
  uint64_t page_bytes = 0;  ///< of one layer's page
  std::vector<Launch> launches;
  int32_t logits_buffer = 0;
  int64_t logits_stride = 0;  ///< f32 elements from one row to the next
};

/// Parses `tsp/program/<target>` and checks all of it: ABI, limits against the model, buffers against the arena, arguments
/// against buffers, weights and layers. Throws Error (TS_BAD_PLAN) with the place and both numbers.
Program parse_program(const Plan &plan, std::string_view target);

}  // namespace ts
