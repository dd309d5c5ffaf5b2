// Programs with collectives in two launches: what may stand between them.
#include "in_flight.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "expect.h"
#include "make_plan.h"

namespace ts {
namespace {

using namespace ts::testing;  // NOLINT(google-build-using-namespace): helpers of these tests

const Json kMesh = Json::array({Json::array({"ep", 2}), Json::array({"tp", 4})});

/// The program of ranks with its collectives in two, of which launches 1 to 3 are the first (x -> part), edited.
Program parse(const std::function<void(Json &program, Json &launches)> &edit) {
  TestPlan parts = test_plan_of_ranks(kMesh);
  parts.edit_program("cpu-avx2", [&](Json &program) {
    put_in_two(program, kMesh);
    edit(program, program["buckets"][0]["launches"]);
  });
  const Bytes bytes = parts.bytes();
  return parse_program(*Plan::from_memory(bytes), "cpu-avx2", 5);
}

std::string edited(const std::function<void(Json &launches)> &edit) {
  return refusal([&] { parse([&](Json &, Json &launches) { edit(launches); }); });
}

/// The message where what runs meanwhile writes to the start of a buffer.
std::string aside(int buffer) {
  return refusal([&] {
    parse([&](Json &program, Json &) {
      program["buffers"].back()["offset"] = program["buffers"][static_cast<size_t>(buffer)]["offset"];
    });
  });
}

TEST(InFlight, IsReadInTwo) {
  const std::vector<Launch> launches = parse([](Json &, Json &) {}).buckets[0].launches;
  const Launch &start = launches[1], &finish = launches[3];
  EXPECT_EQ(start.phase, Launch::Phase::start);
  EXPECT_EQ(launches[2].phase, Launch::Phase::whole);
  EXPECT_EQ(finish.phase, Launch::Phase::finish);
  EXPECT_EQ(finish.op, start.op);
  ASSERT_TRUE(finish.collective);
  EXPECT_EQ(finish.collective->kind, Collective::Kind::all_reduce);
  ASSERT_EQ(finish.arguments.size(), 2);
  EXPECT_EQ(finish.arguments[1].index, start.arguments[1].index);
}

TEST(InFlight, IsChecked) {
  expect_in(edited([](Json &l) { l[1]["phase"] = "finish"; }),
            {"buckets[0].launches[1].phase is 'finish', wanted one of start"});
  expect_in(edited([](Json &l) { l[3]["phase"] = "start"; }),
            {"buckets[0].launches[3].phase is 'start' of no collective, wanted 'finish'"});
  expect_in(edited([](Json &l) { l[3]["axis"] = "tp"; }), {"buckets[0].launches[3] has an unknown key 'axis'"});
  expect_in(edited([](Json &l) { l.erase(3); }),
            {"buckets[0].launches[3]: 'op.all_reduce' begins while 'op.all_reduce' is in flight: ranks have one"});
  expect_in(edited([](Json &l) { l[1].erase("phase"); }),
            {"buckets[0].launches[3].op is 'op.all_reduce', but nothing is in flight"});
  expect_in(edited([](Json &l) { l[3]["op"] = "other"; }),
            {"buckets[0].launches[3].op is 'other', but 'op.all_reduce' is in flight"});
  expect_in(edited([](Json &l) { l[3]["args"][0]["buffer"] = 1; }),
            {"buckets[0].launches[3].args[0].buffer is 1, but 'op.all_reduce' gives 4"});
  expect_in(edited([](Json &l) { l[3]["args"] = Json::array(); }),
            {"buckets[0].launches[3].args has 0 items, wanted 1"});
  expect_in(edited([](Json &l) { l.erase(l.size() - 1); }),
            {"buckets[0].launches end while 'op.all_gather' is in flight: wanted a launch that finishes it"});
  // the output, by its name or under another
  expect_in(edited([](Json &l) { l[2]["args"][1]["buffer"] = 4; }),
            {"buckets[0].launches[2] uses buffer 4", "while 'op.all_reduce' is in flight, whose output is bytes"});
  expect_in(aside(4), {"buckets[0].launches[2] uses buffer 7", "whose output is bytes"});
  expect_in(aside(0), {"buckets[0].launches[2] uses buffer 7", "whose input is bytes 0 to 1536"});
  // an input may be read meanwhile, and must have been written before
  EXPECT_EQ(parse([](Json &, Json &l) { l[2]["args"][0] = {{"buffer", 0}}; }).buckets[0].launches[2].arguments[0].index,
            0);
  expect_in(edited([](Json &l) { l.erase(0); }),
            {"buckets[0].launches[0].args[0] ('x') is named by no launch before: nothing has written it"});
  const auto slice = [](const Json &launch) { return launch.value("collective", "") == "slice"; };
  expect_in(edited([&](Json &l) { (*std::ranges::find_if(l, slice))["phase"] = "start"; }),
            {"phase is 'start', but ranks exchange nothing: wanted it without"});
}

}  // namespace
}  // namespace ts
