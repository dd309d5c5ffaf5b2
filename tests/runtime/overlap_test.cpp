// Two batches in flight: the younger one is scheduled while the older one runs.
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "allocations.h"
#include "engine_core.h"
#include "toy.h"

namespace ts {
namespace {

using toy::Harness;
using toy::request;

EngineOptions ahead() {
  EngineOptions o = toy::small();
  o.scheduler.ahead = true;
  return o;
}

/// All that a kernel sees of a step.
std::vector<int32_t> arrays_of(const Batch &batch) {
  const ts_batch &b = batch.arrays();
  std::vector<int32_t> all = {b.num_tokens, b.num_seqs, b.num_logits};
  all.insert(all.end(), b.token_ids, b.token_ids + b.num_tokens);
  all.insert(all.end(), b.positions, b.positions + b.num_tokens);
  all.insert(all.end(), b.slots, b.slots + b.num_tokens);
  all.insert(all.end(), b.query_start, b.query_start + b.num_seqs + 1);
  all.insert(all.end(), b.context_len, b.context_len + b.num_seqs);
  all.insert(all.end(), b.logit_rows, b.logit_rows + b.num_logits);
  all.insert(all.end(), b.page_table, b.page_table + ptrdiff_t{b.num_seqs} * b.page_table_stride);
  return all;
}

/// A scheduler whose tokens the test says.
struct Said {
  explicit Said(const EngineOptions &options) : options(options), scheduler(options.scheduler) {}

  void submit(const toy::Request &r) { scheduler.submit(make_sequence(r.abi(), limits_of(options))); }

  static std::vector<Outcome> say(const Batch &batch, int32_t token) {
    return std::vector<Outcome>(static_cast<size_t>(batch.num_logits()), Outcome{token, {}});
  }

  /// Everything that is in flight is committed, and all requests end.
  void finish(std::optional<Batch> &batch) {
    auto outcomes = say(*batch, 9);
    scheduler.commit(std::move(*batch), outcomes);
    scheduler.cancel_all();
    scheduler.end_leases();
    scheduler.check();
    EXPECT_EQ(scheduler.pool().num_available(), options.scheduler.num_pages);
  }

  std::vector<Finished> finished() {
    std::vector<Finished> all;
    scheduler.take_finished(all);
    return all;
  }

  EngineOptions options;
  Scheduler scheduler;
};

TEST(Overlap, OutputsAreThoseOfEachRequestAlone) {
  for (const int32_t num_pages : {40, 256}) {
    EngineOptions o = ahead();
    o.scheduler.num_pages = num_pages;
    Harness h(o);
    std::vector<toy::Request> requests;
    for (uint64_t id = 1; id <= 24; ++id) {
      toy::Request r =
          request(id, static_cast<int32_t>(1 + id * 5 % 60), static_cast<int32_t>(1 + id * 7 % 40), id % 3 + 1);
      if (id % 4 == 0) r.ignore_eos = 0, r.stop = {7, 8, 9, 10, 11, 12};
      if (id % 5 == 0) r.frequency_penalty = 0.5F;  // what the sampler must know has come by then
      requests.push_back(r);
      h.submit(r);
    }
    int64_t num_steps = 0;
    while (h.step()) ++num_steps;
    for (const toy::Request &r : requests) toy::expect_solo(h, r, o);
    EXPECT_GT(h.num_ahead, num_steps / 2);
    EXPECT_EQ(h.scheduler.pool().num_available(), num_pages);
  }
}

TEST(Overlap, TheYoungerHasPlaceholdersAndTheOlderStaysAsItIs) {
  Said s(ahead());
  s.submit(request(1, 7, 20));  // its next token fills a page, the one after that takes another
  s.submit(request(2, 40, 20));
  std::optional<Batch> older = s.scheduler.schedule();
  const std::vector<int32_t> before = arrays_of(*older);
  s.submit(request(3, 3, 20));
  std::optional<Batch> younger = s.scheduler.schedule_ahead(*older);
  EXPECT_EQ(arrays_of(*older), before);
  const ts_batch &b = younger->arrays();
  ASSERT_EQ(b.num_seqs, 3);
  EXPECT_EQ(b.token_ids[0], BatchArrays::kToCome);
  EXPECT_EQ(b.positions[0], 7);
  EXPECT_EQ(b.query_start[2] - b.query_start[1], 40 - 25) << "the rest of the prompt, which waits for nothing";
  EXPECT_NE(b.token_ids[1], BatchArrays::kToCome);
  auto outcomes = Said::say(*older, 5);
  younger->fill(*older, outcomes);
  EXPECT_EQ(b.token_ids[0], 5);
  const std::vector<int32_t> filled = arrays_of(*younger);
  s.scheduler.commit(std::move(*older), outcomes, 0, &*younger);
  s.scheduler.check(&*younger);
  EXPECT_EQ(arrays_of(*younger), filled);
  EXPECT_EQ(younger->sequence(0).num_outputs(), 1);
  s.finish(younger);
}

TEST(Overlap, WhoHasAllThatItAskedForIsLeftOut) {
  Said s(ahead());
  s.submit(request(1, 4, 1));
  s.submit(request(2, 4, 3));
  std::optional<Batch> older = s.scheduler.schedule();
  std::optional<Batch> younger = s.scheduler.schedule_ahead(*older);
  EXPECT_EQ(younger->arrays().num_seqs, 1);
  auto outcomes = Said::say(*older, 5);
  younger->fill(*older, outcomes);
  s.scheduler.commit(std::move(*older), outcomes, 0, &*younger);
  EXPECT_EQ(s.finished().at(0).id(), 1);
  s.scheduler.check(&*younger);
  s.finish(younger);
}

/// Whatever ends it, what it has in the younger batch stays there, and nobody wants its logits.
TEST(Overlap, WhoEndsEarlyKeepsItsPagesUntilTheYoungerIsCommitted) {
  for (const bool fails : {false, true}) {
    for (const int32_t lease_ms : {0, 1000}) {
      Said s(ahead());
      toy::Request ends = request(1, 8, 20);
      ends.stop = {5};
      ends.session = 1;
      ends.lease_ms = lease_ms;
      s.submit(ends);
      s.submit(request(2, 3, 20));
      std::optional<Batch> older = s.scheduler.schedule();
      std::optional<Batch> younger = s.scheduler.schedule_ahead(*older);
      const int32_t available = s.scheduler.pool().num_available();
      auto outcomes = Said::say(*older, 5);
      if (fails) outcomes[0] = {Outcome::kNone, "infinite"};
      younger->fill(*older, outcomes);
      s.scheduler.commit(std::move(*older), outcomes, 0, &*younger);
      s.scheduler.check(&*younger);
      EXPECT_EQ(s.finished().at(0).finish(), fails ? TS_FINISH_ERROR : TS_FINISH_STOP)
          << "its last event does not wait";
      EXPECT_EQ(s.scheduler.pool().num_available(), available);
      EXPECT_EQ(s.scheduler.num_leases(), !fails && lease_ms > 0 ? 1 : 0);
      EXPECT_FALSE(younger->wants(0));
      EXPECT_TRUE(younger->wants(1));

      std::optional<Batch> third = s.scheduler.schedule_ahead(*younger);
      EXPECT_EQ(third->arrays().num_seqs, 1);
      outcomes = Said::say(*younger, 6);
      third->fill(*younger, outcomes);
      s.scheduler.commit(std::move(*younger), outcomes, 0, &*third);
      s.scheduler.check(&*third);
      const int32_t kept = !fails && lease_ms > 0 ? 2 : 0;  // pages of its prompt
      EXPECT_EQ(s.scheduler.pool().num_available(), s.options.scheduler.num_pages - 2 - kept);
      EXPECT_TRUE(s.finished().empty());
      if (fails) {
        s.submit(ends);
        outcomes = Said::say(*third, 6);
        std::optional<Batch> again = s.scheduler.schedule_ahead(*third);
        EXPECT_EQ(again->running(1).num_cached, 0) << "nothing of it is found";
        again->fill(*third, outcomes);
        s.scheduler.commit(std::move(*third), outcomes, 0, &*again);
        s.finish(again);
      } else {
        s.finish(third);
      }
    }
  }
}

TEST(Overlap, CancelledAndLateOnesEndWithTheBatchInFlight) {
  Said s(ahead());
  toy::Request late = request(2, 4, 20);
  late.timeout_ms = 10;
  s.submit(request(1, 4, 20));
  s.submit(late);
  s.submit(request(3, 4, 20));
  std::optional<Batch> older = s.scheduler.schedule();
  s.submit(request(4, 4, 20));
  s.scheduler.cancel(1, &*older);
  s.scheduler.cancel(4, &*older);
  s.scheduler.cancel(99, &*older);
  s.scheduler.set_time(10, &*older);
  EXPECT_EQ(s.finished().size(), 1) << "who waits need not wait for that";
  std::optional<Batch> younger = s.scheduler.schedule_ahead(*older);
  ASSERT_EQ(younger->arrays().num_seqs, 1);
  EXPECT_EQ(younger->running(0).id, 3);
  auto outcomes = Said::say(*older, 5);
  younger->fill(*older, outcomes);
  s.scheduler.commit(std::move(*older), outcomes, 0, &*younger);
  const std::vector<Finished> ended = s.finished();
  ASSERT_EQ(ended.size(), 2);
  EXPECT_EQ(ended[0].finish(), TS_FINISH_CANCELLED);
  EXPECT_EQ(ended[1].message(), "the request's timeout of 0.010 s is over: 1 of at most 20 tokens were made");
  s.scheduler.check(&*younger);
  EXPECT_EQ(s.scheduler.pool().num_available(), s.options.scheduler.num_pages - 2);
  s.finish(younger);
}

TEST(Overlap, CancellingAllEndsAllWithTheBatchInFlight) {
  Said s(ahead());
  for (uint64_t id = 1; id <= 3; ++id) s.submit(request(id, 20, 20));
  std::optional<Batch> older = s.scheduler.schedule();  // the second is in the middle of its prompt, the third waits
  s.scheduler.cancel_all(&*older);
  EXPECT_FALSE(s.scheduler.schedule_ahead(*older).has_value());
  auto outcomes = Said::say(*older, 5);
  s.scheduler.commit(std::move(*older), outcomes);
  EXPECT_EQ(s.finished().size(), 3);
  EXPECT_TRUE(s.scheduler.idle());
  s.scheduler.check();
  EXPECT_EQ(s.scheduler.pool().num_available(), s.options.scheduler.num_pages);
}

/// Two that prefill one prompt beside each other: once sealed, the page of one of them is the other's too, while the batch in flight
/// reads both.
TEST(Overlap, APageWhoseContentWasHereAlreadyStaysUntilTheYoungerIsCommitted) {
  Said s(ahead());
  s.submit(request(1, 8, 20, 7));
  s.submit(request(2, 8, 20, 7));
  std::optional<Batch> older = s.scheduler.schedule();
  std::optional<Batch> younger = s.scheduler.schedule_ahead(*older);
  const int32_t available = s.scheduler.pool().num_available();
  auto outcomes = Said::say(*older, 5);
  younger->fill(*older, outcomes);
  s.scheduler.commit(std::move(*older), outcomes, 0, &*younger);
  s.scheduler.check(&*younger);
  EXPECT_EQ(s.scheduler.pool().num_available(), available);
  std::optional<Batch> third = s.scheduler.schedule_ahead(*younger);
  const ts_batch &b = third->arrays();
  EXPECT_EQ(b.page_table[0], b.page_table[b.page_table_stride]) << "the step after reads one of them";
  outcomes = Said::say(*younger, 6);
  third->fill(*younger, outcomes);
  s.scheduler.commit(std::move(*younger), outcomes, 0, &*third);
  EXPECT_EQ(s.scheduler.pool().num_available(), available + 2);
  s.finish(third);
}

TEST(Overlap, AFailedStepTakesTheOneBehindItBack) {
  const EngineOptions o = ahead();
  Harness h(o);
  for (uint64_t id = 1; id <= 3; ++id) h.submit(request(id, 6, 10));
  h.step();
  ASSERT_TRUE(h.is_in_flight());
  for (uint64_t id = 4; id <= 6; ++id) h.submit(request(id, 6, 10));
  h.fail("broken");
  EXPECT_FALSE(h.is_in_flight());
  h.scheduler.check();
  h.run();
  for (uint64_t id = 1; id <= 3; ++id) EXPECT_EQ(h.results.at(id).message, "broken");
  for (uint64_t id = 4; id <= 6; ++id) toy::expect_solo(h, request(id, 6, 10), o);
  EXPECT_EQ(h.scheduler.pool().num_available(), o.scheduler.num_pages);
}

/// Then the next step is scheduled after the commit, as without.
TEST(Overlap, WhatMustBeKnownFirstIsWaitedFor) {
  const auto goes_ahead = [](const EngineOptions &o, const std::vector<toy::Request> &requests) {
    Said s(o);
    for (const toy::Request &r : requests) s.submit(r);
    std::optional<Batch> older = s.scheduler.schedule();
    std::optional<Batch> younger = s.scheduler.schedule_ahead(*older);
    const bool ahead = younger.has_value();
    auto outcomes = Said::say(*older, 5);
    if (ahead) younger->fill(*older, outcomes);
    s.scheduler.commit(std::move(*older), outcomes, 0, ahead ? &*younger : nullptr);
    std::optional<Batch> last = ahead ? std::move(younger) : s.scheduler.schedule();
    if (ahead) younger.reset();
    if (last) s.finish(last);
    return ahead;
  };
  EXPECT_TRUE(goes_ahead(ahead(), {request(1, 4, 8)}));
  EXPECT_FALSE(goes_ahead(ahead(), {request(1, 4, 1)})) << "nobody goes on";
  EngineOptions drafts = ahead();
  drafts.scheduler.max_draft = 4;
  EXPECT_FALSE(goes_ahead(drafts, {request(1, 4, 8)})) << "what is guessed follows what comes";
  toy::Request penalties = request(1, 4, 8);
  penalties.presence_penalty = 1;
  EXPECT_TRUE(goes_ahead(drafts, {penalties})) << "who has penalties does not guess";
  EngineOptions recurrent = ahead();
  recurrent.scheduler.groups = {{}, {CacheGroup::Kind::recurrent}};
  EXPECT_FALSE(goes_ahead(recurrent, {request(1, 4, 8)})) << "a state may stay where it is";
  EngineOptions small = ahead();
  small.scheduler.num_pages = 5;
  EXPECT_FALSE(goes_ahead(small, {request(1, 8, 8), request(2, 8, 8)})) << "somebody is to be preempted";
  EXPECT_TRUE(goes_ahead(small, {request(1, 8, 8), request(2, 3, 8)}));
}

TEST(Overlap, ASteadyDecodingStepDoesNotAllocate) {
  if (!allocations::kReplaced) GTEST_SKIP() << "a sanitizer has its own operator new";
  EngineOptions o = ahead();
  o.scheduler.max_context = 4096;
  o.scheduler.num_pages = 4096;
  Said s(o);
  for (uint64_t id = 1; id <= 8; ++id) s.submit(request(id, 4, 2000));
  std::optional<Batch> older = s.scheduler.schedule();
  std::vector<Outcome> outcomes(8);
  std::vector<Finished> finished;
  int64_t before = 0;
  for (int i = 0; i < 200; ++i) {
    if (i == 8) before = allocations::count;
    std::optional<Batch> younger = s.scheduler.schedule_ahead(*older);
    for (Outcome &outcome : outcomes) outcome.token = 4 + i % 50;
    younger->fill(*older, outcomes);
    s.scheduler.commit(std::move(*older), outcomes, 0, &*younger);
    s.scheduler.take_finished(finished);
    older.reset();
    older.emplace(std::move(*younger));
    ASSERT_EQ(older->num_logits(), 8);
  }
  EXPECT_EQ(allocations::count, before) << "pages were crossed, too";
  s.finish(older);
}

TEST(OverlapDeathTest, BatchesAreCommittedInOrder) {
  const auto two = [](const auto &then) {
    Said s(ahead());
    s.submit(request(1, 4, 8));
    std::optional<Batch> older = s.scheduler.schedule(), younger = s.scheduler.schedule_ahead(*older);
    auto outcomes = Said::say(*older, 5);
    then(s.scheduler, *older, *younger, outcomes);
  };
  using Outcomes = std::vector<Outcome>;
  EXPECT_DEATH(two([](Scheduler &s, Batch &, Batch &younger, Outcomes &o) { s.commit(std::move(younger), o); }),
               "the older first");
  EXPECT_DEATH(two([](Scheduler &s, Batch &older, Batch &, Outcomes &o) { s.commit(std::move(older), o); }),
               "the older first");
  EXPECT_DEATH(two([](Scheduler &s, Batch &, Batch &younger, Outcomes &) { s.schedule_ahead(younger); }),
               "not the only batch in flight");
  EXPECT_DEATH(two([](Scheduler &s, Batch &older, Batch &, Outcomes &) { s.cancel(1, &older); }),
               "the batch in flight must be told");
  EXPECT_DEATH(two([](Scheduler &, Batch &older, Batch &younger, Outcomes &o) {
                 younger.fill(older, o);
                 younger.fill(older, o);
               }),
               "filled in, once");
}

}  // namespace
}  // namespace ts
