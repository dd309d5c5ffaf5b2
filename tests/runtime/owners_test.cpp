// Sequences shared out between owners: who gets which, and what of a step's batch each has.
#include <gtest/gtest.h>

#include <vector>

#include "expect.h"
#include "token_parts.h"
#include "toy.h"

namespace ts {
namespace {

using testing::expect_in;
using testing::refusal;

using toy::Harness;
using toy::Request;

EngineOptions two_owners(int32_t pages_each) {
  EngineOptions o = toy::small();
  o.scheduler.num_pages = pages_each;
  o.scheduler.num_owners = 2;
  return o;
}

Request request(uint64_t id, int32_t num_prompt, int32_t max_tokens, uint64_t prompt_seed) {
  Request r;
  r.id = id;
  r.prompt = toy::tokens(num_prompt, prompt_seed, 64);
  r.max_tokens = max_tokens;
  r.ignore_eos = 1;
  return r;
}

int32_t used(const Harness &h, int32_t owner) {
  return h.scheduler.pool(owner).num_pages() - h.scheduler.pool(owner).num_available();
}

void run_all(Harness &h, const std::vector<Request> &requests, const EngineOptions &options) {
  h.run();
  for (const Request &r : requests) EXPECT_EQ(h.results.at(r.id).tokens, toy::solo(r, options).tokens) << r.id;
}

TEST(Owners, ShareSequencesOutByTheirLoad) {
  const EngineOptions o = two_owners(64);
  Harness h(o);
  std::vector<Request> requests;
  for (uint64_t id = 1; id <= 4; ++id) requests.push_back(request(id, 6, 8, id));
  for (const Request &r : requests) h.submit(r);
  h.step();
  EXPECT_EQ(h.last_num_seqs, 4);
  EXPECT_EQ(used(h, 0), used(h, 1));
  EXPECT_EQ(h.scheduler.cache().num_blank(), 2 * 64 - used(h, 0) - used(h, 1));
  run_all(h, requests, o);
}

TEST(Owners, GetWhoseCacheHasMostOfThePrefix) {
  const EngineOptions o = two_owners(64);
  Harness h(o);
  const std::vector<Request> requests = {
      request(1, 30, 40, 7),  // owner 0
      request(2, 9, 40, 8),   // owner 1 has more room
      request(3, 30, 40, 7),  // all but the last page is with owner 0, which has less room
      request(4, 9, 40, 8),
  };
  const std::vector<int32_t> owners = {0, 1, 0, 1}, cached = {0, 0, 28, 8};
  for (size_t i = 0; i < requests.size(); ++i) {
    const std::vector<int32_t> before = {used(h, 0), used(h, 1)};
    h.submit(requests[i]);
    h.step();
    EXPECT_GT(used(h, owners[i]), before[static_cast<size_t>(owners[i])]) << i;
    EXPECT_LE(used(h, 1 - owners[i]), before[static_cast<size_t>(1 - owners[i])] + 1) << i;  // a decode's page
  }
  run_all(h, requests, o);
  for (size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(h.results.at(requests[i].id).num_cached, cached[i]) << i;
}

TEST(Owners, ASequenceWaitsUntilOneHasRoom) {
  const EngineOptions o = two_owners(8);  // 32 tokens each
  Harness h(o);
  std::vector<Request> requests;
  for (uint64_t id = 1; id <= 5; ++id) requests.push_back(request(id, 13, 12, id));  // 4 pages, later 6
  for (const Request &r : requests) h.submit(r);
  h.step();
  EXPECT_EQ(h.scheduler.num_running(), 2) << "each leaves the other's owner's pages alone";
  run_all(h, requests, o);
}

// ---- parts of a batch ----

struct Arrays {
  std::vector<int32_t> ids = {10, 11, 12, 13, 14, 15, 16}, positions = {0, 1, 2, 7, 5, 6, 0};
  std::vector<int32_t> slots = {4, 5, 6, 11, 45, 46, 36};  // of three owners with 16 slots each: 0, 0, 2, 2
  std::vector<int32_t> query_start = {0, 3, 4, 6, 7}, context_len = {3, 8, 7, 1};
  std::vector<int32_t> page_table = {1, -1, 2, -1, 11, -1, 9, -1}, logit_rows = {2, 6};

  ts_batch batch() const {
    return {7,
            4,
            2,
            2,
            ids.data(),
            positions.data(),
            slots.data(),
            query_start.data(),
            context_len.data(),
            page_table.data(),
            logit_rows.data()};
  }
};

TEST(TokenParts, AreInEqualPartsOrBySequence) {
  const Mesh mesh{{{"dp", 3}, {"tp", 2}}};
  const Arrays arrays;
  for (int32_t rank = 0; rank < 6; ++rank) {
    TokenParts parts(mesh, rank, 4, 16);
    parts.set(arrays.batch());
    EXPECT_EQ(parts.of(TokenParts::kWhole).num_tokens, 7);
    EXPECT_EQ(parts.of(TokenParts::kWhole).logit_rows, arrays.logit_rows.data());
    const std::vector<int64_t> dp = {parts.start(0, 0), parts.start(0, 1), parts.start(0, 2), parts.start(0, 3)};
    EXPECT_EQ(dp, (std::vector<int64_t>{0, 4, 4, 7}));
    const std::vector<int64_t> tp = {parts.start(1, 0), parts.start(1, 1), parts.start(1, 2)};
    EXPECT_EQ(tp, (std::vector<int64_t>{0, 4, 7}));

    const ts_batch &half = parts.of(1);
    EXPECT_EQ(half.num_tokens, rank % 2 == 0 ? 4 : 3);
    EXPECT_EQ(half.token_ids[0], rank % 2 == 0 ? 10 : 14);
    const ts_batch &mine = parts.of(0);
    if (rank / 2 == 1) {
      EXPECT_EQ(mine.num_tokens, 0);
      EXPECT_EQ(mine.num_seqs, 0);
      EXPECT_EQ(mine.query_start[0], 0);
      continue;
    }
    const bool last = rank / 2 == 2;
    EXPECT_EQ(mine.num_seqs, 2);
    EXPECT_EQ(std::vector<int32_t>(mine.query_start, mine.query_start + 3),
              last ? (std::vector<int32_t>{0, 2, 3}) : (std::vector<int32_t>{0, 3, 4}));
    EXPECT_EQ(mine.slots[0], last ? 45 : 4);
    EXPECT_EQ(mine.context_len[1], last ? 1 : 8);
    EXPECT_EQ(mine.page_table[mine.page_table_stride], last ? 9 : 2);
  }
}

TEST(TokenParts, HaveSlotsAndPageTableOfEachGroup) {
  const Mesh mesh{{{"dp", 3}, {"tp", 2}}};
  Arrays arrays;
  arrays.slots.insert(arrays.slots.end(), {1, 2, 3, 14, 41, 42, 39});
  for (int32_t rank = 0; rank < 6; ++rank) {
    TokenParts parts(mesh, rank, 4, 16, 2);
    parts.set(arrays.batch());  // of each row of two entries, one is of each group
    EXPECT_EQ(parts.of(TokenParts::kWhole, 0).slots, arrays.slots.data());
    EXPECT_EQ(parts.of(TokenParts::kWhole, 1).slots, arrays.slots.data() + 7);
    EXPECT_EQ(parts.of(TokenParts::kWhole, 1).page_table, arrays.page_table.data() + 1);
    EXPECT_EQ(parts.of(1, 1).slots, arrays.slots.data() + 7 + (rank % 2 == 0 ? 0 : 4));
    EXPECT_EQ(parts.of(1, 1).num_tokens, parts.of(1, 0).num_tokens);
    if (rank / 2 == 1) continue;  // has no tokens
    EXPECT_EQ(parts.of(0, 1).slots, parts.of(0, 0).slots + 7);
    EXPECT_EQ(parts.of(0, 1).page_table, parts.of(0, 0).page_table + 1);
    EXPECT_EQ(parts.of(0, 1).query_start, parts.of(0, 0).query_start);
  }
}

TEST(TokenParts, WantSequencesSortedByOwner) {
  const Mesh mesh{{{"dp", 3}}};
  Arrays arrays;
  arrays.slots[3] = 33;  // owners 0, 2, 2, 2: sorted
  TokenParts parts(mesh, 0, 4, 16);
  parts.set(arrays.batch());
  EXPECT_EQ(parts.start(0, 1), 3);
  arrays.slots[6] = 17;
  expect_in(refusal([&] { parts.set(arrays.batch()); }, TS_INTERNAL),
            {"sequence 3 of the step has its pages on rank 1 of 3, after one on rank 2"});
  arrays.slots[6] = 48;
  expect_in(refusal([&] { parts.set(arrays.batch()); }, TS_INTERNAL), {"on rank 3 of 3"});
}

}  // namespace
}  // namespace ts
