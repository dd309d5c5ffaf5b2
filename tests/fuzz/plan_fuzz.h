#pragma once

#include <cstdint>
#include <span>

namespace ts::fuzz {

/// How far a plan came.
enum class Stage : uint8_t { header, contents, weights, program, whole, num_stages };

/// Opens bytes as a plan, verifies its weights and reads its programs. Aborts on anything but success or a clean refusal.
Stage try_plan(std::span<const uint8_t> bytes);

/// Puts the right hashes and seal where a damaged plan has wrong ones, as far as its structure can be made out, so that what
/// lies behind them is reached.
void mend(std::span<uint8_t> bytes);

}  // namespace ts::fuzz
