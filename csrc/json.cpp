#include "json.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "text.h"

namespace ts {
namespace {

using Json = nlohmann::json;

std::string_view as_text(std::span<const uint8_t> bytes) {
  return {reinterpret_cast<const char *>(bytes.data()), bytes.size()};
}

/// Builds the tree while the parser runs, and refuses what the tree would hide (duplicate keys) or what is too large to build.
/// (The library's own callback for that looks through the parent after every child: quadratic.)
class Builder final : public nlohmann::json_sax<Json> {
 public:
  Builder(std::string_view what, const JsonLimits &limits) : what_(what), limits_(limits) {}

  Json take() { return std::move(root_); }

  bool null() override { return put(nullptr) != nullptr; }
  bool boolean(bool value) override { return put(value) != nullptr; }
  bool number_integer(int64_t value) override { return put(value) != nullptr; }
  bool number_unsigned(uint64_t value) override { return put(value) != nullptr; }
  bool number_float(double value, const std::string &) override { return put(value) != nullptr; }
  bool string(std::string &value) override { return put(std::move(value)) != nullptr; }
  bool binary(Json::binary_t &) override { return false; }  // not in JSON text
  bool start_object(size_t) override { return open(Json::value_t::object); }
  bool start_array(size_t) override { return open(Json::value_t::array); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(std::string &name) override {
    const auto [member, is_new] = open_.back()->emplace(name, nullptr);
    if (!is_new) fail(TS_BAD_PLAN, what_, " has the key ", in_quotes(name), " twice");
    member_ = &*member;
    return true;
  }

  bool parse_error(size_t, const std::string &, const nlohmann::detail::exception &error) override {
    fail(TS_BAD_PLAN, what_, " is not valid JSON: ", in_quotes(error.what()));
  }

 private:
  Json *put(Json value) {
    if (++num_values_ > limits_.max_values) {
      fail(TS_BAD_PLAN, what_, " has more than ", limits_.max_values, " JSON values");
    }
    Json *place = &root_;
    if (!open_.empty() && open_.back()->is_array()) {
      open_.back()->push_back(nullptr);
      place = &open_.back()->back();
    } else if (!open_.empty()) {
      place = member_;
    }
    *place = std::move(value);
    return place;
  }

  bool open(Json::value_t type) {
    if (static_cast<int>(open_.size()) >= limits_.max_depth) {
      fail(TS_BAD_PLAN, what_, " nests JSON deeper than ", limits_.max_depth);
    }
    open_.push_back(put(type));  // stays where it is: its parent does not grow while it is open
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  std::string_view what_;
  const JsonLimits &limits_;
  Json root_;
  std::vector<Json *> open_;
  Json *member_ = nullptr;  // of the innermost object, the one whose value comes next
  size_t num_values_ = 0;
};

}  // namespace

Json parse_json(std::span<const uint8_t> bytes, std::string_view what, const JsonLimits &limits) {
  const std::string_view text = as_text(bytes);
  if (text.size() > limits.max_bytes) {
    fail(TS_BAD_PLAN, what, " is ", text.size(), " bytes of JSON, at most ", limits.max_bytes, " are read");
  }
  // The parser takes a NUL for the end, and skips a byte order mark.
  if (const size_t nul = text.find('\0'); nul != std::string_view::npos) {
    fail(TS_BAD_PLAN, what, " has a NUL byte at ", nul, ", wanted JSON text");
  }
  if (text.empty() || static_cast<uint8_t>(text[0]) == 0xEF) fail(TS_BAD_PLAN, what, " does not begin as JSON text");
  Builder builder(what, limits);
  Json::sax_parse(text.begin(), text.end(), &builder);
  return builder.take();
}

Json parse_canonical_json(std::span<const uint8_t> bytes, std::string_view what, const JsonLimits &limits) {
  Json value = parse_json(bytes, what, limits);
  const std::string_view found = as_text(bytes);
  const std::string wanted = value.dump();
  if (found != wanted) {
    const auto differs = std::mismatch(found.begin(), found.end(), wanted.begin(), wanted.end()).first - found.begin();
    fail(TS_BAD_PLAN, what, " is not canonical JSON from byte ", differs, " on: found ",
         in_quotes(found.substr(differs, 24)), ", wanted ", in_quotes(std::string_view(wanted).substr(differs, 24)));
  }
  return value;
}

void JsonNode::wrong(std::string_view wanted) const {
  const std::string found =
      value_.is_structured() ? (value_.is_array() ? "an array" : "an object") : in_quotes(value_.dump());
  fail(TS_BAD_PLAN, where_, " is ", found, ", wanted ", wanted);
}

void JsonNode::expect_object() const {
  if (!value_.is_object()) wrong("an object");
}

std::string JsonNode::path(std::string_view key) const { return where_ + "." + one_line(key); }

void JsonNode::expect_keys(std::initializer_list<std::string_view> required,
                           std::initializer_list<std::string_view> optional) const {
  expect_object();
  for (const std::string_view key : required) {
    if (!value_.contains(key)) fail(TS_BAD_PLAN, where_, " lacks the key ", in_quotes(key));
  }
  for (const auto &[key, value] : value_.items()) {
    const auto is_key = [&key = key](std::string_view known) { return known == key; };
    if (std::ranges::none_of(required, is_key) && std::ranges::none_of(optional, is_key)) {
      fail(TS_BAD_PLAN, where_, " has an unknown key ", in_quotes(key));
    }
  }
}

std::optional<JsonNode> JsonNode::find(std::string_view key) const {
  expect_object();
  const auto found = value_.find(key);
  if (found == value_.end()) return std::nullopt;
  return JsonNode(*found, path(key));
}

JsonNode JsonNode::operator[](std::string_view key) const {
  std::optional<JsonNode> node = find(key);
  if (!node) fail(TS_BAD_PLAN, where_, " lacks the key ", in_quotes(key));
  return *std::move(node);
}

size_t JsonNode::size() const {
  if (!value_.is_array()) wrong("an array");
  return value_.size();
}

JsonNode JsonNode::at(size_t index) const { return {value_.at(index), where_ + "[" + std::to_string(index) + "]"}; }

int64_t JsonNode::integer(int64_t min, int64_t max) const {
  const auto wanted = [&] { return "an integer from " + std::to_string(min) + " to " + std::to_string(max); };
  if (!value_.is_number_integer()) wrong(wanted());
  if (value_.is_number_unsigned() && value_.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) wrong(wanted());
  const auto number = value_.get<int64_t>();
  if (number < min || number > max) wrong(wanted());
  return number;
}

const std::string &JsonNode::text() const {
  if (!value_.is_string()) wrong("a string");
  return value_.get_ref<const std::string &>();
}

Digest JsonNode::digest() const {
  const std::optional<Digest> digest = from_hex(text());
  if (!digest) wrong("64 lowercase hexadecimal digits");
  return *digest;
}

}  // namespace ts
