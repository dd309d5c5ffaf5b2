#pragma once

#include <array>
#include <concepts>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cache_parts.h"
#include "states.h"

namespace ts {

// What can happen to a request. Linear things that an event brings are consumed with it. `row`: the sequence's row of
// the page table.

struct Admit {  ///< It may run: with the pages of its prefix that the cache of its owner has found.
  PrefixCache &cache;
  Prefix prefix;
  std::span<int32_t> row;
  int32_t owner = 0;
  Miss miss;                 ///< why no more was found
  int32_t num_restored = 0;  ///< tokens of the prefix that have just come back from the second tier
  uint64_t turn = 0;         ///< of one that is admitted for the first time
};
struct Chunk {  ///< `num_tokens` more of its tokens are in the KV cache, not yet all.
  PrefixCache &cache;
  std::span<int32_t> row;
  int32_t num_tokens;
  std::vector<WritablePage> *duplicates = nullptr;  ///< see Context::seal
};
struct Token {  ///< All of its tokens are in the KV cache, and the next one was sampled.
  PrefixCache &cache;
  std::span<int32_t> row;
  int32_t token;
  std::vector<WritablePage> *duplicates = nullptr;
};
struct Preempt {};  ///< An older sequence needs its pages.
struct Stop {       ///< Its last token ended it.
  ts_finish finish;
};
struct Pause {  ///< Its last token ended it, and its session may go on until then.
  ts_finish finish;
  int64_t until_ms;
};
struct Expire {};  ///< The session has gone on, or has not in time, or others need its pages more.
struct Cancel {};  ///< Its caller wants no more of it.
struct TimeOut {   ///< Its time is over.
  std::string message;
};
struct
    Fail {  ///< It cannot go on; nothing that it read or wrote is to be found again, whoever it belonged to before it was preempted.
  CacheParts &caches;
  std::string message;
};

/// What is left of a request that pauses.
struct Paused {
  Finished finished;
  Leased leased;
};

/// The event, of a request that the batch behind the one that is committed has too: it ends now, but its pages stay until that
/// one is committed.
template <class Event>
struct Early {
  Event event;
};

/// What is left of such a request.
struct Drained {
  Finished finished;
  Draining draining;
  std::optional<Leased> leased = {};
};

/// The batch that it waited for was committed, or will never run. Only the scheduler can say so.
class Land {
  friend class Scheduler;
  Land() = default;
};

/// The state machine: an overload for each legal pair, which consumes the state and returns the next. A pair that has
/// none does not compile. The table below says the same, and is checked.
class Transition {
 public:
  static Prefilling apply(Queued &&s, Admit &&e);
  static Finished apply(Queued &&s, Cancel &&) { return finish(std::move(s), TS_FINISH_CANCELLED); }
  static Finished apply(Queued &&s, TimeOut &&e) { return time_out(std::move(s), std::move(e)); }

  static Prefilling apply(Prefilling &&s, Chunk &&e);
  static Decoding apply(Prefilling &&s, Token &&e);
  static Preempted apply(Prefilling &&s, Preempt &&) { return preempt(std::move(s)); }
  static Finished apply(Prefilling &&s, Cancel &&) { return finish(std::move(s), TS_FINISH_CANCELLED); }
  static Finished apply(Prefilling &&s, TimeOut &&e) { return time_out(std::move(s), std::move(e)); }
  static Finished apply(Prefilling &&s, Fail &&e) { return fail(std::move(s), std::move(e)); }

  static Decoding apply(Decoding &&s, Token &&e);
  static Preempted apply(Decoding &&s, Preempt &&) { return preempt(std::move(s)); }
  static Finished apply(Decoding &&s, Stop &&e) { return finish(std::move(s), e.finish); }
  static Paused apply(Decoding &&s, Pause &&e);
  static Finished apply(Decoding &&s, Cancel &&) { return finish(std::move(s), TS_FINISH_CANCELLED); }
  static Finished apply(Decoding &&s, TimeOut &&e) { return time_out(std::move(s), std::move(e)); }
  static Finished apply(Decoding &&s, Fail &&e) { return fail(std::move(s), std::move(e)); }

  static Prefilling apply(Preempted &&s, Admit &&e) { return admit(std::move(s.sequence_), std::move(e)); }
  static Finished apply(Preempted &&s, Cancel &&) { return finish(std::move(s), TS_FINISH_CANCELLED); }
  static Finished apply(Preempted &&s, TimeOut &&e) { return time_out(std::move(s), std::move(e)); }

  static void apply(Leased &&s, Expire &&) { const Leased ended = std::move(s); }

  static Drained apply(Prefilling &&s, Early<Fail> &&e) { return drain(std::move(s), std::move(e.event)); }
  static Drained apply(Decoding &&s, Early<Fail> &&e) { return drain(std::move(s), std::move(e.event)); }
  static Drained apply(Decoding &&s, Early<Stop> &&e);
  static Drained apply(Decoding &&s, Early<Pause> &&e);
  static void apply(Draining &&s, Land &&);

 private:
  static Prefilling admit(std::unique_ptr<Sequence> sequence, Admit &&e);
  static Decoding decode(std::unique_ptr<Sequence> sequence, Context context, const Token &e);

  static void forget(const Context &context, const Sequence &sequence, CacheParts &caches);

  template <class Running>
  static Preempted preempt(Running &&state) {
    const Context freed = std::move(state.context_);
    return Preempted(std::move(state.sequence_));
  }

  template <class Running>
  static Finished fail(Running &&state, Fail &&e) {
    forget(state.context_, *state.sequence_, e.caches);
    return finish(std::forward<Running>(state), TS_FINISH_ERROR, std::move(e.message));
  }

  template <class Running>
  static Drained drain(Running &&state, Fail &&e) {
    forget(state.context_, *state.sequence_, e.caches);
    return {Finished(*state.sequence_, TS_FINISH_ERROR, std::move(e.message)), Draining(std::move(state.context_))};
  }

  template <class State>
  static Finished time_out(State &&state, TimeOut &&e) {
    return finish(std::forward<State>(state), TS_FINISH_TIMEOUT, std::move(e.message));
  }

  template <class State>
  static Finished finish(State &&state, ts_finish finish, std::string message = {}) {
    const State ended = std::forward<State>(state);  // its pages are given back here
    return Finished(ended.sequence(), finish, std::move(message));
  }
};

template <class State, class Event>
concept Accepts = requires(State state, Event event) { Transition::apply(std::move(state), std::move(event)); };

template <class State>
inline constexpr std::array<bool, 11> kAccepts = {
    Accepts<State, Admit>,   Accepts<State, Chunk>, Accepts<State, Token>,  Accepts<State, Preempt>,
    Accepts<State, Stop>,    Accepts<State, Pause>, Accepts<State, Expire>, Accepts<State, Cancel>,
    Accepts<State, TimeOut>, Accepts<State, Fail>,  Accepts<State, Land>,
};

/// Of a sequence that the batch behind has too: it never loses its pages to another, and whoever gives it up waits for that batch.
template <class State>
inline constexpr std::array<bool, 11> kAcceptsEarly = {
    Accepts<State, Early<Admit>>,   Accepts<State, Early<Chunk>>,  Accepts<State, Early<Token>>,
    Accepts<State, Early<Preempt>>, Accepts<State, Early<Stop>>,   Accepts<State, Early<Pause>>,
    Accepts<State, Early<Expire>>,  Accepts<State, Early<Cancel>>, Accepts<State, Early<TimeOut>>,
    Accepts<State, Early<Fail>>,    Accepts<State, Early<Land>>,
};

// clang-format off
//                                                                Admit  Chunk  Token  Preempt  Stop   Pause  Expire  Cancel  TimeOut  Fail   Land
static_assert(kAccepts<Queued>          == std::array<bool, 11>{  true,  false, false, false,  false, false, false,  true,   true,    false, false});
static_assert(kAccepts<Prefilling>      == std::array<bool, 11>{  false, true,  true,  true,   false, false, false,  true,   true,    true,  false});
static_assert(kAccepts<Decoding>        == std::array<bool, 11>{  false, false, true,  true,   true,  true,  false,  true,   true,    true,  false});
static_assert(kAccepts<Preempted>       == std::array<bool, 11>{  true,  false, false, false,  false, false, false,  true,   true,    false, false});
static_assert(kAccepts<Leased>          == std::array<bool, 11>{  false, false, false, false,  false, false, true,   false,  false,   false, false});
static_assert(kAccepts<Draining>        == std::array<bool, 11>{  false, false, false, false,  false, false, false,  false,  false,   false, true });
static_assert(kAccepts<Finished>        == std::array<bool, 11>{  false, false, false, false,  false, false, false,  false,  false,   false, false});
static_assert(kAcceptsEarly<Queued>     == std::array<bool, 11>{  false, false, false, false,  false, false, false,  false,  false,   false, false});
static_assert(kAcceptsEarly<Prefilling> == std::array<bool, 11>{  false, false, false, false,  false, false, false,  false,  false,   true,  false});
static_assert(kAcceptsEarly<Decoding>   == std::array<bool, 11>{  false, false, false, false,  true,  true,  false,  false,  false,   true,  false});
static_assert(kAcceptsEarly<Preempted>  == std::array<bool, 11>{  false, false, false, false,  false, false, false,  false,  false,   false, false});
static_assert(kAcceptsEarly<Leased>     == std::array<bool, 11>{  false, false, false, false,  false, false, false,  false,  false,   false, false});
static_assert(kAcceptsEarly<Draining>   == std::array<bool, 11>{  false, false, false, false,  false, false, false,  false,  false,   false, false});
static_assert(kAcceptsEarly<Finished>   == std::array<bool, 11>{  false, false, false, false,  false, false, false,  false,  false,   false, false});
// clang-format on

/// Applies an event to whichever state it is: each of them must accept it, with the same outcome.
template <class Event, class... States>
auto next(std::variant<States...> &&state, Event &&event) {
  return std::visit(
      [&](auto &&s) { return Transition::apply(std::forward<decltype(s)>(s), std::forward<Event>(event)); },
      std::move(state));
}

/// A state that is not given up (an lvalue) is not accepted.
template <class State, class Event>
concept AcceptsKept = requires(State &state, Event event) { Transition::apply(state, std::move(event)); };
static_assert(!AcceptsKept<Queued, Admit> && !AcceptsKept<Decoding, Token> && !AcceptsKept<Decoding, Cancel> &&
              !AcceptsKept<Draining, Land>);
static_assert(!std::copyable<Queued> && !std::copyable<Prefilling> && !std::copyable<Decoding> &&
              !std::copyable<Preempted> && !std::copyable<Draining> && !std::copyable<Leased>);

}  // namespace ts
