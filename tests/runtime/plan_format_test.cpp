// Plans that are sealed as they should be, but say wrong things.

#include <gtest/gtest.h>

#include <chrono>

#include "expect.h"
#include "make_plan.h"
#include "plan.h"

namespace ts {
namespace {

using namespace ts::testing;  // NOLINT(google-build-using-namespace): helpers of these tests

std::string refused(const Bytes &bytes) {
  return refusal([&] { Plan::from_memory(bytes); });
}

std::string with_header(const std::function<void(Json &)> &edit) {
  TestPlan plan = test_plan();
  plan.edit_header = edit;
  return refused(plan.bytes());
}

std::string with_manifest(const std::function<void(Json &)> &edit) {
  TestPlan plan = test_plan();
  plan.edit_manifest = edit;
  return refused(plan.bytes());
}

std::string with_header_text(const std::string &text, const std::string &data = "") {
  return refused(raw_file(text, data));
}

// ---- the header as text ----

TEST(PlanHeader, IsStrictJson) {
  expect_in(with_header_text(""), {"header does not begin as JSON"});
  expect_in(with_header_text("{"), {"header is not valid JSON"});
  expect_in(with_header_text("[]"), {"header is an array, wanted an object"});
  expect_in(with_header_text("\xEF\xBB\xBF{}"), {"header does not begin as JSON"});
  expect_in(with_header_text("{}garbage"), {"header is not valid JSON"});
  expect_in(with_header_text(std::string("{}\0\"x\"", 6)), {"NUL byte at 2"});
  expect_in(with_header_text("{\"a\":1e999}"), {"header is not valid JSON"});
  expect_in(with_header_text("{\"a\":NaN}"), {"header is not valid JSON"});
  expect_in(with_header_text("{/**/}"), {"header is not valid JSON"});
  expect_in(with_header_text("{ }"), {"header is not canonical JSON from byte 1"});
  expect_in(with_header_text(R"({"b":{},"a":{}})"), {"header is not canonical JSON from byte 2"});
  expect_in(with_header_text(R"({"\u0061":{}})"), {"header is not canonical JSON"});
  expect_in(with_header_text("{}" + std::string(120, ' ')), {"bytes of padding"});
  Bytes odd = raw_file("{}", "");
  odd.insert(odd.end(), 8, ' ');
  odd[0] += 8;
  expect_in(refused(odd), {"data begins at byte 72, wanted a multiple of 64"});
}

TEST(PlanHeader, RefusesKeysTwice) {
  expect_in(with_header_text(R"({"a":{},"a":{}})"), {"header has the key 'a' twice"});
  expect_in(with_header_text(R"({"a":{"dtype":"U8","dtype":"U8"}})"), {"header has the key 'dtype' twice"});
  expect_in(with_header_text(R"({"a":{},"\u0061":{}})"), {"header has the key 'a' twice"});  // however it is spelled
}

TEST(PlanHeader, RefusesNamesThatAreNotUtf8) {
  for (const char *bad : {"\xFF", "\xC0\xAF", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xE2\x82", "\\ud800"}) {
    expect_in(with_header_text(std::string("{\"") + bad + "\":{}}"), {"header is not valid JSON"});
  }
  // What is UTF-8, but not fit for a terminal, is escaped in messages.
  expect_in(with_header_text("{\"\x7F\":1}"), {"header.\\x7f is '1', wanted an object"});
  const std::string message = with_header([](Json &h) { h["\x1B[31m"] = h["table"]; });
  EXPECT_EQ(message.find('\x1B'), std::string::npos) << message;
}

TEST(PlanHeader, HasBounds) {
  const std::string deep = std::string(100'000, '[') + std::string(100'000, ']');
  expect_in(with_header_text(deep), {"header nests JSON deeper than"});
  std::string deep_objects;
  for (int i = 0; i < 100'000; ++i) deep_objects += "{\"a\":";
  expect_in(with_header_text(deep_objects), {"header nests JSON deeper than"});

  std::string many = "{";
  for (int i = 0; i < 1'000'000; ++i) {
    std::string number = std::to_string(i);
    number.insert(0, 7 - number.size(), '0');
    many.append(i == 0 ? "" : ",")
        .append("\"")
        .append(number)
        .append(R"(":{"data_offsets":[0,0],"dtype":"U8","shape":[0]})");
  }
  const auto start = std::chrono::steady_clock::now();
  expect_in(with_header_text(many + "}"), {"header has more than 1200000 JSON values"});
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
  std::string members = "{";
  for (int i = 0; i < 100'001; ++i) {
    std::string number = std::to_string(i);
    number.insert(0, 7 - number.size(), '0');
    members.append(i == 0 ? "" : ",").append("\"").append(number).append("\":0");
  }
  expect_in(with_header_text(members + "}"), {"header lists 100001 entries, at most 100000"});
  expect_in(with_header_text("{\"" + std::string(1001, 'n') + "\":{}}"), {"has a name of 1001 bytes"});
}

// ---- tensors ----

std::string with_tensor(const char *tensor) {
  return with_header_text(std::string(R"({"w":)") + tensor + "}", std::string(64, 'd'));
}

TEST(PlanHeader, ChecksTensors) {
  expect_in(with_tensor(R"({"data_offsets":[0,64],"dtype":"U8"})"), {"header.w lacks the key 'shape'"});
  expect_in(with_tensor(R"({"data_offsets":[0,64],"dtype":"U8","more":1,"shape":[64]})"),
            {"header.w has an unknown key 'more'"});
  expect_in(with_tensor(R"({"data_offsets":[0,64],"dtype":"U7","shape":[64]})"),
            {"header.w.dtype is 'U7', not a dtype"});
  expect_in(with_tensor(R"({"data_offsets":[0,64],"dtype":8,"shape":[64]})"),
            {"header.w.dtype is '8', wanted a string"});
  expect_in(with_tensor(R"({"data_offsets":[0,64],"dtype":"U8","shape":64})"),
            {"header.w.shape is '64', wanted an array"});
  expect_in(with_tensor(R"({"data_offsets":[0,64],"dtype":"U8","shape":[-64]})"), {"header.w.shape[0] is '-64'"});
  expect_in(with_tensor(R"({"data_offsets":[0,64],"dtype":"U8","shape":[64.5]})"), {"header.w.shape[0] is '64.5'"});
  expect_in(with_tensor(R"({"data_offsets":[0,64],"dtype":"F32","shape":[15]})"),
            {"shape and dtype make 60 bytes, its offsets 64"});
  expect_in(with_tensor(R"({"data_offsets":[0,64],"dtype":"F4","shape":[127]})"), {"508 bits, wanted whole bytes"});
  expect_in(with_tensor(R"({"data_offsets":[0,64,64],"dtype":"U8","shape":[64]})"), {"data_offsets has 3 numbers"});
  expect_in(with_tensor(R"({"data_offsets":[64,0],"dtype":"U8","shape":[64]})"), {"data_offsets[1] is '0'"});
  expect_in(with_tensor(R"({"data_offsets":[0,65],"dtype":"U8","shape":[65]})"),
            {"data_offsets[1] is '65', wanted an integer from 0 to 64"});
  expect_in(with_tensor(R"({"data_offsets":[0,18446744073709551615],"dtype":"U8","shape":[1]})"), {"data_offsets[1]"});
  expect_in(with_tensor(R"({"data_offsets":[0,64],"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,64]})"),
            {"17 dims, at most 16"});
}

// Products that wrap around 64 bits to just the right number of bytes.
TEST(PlanHeader, CountsShapesWithoutOverflow) {
  for (const char *shape : {"[4294967296,4294967296,64]", "[9223372036854775807,9223372036854775807]",
                            "[2305843009213693960,8]", "[4611686018427387905,64]"}) {
    expect_in(with_tensor((std::string(R"({"data_offsets":[0,64],"dtype":"U8","shape":)") + shape + "}").c_str()),
              {"more bits than 64 bits can count"});
  }
  expect_in(with_tensor(R"({"data_offsets":[0,64],"dtype":"U8","shape":[9223372036854775807,9223372036854775807,0]})"),
            {"make 0 bytes, its offsets 64"});
  expect_in(with_tensor(R"({"data_offsets":[0,64],"dtype":"U8","shape":[9223372036854775808]})"),
            {"shape[0]", "wanted an integer"});
}

TEST(PlanHeader, WantsDataEndToEnd) {
  expect_in(with_header([](Json &h) { h["tsp/graph"]["data_offsets"] = {3201, 3208}, h["tsp/graph"]["shape"] = {7}; }),
            {"after a hole"});
  expect_in(with_header([](Json &h) { h["tsp/graph"]["data_offsets"] = {3199, 3207}, h["tsp/graph"]["shape"] = {8}; }),
            {"inside the data before it"});
  expect_in(with_header([](Json &h) { h["twin"] = h["table"]; }), {"'twin' begins", "inside the data before it"});
  expect_in(with_header([](Json &h) { h.erase("tsp/seal"); }), {"data ends at byte", "the file at"});
  expect_in(with_header([](Json &h) { h.erase("table"); }), {"after a hole"});
}

// ---- what makes it a plan ----

TEST(PlanHeader, TellsOtherFilesAndOtherVersionsApart) {
  expect_in(with_header([](Json &h) { h.erase("__metadata__"); }),
            {"__metadata__.format is '', wanted 'tsp': this safetensors file is no plan"});
  expect_in(with_header([](Json &h) { h["__metadata__"] = {{"format", "pt"}}; }), {"format is 'pt'"});
  expect_in(with_header([](Json &h) { h["__metadata__"]["tsp_schema"] = "4"; }),
            {"tsp_schema is 4, this tsruntime reads 3: update tsruntime"});
  expect_in(with_header([](Json &h) { h["__metadata__"]["tsp_schema"] = "0"; }),
            {"tsp_schema is 0, this tsruntime reads 3: rebuild the plan with this tscompile"});
  expect_in(with_header([](Json &h) { h["__metadata__"]["tsp_schema"] = "one"; }), {"tsp_schema is 'one', wanted '3'"});
  expect_in(with_header([](Json &h) { h["__metadata__"]["tsp_schema"] = "99999999999999999999"; }), {"tsp_schema is"});
  expect_in(with_header([](Json &h) { h["__metadata__"]["tsp_schema"] = 1; }), {"tsp_schema is '1', wanted a string"});
  expect_in(with_header([](Json &h) { h["__metadata__"]["more"] = ""; }), {"__metadata__ has 3 keys, wanted 2"});
  expect_in(with_manifest([](Json &m) { m["schema"] = 7; }),
            {"manifest.schema is 7, this tsruntime reads 3: update tsruntime"});
  expect_in(with_manifest([](Json &m) { m["schema"] = -1; }), {"manifest.schema is -1", "rebuild the plan"});
}

TEST(PlanHeader, WantsWeightsFirstAndAligned) {
  TestPlan odd = test_plan();
  odd.weights["a"] = {"U8", {63}, std::string(63, 'x')};
  expect_in(refused(odd.bytes()), {"weight 'a' is 63 bytes, wanted a multiple of 64"});
  expect_in(with_header([](Json &h) { h["after"] = h["tsp/graph"], h.erase("tsp/graph"); }), {});
  TestPlan late = test_plan();
  late.edit_header = [](Json &h) {
    // the 7 bytes of the graph, then 0 of a weight after it
    const int64_t end = h["tsp/graph"]["data_offsets"][1];
    h["late"] = {{"dtype", "U8"}, {"shape", {0}}, {"data_offsets", {end, end}}};
  };
  expect_in(refused(late.bytes()), {"weight 'late' lies after a reserved entry"});
  expect_in(with_header([](Json &h) { h["tsp/graph"]["dtype"] = "I8"; }),
            {"reserved entry 'tsp/graph' is I8 with 1 dims, wanted U8 with 1"});
  expect_in(with_header([](Json &h) { h["tsp/graph"]["shape"] = {7, 1}; }), {"U8 with 2 dims"});
}

TEST(PlanHeader, WantsItsSeal) {
  expect_in(with_header([](Json &h) { h["tsp/zeal"] = h["tsp/seal"], h.erase("tsp/seal"); }),
            {"the last entry is 'tsp/zeal', wanted 'tsp/seal'"});
  expect_in(with_header([](Json &h) { h["tsp/manifesto"] = h["tsp/manifest"], h.erase("tsp/manifest"); }),
            {"the plan lacks 'tsp/manifest'"});
  expect_in(with_header_text("{\"__metadata__\":{\"format\":\"tsp\",\"tsp_schema\":\"3\"}}"),
            {"the last entry is '', wanted 'tsp/seal'"});
}

// ---- the manifest ----

TEST(PlanManifest, AgreesWithTheHeader) {
  expect_in(with_manifest([](Json &m) { m["entries"].erase("table"); }),
            {"'table' is in the header, but not in the manifest"});
  expect_in(with_manifest([](Json &m) { m["entries"]["ghost"] = m["entries"]["table"]; }),
            {"'ghost' is in the manifest, but not in the header"});
  expect_in(with_manifest([](Json &m) { m["entries"]["table"]["bytes"] = 3264; }),
            {"'table' is 3200 bytes in the header, 3264 in the manifest"});
  expect_in(with_manifest([](Json &m) { m["entries"]["table"]["dtype"] = "I32"; }),
            {"'table' is F32 in the header, 'I32' in the manifest"});
  expect_in(with_manifest([](Json &m) { m["entries"]["table"]["shape"] = {16, 50}; }), {"'table' has another shape"});
  expect_in(with_manifest([](Json &m) { m["entries"]["tsp/seal"] = m["entries"]["tsp/graph"]; }),
            {"'tsp/seal' is listed, but cannot be"});
}

TEST(PlanManifest, ChecksItsEntries) {
  const auto entry = [](const char *name, const char *key, const Json &value) {
    return with_manifest([&](Json &m) { m["entries"][name][key] = value; });
  };
  expect_in(entry("table", "kind", "text"), {"kind is 'text', but its name makes it 'weight'"});
  expect_in(entry("tsp/graph", "kind", "weight"), {"kind is 'weight', but its name makes it 'report'"});
  expect_in(entry("table", "sha256", "abc"), {"sha256 is '\"abc\"', wanted 64 lowercase hexadecimal digits"});
  expect_in(entry("table", "sha256", std::string(64, 'A')), {"wanted 64 lowercase"});
  expect_in(entry("tsp/graph", "sha256", std::string(64, 'a')), {"entry 'tsp/graph' is damaged"});
  expect_in(entry("table", "bytes", -1), {"bytes is '-1'"});
  expect_in(entry("table", "more", 1), {"unknown key 'more'"});
  expect_in(with_manifest([](Json &m) { m["entries"]["table"].erase("sha256"); }), {"lacks the key 'sha256'"});
  expect_in(with_manifest([](Json &m) { m["entries"] = 5; }), {"manifest.entries is '5', wanted an object"});
  expect_in(with_manifest([](Json &m) { m["extra"] = 5; }), {"manifest has an unknown key 'extra'"});
  expect_in(with_manifest([](Json &m) { m = Json::array(); }), {"manifest is an array"});
  expect_in(refused(test_plan().bytes_with_manifest(test_plan().manifest().dump(1))),
            {"manifest is not canonical JSON"});
}

TEST(PlanManifest, ChecksTheModel) {
  const auto model = [](const char *key, const Json &value) {
    return with_manifest([&](Json &m) { m["model"][key] = value; });
  };
  expect_in(model("vocab_size", 0), {"manifest.model.vocab_size is '0', wanted an integer from 1"});
  expect_in(model("vocab_size", 1 << 30), {"manifest.model.vocab_size"});
  expect_in(model("max_context", -1), {"manifest.model.max_context is '-1'"});
  expect_in(model("eos_token_ids", {50}), {"manifest.model.eos_token_ids[0] is '50', wanted an integer from 0 to 49"});
  expect_in(model("eos_token_ids", 1), {"manifest.model.eos_token_ids is '1', wanted an array"});
  expect_in(model("name", 1), {"manifest.model.name"});
  expect_in(with_manifest([](Json &m) { m["model"].erase("max_context"); }),
            {"manifest.model lacks the key 'max_context'"});
}

TEST(PlanManifest, ChecksTheMesh) {
  const auto mesh = [](const Json &value) { return with_manifest([&](Json &m) { m["mesh"] = value; }); };
  const auto axis = [](const Json &name, const Json &size) { return Json::array({name, size}); };
  expect_in(mesh(Json::array()), {"manifest.mesh has 0 axes, wanted 1 to 8"});
  expect_in(mesh(Json::array({axis("tp", 0)})), {"manifest.mesh[0][1] is '0', wanted an integer from 1 to 256"});
  expect_in(mesh(Json::array({axis("ep", 64), axis("tp", 5)})), {"mesh[1][1] is '5', wanted an integer from 1 to 4"});
  expect_in(mesh(Json::array({axis("tp", 2), axis("tp", 2)})), {"mesh[1][0] repeats 'tp'"});
  expect_in(mesh(Json::array({axis("t=p", 2)})), {"mesh[0][0] is 't=p', wanted 1 to 15 lowercase letters"});
  expect_in(mesh(Json::array({axis(1, 2)})), {"mesh[0][0] is '1', wanted a string"});
  expect_in(mesh(Json::array({Json::array({"tp"})})), {"mesh[0] has 1 items, wanted a name and a size"});
  expect_in(mesh("tp"), {"manifest.mesh is"});
  expect_in(with_manifest([](Json &m) { m.erase("mesh"); }), {"manifest lacks the key 'mesh'"});
}

TEST(PlanManifest, ChecksTargets) {
  const auto targets = [](const Json &value) { return with_manifest([&](Json &m) { m["targets"] = value; }); };
  expect_in(targets(Json::array()), {"manifest.targets has 0 targets"});
  expect_in(targets({"cpu-avx2", "cpu-avx2"}), {"manifest.targets[1] repeats 'cpu-avx2'"});
  expect_in(targets({"cpu-avx2", "cpu-amx"}), {"target 'cpu-amx' lacks 'tsp/program/cpu-amx'"});
  expect_in(targets({"cpu-amx"}), {"target 'cpu-amx' lacks"});
  expect_in(targets({"../etc"}), {"manifest.targets[0] is '../etc'"});
  expect_in(targets({""}), {"manifest.targets[0] is ''"});
  expect_in(targets({std::string(32, 'a')}), {"wanted 1 to 31"});
  TestPlan stray = test_plan();
  stray.reserved["tsp/kernels/cpu-amx"] = "kernels";
  expect_in(refused(stray.bytes()), {"'tsp/kernels/cpu-amx' belongs to no listed target"});
}

}  // namespace
}  // namespace ts
