#include "allocations.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <future>
#include <memory>
#include <new>
#include <vector>

#include "engine_core.h"
#include "toy.h"

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

// NOLINTBEGIN(cppcoreguidelines-no-malloc). Not inlined, so that g++ does not see free() meet operator new.
__attribute__((noinline)) void *operator new(size_t size) {
  ++allocations::count;
  if (allocations::num_to_fail > 0 && allocations::num_to_pass-- <= 0) {
    --allocations::num_to_fail;
    throw std::bad_alloc();
  }
  if (void *p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void *p) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void *p, size_t) noexcept { std::free(p); }
// NOLINTEND(cppcoreguidelines-no-malloc)

TEST(Allocations, AreCountedAndFailOnDemand) {
  const int64_t before = allocations::count;
  std::unique_ptr<int> p(new int(1));
  EXPECT_EQ(allocations::count, before + 1);
  allocations::num_to_fail = 1;
  EXPECT_THROW(p.reset(new int(2)), std::bad_alloc);
  p.reset(new int(3));
  EXPECT_EQ(*p, 3);
}

/// All that the step thread does between two steps: sampling, commit, events, inbox, schedule, batch arrays. The poller, too: here the
/// step thread polls, so that no other thread's pace decides how much memory the queue takes.
TEST(Allocations, AWholeTurnOfSteadyDecodingDoesNotAllocate) {
  ts::EngineOptions o = toy::small();
  o.scheduler.max_context = 4096;
  o.scheduler.num_pages = 4096;
  constexpr int32_t kSeqs = 8, kWarm = 4, kSteps = 200;
  int32_t num_steady = 0;
  int64_t first = 0, last = 0;
  std::vector<float> logits(static_cast<size_t>(o.vocab_size));
  ts::EngineCore *engine = nullptr;
  std::promise<void> opened, done;
  ts::EngineCore core(o, [&, ready = opened.get_future().share()](const ts_batch &batch) {
    ready.wait();
    std::array<ts_event, 16> events;
    while (engine->poll(events.data(), static_cast<int32_t>(events.size()), 0) > 0) {
    }
    last = allocations::count;
    num_steady = batch.num_tokens == kSeqs && batch.num_seqs == kSeqs ? num_steady + 1 : 0;
    if (num_steady == kWarm) first = last;
    if (num_steady == kWarm + kSteps) done.set_value();
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i * 7 % 13);
    return ts::Logits{logits.data(), 0};
  });
  for (uint64_t id = 1; id <= kSeqs; ++id) {
    toy::Request r = toy::request(id, 4, 2000);
    if (id % 3 == 0) r.top_k = 5;
    if (id % 4 == 0) r.logit_bias = {{7, 1.0F}};
    if (id % 5 == 0) r.frequency_penalty = 0.1F;
    core.submit(r.abi());
  }
  engine = &core;
  opened.set_value();
  done.get_future().wait();
  EXPECT_EQ(last, first) << "in " << kSteps << " turns, which crossed pages, too";
}

#endif
