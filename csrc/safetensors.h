#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace ts {

/// One tensor of a safetensors file.
struct Tensor {
  std::string name;
  std::string_view dtype;  ///< "BF16", "F32", "U8", ...; static
  std::vector<int64_t> shape;
  uint64_t begin = 0;  ///< in the file, bytes
  uint64_t end = 0;

  uint64_t bytes() const { return end - begin; }
};

struct SafetensorsHeader {
  std::vector<Tensor> tensors;  ///< in the order of their data
  std::map<std::string, std::string> metadata;
  uint64_t data_begin = 0;  ///< in the file: 8 + the header's length
};

/// Bytes of length and header together, from the file's first eight bytes (fewer if it is shorter). Throws Error (TS_BAD_PLAN) unless that many
/// lie in a file of `file_bytes` and the header is of a sane size.
uint64_t safetensors_data_begin(std::span<const uint8_t> first, uint64_t file_bytes);

/// Checks and parses the header of a file of `file_bytes`, of which `head` holds at least the length and the header: canonical JSON padded with
/// spaces to a multiple of 64, known dtypes, shapes whose bytes equal their offsets, data without holes or overlaps that ends where the file does.
/// Throws Error (TS_BAD_PLAN).
SafetensorsHeader parse_safetensors(std::span<const uint8_t> head, uint64_t file_bytes);

}  // namespace ts
