#include "safetensors.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "json.h"
#include "text.h"

namespace ts {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // as the safetensors library has it
constexpr size_t kMaxTensors = 100'000;
constexpr size_t kMaxNameBytes = 1'000;
constexpr size_t kMaxDims = 16;
constexpr uint64_t kAlignment = 64;

struct Dtype {
  std::string_view name;
  uint32_t bits;
};

constexpr std::array<Dtype, 19> kDtypes = {{{"BOOL", 8},
                                            {"U8", 8},
                                            {"I8", 8},
                                            {"F8_E5M2", 8},
                                            {"F8_E4M3", 8},
                                            {"F8_E8M0", 8},
                                            {"F4", 4},
                                            {"F6_E2M3", 6},
                                            {"F6_E3M2", 6},
                                            {"I16", 16},
                                            {"U16", 16},
                                            {"F16", 16},
                                            {"BF16", 16},
                                            {"I32", 32},
                                            {"U32", 32},
                                            {"F32", 32},
                                            {"F64", 64},
                                            {"I64", 64},
                                            {"U64", 64}}};

const Dtype &parse_dtype(const JsonNode &node) {
  const std::string &name = node.text();
  const auto *found = std::ranges::find(kDtypes, name, &Dtype::name);
  if (found == kDtypes.end()) fail(TS_BAD_PLAN, node.where(), " is ", in_quotes(name), ", not a dtype of safetensors");
  return *found;
}

/// The bytes of `shape`, refusing products that leave 64 bits.
uint64_t shape_bytes(const JsonNode &node, const std::vector<int64_t> &shape, const Dtype &dtype) {
  uint64_t bits = dtype.bits;
  // A zero anywhere makes the product zero, however large the others are.
  if (std::ranges::find(shape, 0) != shape.end()) return 0;
  for (const int64_t dim : shape) {
    if (__builtin_mul_overflow(bits, static_cast<uint64_t>(dim), &bits)) {
      fail(TS_BAD_PLAN, node.where(), " is ", in_quotes(node.value().dump()), ": more bits than 64 bits can count");
    }
  }
  if (bits % 8 != 0) fail(TS_BAD_PLAN, node.where(), " of ", dtype.name, " is ", bits, " bits, wanted whole bytes");
  return bits / 8;
}

Tensor parse_tensor(const std::string &name, const JsonNode &node, uint64_t data_begin, uint64_t file_bytes) {
  if (name.empty() || name.size() > kMaxNameBytes) {
    fail(TS_BAD_PLAN, "header: entry ", in_quotes(name), " has a name of ", name.size(), " bytes, wanted 1 to ",
         kMaxNameBytes);
  }
  node.expect_keys({"data_offsets", "dtype", "shape"});
  Tensor tensor;
  tensor.name = name;
  const Dtype &dtype = parse_dtype(node["dtype"]);
  tensor.dtype = dtype.name;
  const JsonNode shape = node["shape"];
  if (shape.size() > kMaxDims) fail(TS_BAD_PLAN, shape.where(), " has ", shape.size(), " dims, at most ", kMaxDims);
  for (size_t i = 0; i < shape.size(); ++i) {
    tensor.shape.push_back(shape.at(i).integer(0, std::numeric_limits<int64_t>::max()));
  }
  const JsonNode offsets = node["data_offsets"];
  if (offsets.size() != 2) fail(TS_BAD_PLAN, offsets.where(), " has ", offsets.size(), " numbers, wanted 2");
  const auto data_bytes = static_cast<int64_t>(file_bytes - data_begin);
  const int64_t begin = offsets.at(0).integer(0, data_bytes);
  const int64_t end = offsets.at(1).integer(begin, data_bytes);
  tensor.begin = data_begin + static_cast<uint64_t>(begin);
  tensor.end = data_begin + static_cast<uint64_t>(end);
  if (const uint64_t wanted = shape_bytes(shape, tensor.shape, dtype); wanted != tensor.bytes()) {
    fail(TS_BAD_PLAN, node.where(), ": shape and dtype make ", wanted, " bytes, its offsets ", tensor.bytes());
  }
  return tensor;
}

/// Data lies end to end from data_begin to the file's end.
void check_contiguous(const std::vector<Tensor> &tensors, uint64_t data_begin, uint64_t file_bytes) {
  uint64_t at = data_begin;
  for (const Tensor &tensor : tensors) {
    if (tensor.begin != at) {
      fail(TS_BAD_PLAN, "header: data of ", in_quotes(tensor.name), " begins at byte ", tensor.begin, " of the file, ",
           tensor.begin > at ? "after a hole" : "inside the data before it", "; wanted ", at);
    }
    at = tensor.end;
  }
  if (at != file_bytes) fail(TS_BAD_PLAN, "header: data ends at byte ", at, ", the file at ", file_bytes);
}

}  // namespace

uint64_t safetensors_data_begin(std::span<const uint8_t> first, uint64_t file_bytes) {
  if (file_bytes < 8 || first.size() < 8) {
    fail(TS_BAD_PLAN, "the file has ", file_bytes, " bytes, not even the 8 of the header's length");
  }
  uint64_t length = 0;
  for (size_t i = 8; i-- > 0;) length = length << 8 | first[i];
  if (length > kMaxHeaderBytes) {
    fail(TS_BAD_PLAN, "header length is ", length, " bytes, at most ", kMaxHeaderBytes, ": this is no plan");
  }
  if (length > file_bytes - 8) {
    fail(TS_BAD_PLAN, "header length is ", length, " bytes, but only ", file_bytes - 8,
         " follow: the file is cut short");
  }
  return 8 + length;
}

SafetensorsHeader parse_safetensors(std::span<const uint8_t> head, uint64_t file_bytes) {
  SafetensorsHeader header;
  header.data_begin = safetensors_data_begin(head, file_bytes);
  if (header.data_begin % kAlignment != 0) {
    fail(TS_BAD_PLAN, "data begins at byte ", header.data_begin, ", wanted a multiple of ", kAlignment);
  }
  std::span<const uint8_t> text = head.subspan(8, header.data_begin - 8);
  const auto padding =
      std::find_if(text.rbegin(), text.rend(), [](uint8_t byte) { return byte != ' '; }) - text.rbegin();
  if (padding >= static_cast<ptrdiff_t>(kAlignment)) {
    fail(TS_BAD_PLAN, "header has ", padding, " bytes of padding, wanted fewer than ", kAlignment);
  }
  text = text.first(text.size() - static_cast<size_t>(padding));

  const nlohmann::json json = parse_canonical_json(text, "header", {.max_values = 12 * kMaxTensors});
  if (json.is_object() && json.size() > kMaxTensors) {
    fail(TS_BAD_PLAN, "header lists ", json.size(), " entries, at most ", kMaxTensors);
  }
  JsonNode(json, "header").members([&](const std::string &name, const JsonNode &node) {
    if (name == "__metadata__") {
      node.members([&](const std::string &key, const JsonNode &value) { header.metadata[key] = value.text(); });
    } else {
      header.tensors.push_back(parse_tensor(name, node, header.data_begin, file_bytes));
    }
  });
  std::ranges::sort(header.tensors, {}, [](const Tensor &t) { return std::tie(t.begin, t.end, t.name); });
  check_contiguous(header.tensors, header.data_begin, file_bytes);
  return header;
}

}  // namespace ts
