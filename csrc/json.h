#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "sha256.h"

namespace ts {

/// What a document may cost before it is refused.
struct JsonLimits {
  size_t max_bytes = 100'000'000;
  size_t max_values = 2'000'000;
  int max_depth = 16;
};

/// Parses a whole document of strict JSON (RFC 8259; no BOM, NUL, comments, duplicate keys or bytes that are not UTF-8).
/// `what` names it in messages. Throws Error (TS_BAD_PLAN).
nlohmann::json parse_json(std::span<const uint8_t> bytes, std::string_view what, const JsonLimits &limits = {});

/// As parse_json, and the bytes are the one canonical spelling: sorted keys, no white space, nothing escaped needlessly.
nlohmann::json parse_canonical_json(std::span<const uint8_t> bytes, std::string_view what,
                                    const JsonLimits &limits = {});

/// A value of a parsed document that knows its place. Every accessor checks, and throws Error (TS_BAD_PLAN) with the place, what
/// was found and what was wanted.
class JsonNode {
 public:
  JsonNode(const nlohmann::json &value, std::string where) : value_(value), where_(std::move(where)) {}

  const std::string &where() const { return where_; }
  const nlohmann::json &value() const { return value_; }

  /// The object's keys are all of `required`, and perhaps some of `optional`.
  void expect_keys(std::initializer_list<std::string_view> required,
                   std::initializer_list<std::string_view> optional = {}) const;
  JsonNode operator[](std::string_view key) const;
  std::optional<JsonNode> find(std::string_view key) const;

  size_t size() const;  ///< of an array
  JsonNode at(size_t index) const;

  int64_t integer(int64_t min, int64_t max) const;
  const std::string &text() const;
  Digest digest() const;  ///< a SHA-256 as 64 hexadecimal digits

  /// Calls body(key, node) for each member of an object, in the order of keys.
  template <class Body>
  void members(Body &&body) const {
    expect_object();
    for (const auto &[key, value] : value_.items()) body(key, JsonNode(value, path(key)));
  }

 private:
  void expect_object() const;
  std::string path(std::string_view key) const;
  [[noreturn]] void wrong(std::string_view wanted) const;

  const nlohmann::json &value_;
  std::string where_;
};

}  // namespace ts
