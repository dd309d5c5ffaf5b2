#include <array>
#include <string_view>
#include <utility>

#include "program_fields.h"

namespace ts {
namespace {

constexpr std::array<std::pair<std::string_view, Collective::Kind>, 7> kCollectives = {
    {{"all_reduce", Collective::Kind::all_reduce},
     {"reduce_scatter", Collective::Kind::reduce_scatter},
     {"all_gather", Collective::Kind::all_gather},
     {"all_to_all", Collective::Kind::all_to_all},
     {"slice", Collective::Kind::slice},
     {"send", Collective::Kind::send},
     {"ragged_all_to_all", Collective::Kind::ragged_all_to_all}}};
constexpr std::array<std::pair<std::string_view, bool>, 2> kOwners = {{{"experts", true}, {"tokens", false}}};
constexpr std::array<std::pair<std::string_view, bool>, 2> kGathers = {{{"first", true}, {"second", false}}};
constexpr std::array<std::pair<std::string_view, bool>, 1> kParts = {{{"tokens", true}}};
constexpr std::array<std::pair<std::string_view, Collective::Reduce>, 2> kReductions = {
    {{"sum", Collective::Reduce::sum}, {"max", Collective::Reduce::max}}};
constexpr std::array<std::pair<std::string_view, Collective::Rows>, 3> kRows = {
    {{"1", Collective::Rows::one}, {"T", Collective::Rows::tokens}, {"L", Collective::Rows::logits}}};
constexpr std::array<std::pair<std::string_view, int32_t>, 3> kElementBytes = {{{"f32", 4}, {"bf16", 2}, {"i32", 4}}};

/// "1", "T", "L", or this rank's tokens over an axis, as "T/dp".
void parse_rows(const JsonNode &node, const Mesh &mesh, Collective &c) {
  if (node.text().starts_with("T/")) {
    c.rows = Collective::Rows::tokens;
    c.rows_axis = find_axis(node, node.text().substr(2), mesh);
    if (c.rows_axis == c.axis)
      fail(TS_BAD_PLAN, node.where(), " is ", in_quotes(node.text()), ", the collective's own axis");
    return;
  }
  c.rows = word_of(node, kRows);
}

/// A send's ends, coordinates on its axis.
void parse_ends(const JsonNode &node, Collective &c) {
  c.src = static_cast<int32_t>(node["src"].integer(0, c.num_ranks - 1));
  c.dst = static_cast<int32_t>(node["dst"].integer(0, c.num_ranks - 1));
  if (c.src == c.dst) fail(TS_BAD_PLAN, node.where(), " sends from ", c.src, " to ", c.dst, ", wanted two ranks");
}

/// Of a ragged_all_to_all, what the others have not.
void parse_ragged(const JsonNode &node, Collective &c) {
  constexpr int64_t kMaxExperts = 1 << 16, kMaxRun = 1 << 24, kMaxTop = 1 << 10;
  node.expect_keys({"args", "axis", "collective", "dtype", "experts", "op", "run", "to", "top"}, {"stage", "phase"});
  c.element_bytes = word_of(node["dtype"], kElementBytes);
  c.to_experts = word_of(node["to"], kOwners);
  c.experts = multiple(node["experts"], c.num_ranks, kMaxExperts, c.num_ranks);
  c.top = node["top"].integer(1, kMaxTop);
  c.run = node["run"].integer(1, kMaxRun);
}

}  // namespace

Collective parse_collective_fields(const JsonNode &node, const Mesh &mesh) {
  using Kind = Collective::Kind;
  // with 2^20 tokens and 2^8 ranks no product of an outer's leaves 63 bits
  constexpr int64_t kMaxTimes = 1 << 26, kMaxRun = int64_t{1} << 34;
  Collective c;
  c.kind = word_of(node["collective"], kCollectives);
  const bool reduces = c.kind == Kind::all_reduce || c.kind == Kind::reduce_scatter;
  c.axis = parse_axis(node["axis"], mesh);
  c.num_ranks = mesh.axes[static_cast<size_t>(c.axis)].size;
  if (c.kind == Kind::ragged_all_to_all) {
    parse_ragged(node, c);
    return c;
  }
  if (reduces) {
    node.expect_keys({"args", "axis", "collective", "dtype", "op", "reduce", "rows", "run", "times"},
                     {"parts", "stage", "phase"});
    c.reduce = word_of(node["reduce"], kReductions);
  } else if (c.kind == Kind::all_to_all) {
    node.expect_keys({"args", "axis", "collective", "dtype", "gathers", "op", "part", "rows", "run", "times"},
                     {"parts", "stage", "phase"});
    c.gathers_first = word_of(node["gathers"], kGathers);
    c.part = node["part"].integer(1, kMaxTimes);
  } else if (c.kind == Kind::send) {
    node.expect_keys({"args", "axis", "collective", "dst", "dtype", "op", "rows", "run", "src", "times"}, {"phase"});
  } else {
    node.expect_keys({"args", "axis", "collective", "dtype", "op", "rows", "run", "times"},
                     {"parts", "stage", "phase"});
  }
  if (c.kind == Kind::send) parse_ends(node, c);
  parse_rows(node["rows"], mesh, c);
  if (const auto parts = node.find("parts")) {
    c.tokens = word_of(*parts, kParts);
    if (c.kind == Kind::all_reduce || c.rows != Collective::Rows::one) {
      fail(TS_BAD_PLAN, parts->where(),
           " is 'tokens', wanted it of no all_reduce, and with rows '1': tokens come first");
    }
  }
  const JsonNode dtype = node["dtype"];
  c.element_bytes = word_of(dtype, kElementBytes);
  c.integers = dtype.text() == "i32";
  const bool adds = dtype.text() == "f32" || (c.integers && c.reduce == Collective::Reduce::sum);
  if (reduces && !adds) {
    fail(TS_BAD_PLAN, dtype.where(), " is ", in_quotes(dtype.text()),
         ", wanted 'f32', or 'i32' of a sum: what ranks add in");
  }
  c.times = node["times"].integer(1, kMaxTimes);
  c.run = node["run"].integer(1, kMaxRun / c.part);
  return c;
}

}  // namespace ts
