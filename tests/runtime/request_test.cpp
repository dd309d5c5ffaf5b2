#include "request.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "error.h"
#include "toy.h"

namespace ts {
namespace {

RequestLimits limits() {
  return {.vocab_size = 100,
          .max_context = 64,
          .page_size = 4,
          .num_pages = 10,
          .prefix_cache = true,
          .eos_token_ids = {1, 2}};
}

std::string refusal(const ts_request &request) {
  try {
    make_sequence(request, limits());
  } catch (const Error &e) {
    EXPECT_EQ(e.status(), TS_BAD_REQUEST);
    return e.what();
  }
  return "";
}

TEST(Request, RefusalsNameWhatWasFoundAndWhatIsWanted) {
  toy::Request ok;
  ok.prompt = {5, 6, 7};
  EXPECT_EQ(refusal(ok.abi()), "");
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<std::pair<std::function<void(toy::Request &)>, std::string>> cases = {
      {[](auto &r) { r.prompt = {}; }, "num_prompt is 0, wanted at least 1 token"},
      {[](auto &r) { r.prompt = {5, 100}; }, "prompt[1] is 100, wanted a token id in [0, 100)"},
      {[](auto &r) { r.prompt = {-1}; }, "prompt[0] is -1, wanted a token id in [0, 100)"},
      {[](auto &r) { r.max_tokens = 0; }, "max_tokens is 0, wanted at least 1"},
      {[](auto &r) { r.max_tokens = 62; },
       "the prompt has 3 tokens and max_tokens is 62, together 65, but the model's context holds 64: shorten the "
       "prompt or lower "
       "max_tokens"},
      {[](auto &r) { r.max_tokens = std::numeric_limits<int32_t>::max(); },
       "the prompt has 3 tokens and max_tokens is 2147483647, together 2147483650, but the model's context holds 64: "
       "shorten the "
       "prompt or lower max_tokens"},
      {[](auto &r) { r.max_tokens = 39; },
       "the prompt's 3 tokens and max_tokens 39 need 11 KV pages of 4 tokens, but the engine has 10: give it more "
       "(num_pages or "
       "kv_bytes), or ask for less"},
      {[](auto &r) { r.cache_salt.assign(1025, 'x'); }, "num_cache_salt is 1025, wanted at most 1024 bytes"},
      {[](auto &r) { r.lease_ms = -1; }, "lease_ms is -1, wanted 0 (none) to 3600000"},
      {[](auto &r) { r.lease_ms = 5; }, "lease_ms is 5 but session is 0: only a session has a lease"},
      {[](auto &r) { r.temperature = -0.5F; }, "temperature is -0.5, wanted a number in [0, inf)"},
      {[&](auto &r) { r.temperature = nan; }, "temperature is nan, wanted a number in [0, inf)"},
      {[&](auto &r) { r.temperature = inf; }, "temperature is inf, wanted a finite number"},
      {[](auto &r) { r.top_k = -1; }, "top_k is -1, wanted 0 (off) or more"},
      {[](auto &r) { r.top_p = 0; }, "top_p is 0, wanted a number in (0, 1]"},
      {[&](auto &r) { r.top_p = nan; }, "top_p is nan, wanted a number in (0, 1]"},
      {[](auto &r) { r.min_p = 1.5F; }, "min_p is 1.5, wanted a number in [0, 1]"},
      {[](auto &r) { r.repetition_penalty = 0; }, "repetition_penalty is 0, wanted a number in (0, inf)"},
      {[](auto &r) { r.presence_penalty = 2.5F; }, "presence_penalty is 2.5, wanted a number in [-2, 2]"},
      {[&](auto &r) { r.frequency_penalty = -inf; }, "frequency_penalty is -inf, wanted a number in [-2, 2]"},
      {[](auto &r) { r.num_logprobs = 101; }, "num_logprobs is 101, wanted -1 (none) to the vocabulary's 100"},
      {[](auto &r) { r.num_logprobs = -2; }, "num_logprobs is -2, wanted -1 (none) to the vocabulary's 100"},
      {[](auto &r) { r.logit_bias = {{100, 1}}; }, "logit_bias names token 100, wanted an id in [0, 100)"},
      {[&](auto &r) { r.logit_bias = {{5, nan}}; }, "logit_bias of token 5 is nan, wanted a finite number"},
      {[](auto &r) { r.logit_bias = {{5, 1}, {6, 1}, {5, 2}}; }, "logit_bias names token 5 twice"},
      {[](auto &r) { r.stop = {3, 1000}; }, "stop_tokens[1] is 1000, wanted a token id in [0, 100)"},
      {[](auto &r) { r.ignore_eos = 7; }, "ignore_eos is 7, wanted 0 or 1"},
  };
  for (const auto &[change, message] : cases) {
    toy::Request r = ok;
    change(r);
    EXPECT_EQ(refusal(r.abi()), message);
  }
}

TEST(Request, RefusesStructsThatDoNotAddUp) {
  toy::Request ok;
  ok.prompt = {5};
  ts_request r = ok.abi();
  r.size = 8;
  EXPECT_EQ(refusal(r), "ts_request.size is 8, this engine's is " + std::to_string(sizeof(ts_request)));
  r = ok.abi();
  r.prompt = nullptr;
  EXPECT_EQ(refusal(r), "prompt is NULL but num_prompt is 1");
  r = ok.abi();
  r.num_logit_bias = 3;
  r.logit_bias = nullptr;
  EXPECT_EQ(refusal(r), "logit_bias is NULL but num_logit_bias is 3");
  r.num_logit_bias = -3;
  EXPECT_EQ(refusal(r), "num_logit_bias is -3, wanted 0 or more");
  r.num_logit_bias = 101;
  EXPECT_EQ(refusal(r), "num_logit_bias is 101, but the vocabulary has 100 tokens");
  r = ok.abi();
  r.num_stop_tokens = -1;
  EXPECT_EQ(refusal(r), "num_stop_tokens is -1, wanted 0 or more");
}

TEST(Request, TakesTheLargestThatFits) {
  toy::Request r;
  r.prompt = toy::tokens(3, 1, 100);
  r.max_tokens = 38;  // 41 tokens, of which the last is never an input: ten pages
  EXPECT_EQ(refusal(r.abi()), "");
}

TEST(Request, KeepsStopAndEndTokensInOrder) {
  toy::Request r;
  r.prompt = {5};
  r.stop = {9, 2, 9, 4};
  EXPECT_EQ(make_sequence(r.abi(), limits())->stop_tokens, (std::vector<int32_t>{1, 2, 4, 9}));
  r.ignore_eos = 1;
  EXPECT_EQ(make_sequence(r.abi(), limits())->stop_tokens, (std::vector<int32_t>{2, 4, 9}));
}

TEST(Request, HashesEveryFullPageAsItFills) {
  toy::Request r;
  r.prompt = {5, 6, 7, 8, 9, 10, 11};
  const auto s = make_sequence(r.abi(), limits());
  ASSERT_EQ(s->hashes.size(), 1);
  s->append(12);
  ASSERT_EQ(s->hashes.size(), 2);
  std::vector<PageHash> hashes(2);
  page_hasher().pages(page_hasher().root(""), std::vector<int32_t>{5, 6, 7, 8, 9, 10, 11, 12}, 4, hashes);
  EXPECT_EQ(s->hashes, hashes) << "page by page, or all at once";
}

}  // namespace
}  // namespace ts
