#include "events.h"

#include <algorithm>

#include "check.h"

namespace ts {

Prefilling Transition::admit(std::unique_ptr<Sequence> sequence, Admit &&e) {
  Sequence &s = *sequence;
  s.owner = e.owner;
  const int32_t num_computed = e.prefix.num_pages * s.page_size;
  Context context(e.cache.groups(), num_pages_for(s.num_prompt + s.max_tokens, s.page_size));
  context.adopt(e.cache, std::move(e.prefix), e.row);
  if (s.num_reached == 0) s.miss = e.miss;  // not of one that comes back
  TS_ASSERT(num_computed < s.num_tokens(), "a prefix leaves at least one token to compute");
  const int32_t num_cached = std::max(0, std::min(num_computed, s.num_prompt) - s.num_reached);
  s.num_cached += num_cached;
  s.num_restored += std::min(e.num_restored, num_cached);
  s.num_reached = std::max(s.num_reached, num_computed);
  return {std::move(sequence), std::move(context), num_computed};
}

Prefilling Transition::apply(Queued &&s, Admit &&e) {
  s.sequence_->turn = e.turn;
  return admit(std::move(s.sequence_), std::move(e));
}

Prefilling Transition::apply(Prefilling &&s, Chunk &&e) {
  TS_ASSERT(e.num_tokens >= 1 && e.num_tokens < s.num_remaining(), "the last chunk of a prefill ends with a token");
  const int32_t num_computed = s.num_computed_ + e.num_tokens;
  s.context_.seal(e.cache, *s.sequence_, num_computed, e.row, e.duplicates);
  s.sequence_->num_reached = std::max(s.sequence_->num_reached, num_computed);
  return {std::move(s.sequence_), std::move(s.context_), num_computed};
}

Decoding Transition::apply(Prefilling &&s, Token &&e) {
  return decode(std::move(s.sequence_), std::move(s.context_), e);
}

Decoding Transition::apply(Decoding &&s, Token &&e) { return decode(std::move(s.sequence_), std::move(s.context_), e); }

Paused Transition::apply(Decoding &&s, Pause &&e) {
  Finished finished(*s.sequence_, e.finish, {});
  return {std::move(finished), Leased(s.sequence_->session, e.until_ms, std::move(s.context_))};
}

Drained Transition::apply(Decoding &&s, Early<Stop> &&e) {
  return {Finished(*s.sequence_, e.event.finish, {}), Draining(std::move(s.context_))};
}

Drained Transition::apply(Decoding &&s, Early<Pause> &&e) {
  Leased leased(s.sequence_->session, e.event.until_ms, s.context_.share());
  return {Finished(*s.sequence_, e.event.finish, {}), Draining(std::move(s.context_)), std::move(leased)};
}

void Transition::apply(Draining &&s, Land &&) {
  Draining landed = std::move(s);
  landed.held_ = false;
}

void Transition::forget(const Context &context, const Sequence &sequence, CacheParts &caches) {
  for (int32_t owner = 0; owner < caches.num_owners(); ++owner) context.forget(caches.of(owner), sequence);
}

Decoding Transition::decode(std::unique_ptr<Sequence> sequence, Context context, const Token &e) {
  Sequence &s = *sequence;
  context.seal(e.cache, s, s.num_tokens(), e.row, e.duplicates);
  s.num_reached = std::max(s.num_reached, s.num_tokens());
  s.append(e.token);
  return {std::move(sequence), std::move(context)};
}

}  // namespace ts
