#include "in_flight.h"

#include "text.h"

namespace ts {

void InFlight::take(const JsonNode &node, const Launch &launch) {
  if (any_ && launch.collective && launch.collective->exchanges()) {
    fail(TS_BAD_PLAN, node.where(), ": ", in_quotes(launch.op), " begins while ", in_quotes(started_.op),
         " is in flight: ranks have one collective at a time");
  }
  if (any_) check_apart(node, launch);
  if (launch.phase == Launch::Phase::start) start(node, launch);
  for (const Argument &argument : launch.arguments) {
    if (argument.kind == Argument::Kind::buffer) named_[static_cast<size_t>(argument.index)] = true;
  }
}

void InFlight::start(const JsonNode &node, const Launch &launch) {
  if (!launch.collective || !launch.collective->exchanges()) {
    fail(TS_BAD_PLAN, node["phase"].where(), " is 'start', but ranks exchange nothing: wanted it without");
  }
  for (size_t i = 0; i + 1 < launch.arguments.size(); ++i) {
    const auto index = static_cast<size_t>(launch.arguments[i].index);
    if (named_[index]) continue;
    fail(TS_BAD_PLAN, node["args"].at(i).where(), " (", in_quotes(buffers_[index].name),
         ") is named by no launch before: nothing has written it");
  }
  started_ = launch;
  any_ = true;
}

void InFlight::check_apart(const JsonNode &node, const Launch &launch) const {
  for (const Argument &argument : launch.arguments) {
    if (argument.kind != Argument::Kind::buffer) continue;
    const Buffer &used = buffers_[static_cast<size_t>(argument.index)];
    for (size_t i = 0; i < started_.arguments.size(); ++i) {
      const bool is_output = i + 1 == started_.arguments.size();
      const int32_t index = started_.arguments[i].index;
      if (!is_output && index == argument.index) continue;  // it may be read
      const Buffer &held = buffers_[static_cast<size_t>(index)];
      if (used.offset >= held.offset + held.bytes || held.offset >= used.offset + used.bytes) continue;
      fail(TS_BAD_PLAN, node.where(), " uses buffer ", argument.index, ", bytes ", used.offset, " to ",
           used.offset + used.bytes, " of the arena, while ", in_quotes(started_.op), " is in flight, whose ",
           is_output ? "output" : "input", " is bytes ", held.offset, " to ", held.offset + held.bytes);
    }
  }
}

Launch InFlight::finish(const JsonNode &node, int32_t stage) {
  node.expect_keys({"args", "op", "phase"}, {"stage"});
  const JsonNode op = node["op"], phase = node["phase"];
  if (phase.text() != "finish") {
    fail(TS_BAD_PLAN, phase.where(), " is ", in_quotes(phase.text()), " of no collective, wanted 'finish'");
  }
  if (!any_ || op.text() != started_.op) {
    fail(TS_BAD_PLAN, op.where(), " is ", in_quotes(op.text()), ", but ",
         any_ ? in_quotes(started_.op) : std::string("nothing"), " is in flight");
  }
  const int32_t output = started_.arguments.back().index;
  const JsonNode args = node["args"];
  if (args.size() != 1) fail(TS_BAD_PLAN, args.where(), " has ", args.size(), " items, wanted 1");
  const JsonNode given = args.at(0)["buffer"];
  if (const int64_t index = given.integer(0, static_cast<int64_t>(buffers_.size()) - 1); index != output) {
    fail(TS_BAD_PLAN, given.where(), " is ", index, ", but ", in_quotes(started_.op), " gives ", output);
  }
  if (stage != started_.stage) {
    fail(TS_BAD_PLAN, node.where(), " is of stage ", stage, ", but ", in_quotes(started_.op), " began on stage ",
         started_.stage);
  }
  any_ = false;
  Launch launch = started_;
  launch.phase = Launch::Phase::finish;
  return launch;
}

void InFlight::end(const JsonNode &launches) const {
  if (any_) {
    fail(TS_BAD_PLAN, launches.where(), " end while ", in_quotes(started_.op),
         " is in flight: wanted a launch that finishes it");
  }
}

}  // namespace ts
