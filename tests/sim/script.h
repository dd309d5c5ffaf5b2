#pragma once

#include <algorithm>
#include <cstdint>
#include <istream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../runtime/toy.h"

/// What happens in a simulated world, written down: drawn from a seed, printed, read back, and cut down to what matters.
namespace sim {

struct Event {
  int64_t at = 0;    ///< before this step
  std::string what;  ///< arrive, cancel, fail (the step cannot be run), lose (a rank: whatever lives ends), jump,
  ///< tear (the next page that comes back from the second tier has changed), refuse (the next it is to keep)
  int64_t id = 0;                                     ///< of arrive and cancel
  int64_t prompt = 0;                                 ///< of an arrival, all that follows: tokens of its prompt
  int64_t family = 0;                                 ///< prompts of one family are alike
  int64_t changed = -1, changed_to = 0, poison = -1;  ///< but here, if not -1
  int64_t max_tokens = 0, seed = 0, warm = 0, top_k = 0, narrow = 0, repeated = 0, frequent = 0, ignore_eos = 0;
  int64_t stop = 0;    ///< a stop token, if not 0
  int64_t repeat = 0;  ///< outputs are nearly always one of so many tokens, if not 0: drafts come true, or now and then
  int64_t tenant = 0;  ///< whose salt it has, if not 0
  int64_t session = 0, lease_ms = 0;
  int64_t priority = 0;
  int64_t account = 0;     ///< which tenant's share it uses
  int64_t timeout_ms = 0;  ///< if not 0
  int64_t by_ms = 0;       ///< of a jump of the clock, which else moves a millisecond a step

  template <class Self, class F>
  static void fields(Self &e, const F &f) {
    if (e.what == "arrive" || e.what == "cancel") f("id", e.id);
    if (e.what == "jump") f("by_ms", e.by_ms);
    if (e.what != "arrive") return;
    f("prompt", e.prompt), f("family", e.family), f("changed", e.changed), f("changed_to", e.changed_to);
    f("poison", e.poison), f("max_tokens", e.max_tokens), f("seed", e.seed), f("warm", e.warm), f("top_k", e.top_k);
    f("narrow", e.narrow), f("repeated", e.repeated), f("frequent", e.frequent), f("ignore_eos", e.ignore_eos);
    f("stop", e.stop), f("repeat", e.repeat), f("tenant", e.tenant), f("session", e.session);
    f("lease_ms", e.lease_ms), f("priority", e.priority), f("account", e.account), f("timeout_ms", e.timeout_ms);
  }

  toy::Request request(int32_t vocab_size) const {
    toy::Request r;
    r.id = static_cast<uint64_t>(id);
    r.prompt = toy::tokens(static_cast<int32_t>(prompt), static_cast<uint64_t>(family), vocab_size);
    if (changed >= 0 && changed < prompt) r.prompt[static_cast<size_t>(changed)] = static_cast<int32_t>(changed_to);
    if (poison >= 0 && poison < prompt) r.prompt[static_cast<size_t>(poison)] = toy::kPoison;
    r.max_tokens = static_cast<int32_t>(max_tokens);
    r.seed = static_cast<uint64_t>(seed);
    r.temperature = warm != 0 ? 0.7F : 0.0F;
    r.top_k = static_cast<int32_t>(top_k);
    r.top_p = narrow != 0 ? 0.8F : 1.0F;
    r.repetition_penalty = repeated != 0 ? 1.3F : 1.0F;
    r.frequency_penalty = frequent != 0 ? 0.5F : 0.0F;
    r.ignore_eos = static_cast<int32_t>(ignore_eos);
    if (tenant != 0) r.cache_salt = std::to_string(tenant);
    r.session = static_cast<uint64_t>(session);
    r.priority = static_cast<int32_t>(priority);
    r.tenant = static_cast<uint64_t>(account);
    r.timeout_ms = static_cast<int32_t>(timeout_ms);
    r.lease_ms = session != 0 ? static_cast<int32_t>(lease_ms) : 0;
    if (stop != 0) r.stop = {static_cast<int32_t>(stop)};
    for (int64_t i = 0; i < repeat; ++i) r.logit_bias.push_back({static_cast<int32_t>(4 + i), 30});
    return r;
  }
};

struct Script {
  int64_t page_size = 1, num_pages = 1, max_context = 2, token_budget = 1, max_seqs = 1, prefix_cache = 1,
          max_draft = 0, cheap = 0;  ///< cheap: tokens beside the first cost a step next to nothing, so drafts are long
  int64_t num_owners = 1;            ///< of sequences, each with as many pages
  int64_t full = 1, window = 0, window_2 = 0, recurrent = 0;  ///< cache groups: those that are not 0
  int64_t num_slots = 0;                                      ///< of the second tier, each owner's; 0: there is none
  int64_t max_stores = 8, max_loads = 4;
  int64_t ahead = 0;  ///< 1: a step is scheduled while the one before it runs
  int64_t patience_ms = 10'000;
  int64_t target_ns = 0;      ///< for a step with decodes, if not 0
  int64_t slowness = 100;     ///< what steps take, in percent of the prediction
  std::vector<Event> events;  ///< in order of time

  template <class Self, class F>
  static void fields(Self &s, const F &f) {
    f("page_size", s.page_size), f("num_pages", s.num_pages), f("max_context", s.max_context);
    f("token_budget", s.token_budget), f("max_seqs", s.max_seqs), f("prefix_cache", s.prefix_cache);
    f("num_owners", s.num_owners), f("full", s.full), f("window", s.window), f("window_2", s.window_2);
    f("recurrent", s.recurrent), f("ahead", s.ahead), f("num_slots", s.num_slots), f("max_stores", s.max_stores);
    f("max_loads", s.max_loads);
    f("max_draft", s.max_draft), f("cheap", s.cheap), f("patience_ms", s.patience_ms), f("target_ns", s.target_ns);
    f("slowness", s.slowness);
  }

  std::vector<ts::CacheGroup> groups() const {
    using Kind = ts::CacheGroup::Kind;
    std::vector<ts::CacheGroup> groups;
    if (full != 0) groups.push_back({});
    for (const int64_t w : {window, window_2}) {
      if (w != 0) groups.push_back({Kind::window, static_cast<int32_t>(w)});
    }
    if (recurrent != 0) groups.push_back({Kind::recurrent});
    return groups;
  }

  ts::EngineOptions options() const {
    ts::EngineOptions o;
    o.vocab_size = 24;
    o.eos_token_ids = {1};
    o.scheduler.page_size = static_cast<int32_t>(page_size);
    o.scheduler.num_pages = static_cast<int32_t>(num_pages);
    o.scheduler.max_context = static_cast<int32_t>(max_context);
    o.scheduler.token_budget = static_cast<int32_t>(token_budget);
    o.scheduler.max_seqs = static_cast<int32_t>(max_seqs);
    o.scheduler.prefix_cache = prefix_cache != 0;
    o.scheduler.groups = groups();
    o.scheduler.tier = {static_cast<int32_t>(num_slots), static_cast<int32_t>(max_stores),
                        static_cast<int32_t>(max_loads)};
    o.scheduler.num_owners = static_cast<int32_t>(num_owners);
    o.scheduler.max_draft = static_cast<int32_t>(max_draft);
    o.scheduler.ahead = ahead != 0;
    o.scheduler.patience_ms = patience_ms;
    o.scheduler.cost =
        ts::StepCost({{1, 1000}, {2, 1100}, {4, 1300}, {8, 1700}, {16, 2500}, {24, 3300}}, 10'000, 10'000);
    if (cheap != 0) o.scheduler.cost = ts::StepCost({{1, 1000}, {24, 1115}}, 1, 1);
    o.scheduler.earlier = {.num_tokens = 64, .num_tenants = 3};
    o.scheduler.target_step_ns = target_ns;
    return o;
  }

  /// Whether every request in it is one that the engine would take.
  bool legal() const {
    return page_size >= 1 && num_pages >= 1 && token_budget >= 1 && max_seqs >= 1 && num_owners >= 1 &&
           !groups().empty() && num_slots >= 0 && max_stores >= 1 && max_loads >= std::ssize(groups()) &&
           std::ranges::all_of(events, [&](const Event &e) {
             return e.what != "arrive" || (e.prompt >= 1 && e.max_tokens >= 1 && fits(e.prompt + e.max_tokens));
           });
  }

  bool fits(int64_t context) const {
    return context <= max_context &&
           ts::most_pages(groups(), static_cast<int32_t>(context) - 1, static_cast<int32_t>(token_budget),
                          static_cast<int32_t>(page_size)) <= num_pages;
  }
};

inline std::string print(const Script &script) {
  std::ostringstream out;
  const auto put = [&](const char *name, int64_t value) { out << ' ' << name << '=' << value; };
  out << "world";
  Script::fields(script, put);
  for (const Event &e : script.events) {
    out << '\n' << e.at << ' ' << e.what;
    Event::fields(e, put);
  }
  out << '\n';
  return out.str();
}

/// What print wrote. A field that is missing keeps its default.
inline Script parse(std::istream &in) {
  Script script;
  std::string line;
  while (std::getline(in, line)) {
    std::istringstream words(line);
    std::string first, word;
    words >> first;
    if (first.empty()) continue;
    const bool world = first == "world";
    Event *e = world ? nullptr : &script.events.emplace_back();
    if (e != nullptr) {
      e->at = std::stoll(first);
      words >> e->what;
    }
    while (words >> word) {
      const size_t equals = word.find('=');
      const auto take = [&](const char *name, int64_t &value) {
        if (word.substr(0, equals) == name) value = std::stoll(word.substr(equals + 1));
      };
      world ? Script::fields(script, take) : Event::fields(*e, take);
    }
  }
  return script;
}

/// A random world: its size, arrivals, cancels, requests that take nearly all pages, steps that fail, ranks that are lost.
class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed), of_tier_(seed), ahead_(static_cast<int64_t>(seed % 2)) {}

  Script script(int64_t num_steps) {
    Script s;
    s.ahead = ahead_;
    s.page_size = int64_t{1} << between(0, 3);
    s.num_pages = between(2, 60 / s.page_size + 4);
    s.token_budget = one_in(4) ? between(1, 3) : between(1, 24);
    s.max_seqs = between(1, 8);
    s.prefix_cache = one_in(4) ? 0 : 1;
    s.num_owners = one_in(3) ? between(2, 4) : 1;
    s.patience_ms = one_in(2) ? between(1, 30) : between(100, 10'000);
    if (one_in(2)) s.target_ns = between(500, 6000), s.slowness = one_in(2) ? 100 : between(20, 400);
    s.max_draft = one_in(2) ? 0 : between(1, ts::Draft::kMost);
    s.cheap = s.max_draft % 3 != 0 ? 1 : 0;
    if (one_in(2)) draw_groups(s);
    s.num_pages *= static_cast<int64_t>(s.groups().size());
    for (s.max_context = 48; !s.fits(s.max_context);) --s.max_context;
    const int64_t arrivals = between(1, 100);  // in percent of the steps
    int64_t num_arrived = 0;
    for (int64_t at = 0; at < num_steps; ++at) {
      if (between(1, 100) <= arrivals) s.events.push_back(arrival(s, at, ++num_arrived));
      if (one_in(20) && num_arrived > 0) {
        Event &e = s.events.emplace_back();
        e.at = at, e.what = "cancel", e.id = num_arrived - between(0, std::min<int64_t>(num_arrived, 12) - 1);
      }
      if (one_in(400)) add(s, at, "fail");
      if (one_in(2000)) add(s, at, "lose");
      if (one_in(100)) {
        add(s, at, "jump");
        s.events.back().by_ms = one_in(4) ? between(-20, 0) : between(0, 1000);
      }
    }
    if (s.prefix_cache != 0) add_tier(s, num_steps);
    return s;
  }

 private:
  /// Alone a window sees some token before the last, so that the poison spreads.
  void draw_groups(Script &s) {
    s.full = one_in(3) ? 0 : 1;
    s.recurrent = one_in(2) ? 1 : 0;
    if (s.recurrent == 0 || one_in(2)) s.window = between(s.full + s.recurrent > 0 ? 1 : 2, 24);
    if (s.window != 0 && one_in(3)) s.window_2 = between(2, 40);
  }

  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random_() % static_cast<uint64_t>(high - low + 1));
  }
  bool one_in(int64_t n) { return between(1, n) == 1; }

  /// A second tier, in half of the worlds. It has dice of its own, so that the rest of a world is the same with and without.
  void add_tier(Script &s, int64_t num_steps) {
    std::swap(random_, of_tier_);
    if (one_in(2)) {
      s.num_slots = one_in(3) ? between(1, 4) : between(4, 60);
      s.max_stores = one_in(4) ? between(1, 3) : 32;
      s.max_loads = std::max<int64_t>(between(1, 8), std::ssize(s.groups()));
      const int64_t trouble = one_in(2) ? 400 : 20;  // steps from one to the next
      for (int64_t at = 0; at < num_steps; ++at) {
        if (one_in(trouble)) add(s, at, one_in(2) ? "tear" : "refuse");
      }
      std::ranges::stable_sort(s.events, {}, &Event::at);
    }
    std::swap(random_, of_tier_);
  }

  static void add(Script &s, int64_t at, const char *what) {
    Event &e = s.events.emplace_back();
    e.at = at, e.what = what;
  }

  Event arrival(const Script &s, int64_t at, int64_t id) {
    Event e;
    e.at = at, e.what = "arrive", e.id = id;
    const bool hog = one_in(40);
    e.prompt =
        hog ? s.max_context - 1 : between(1, one_in(3) ? s.max_context - 1 : std::min<int64_t>(12, s.max_context - 1));
    e.family = between(1, 3);  // few: prefixes are shared
    if (one_in(2)) e.changed = between(0, e.prompt - 1), e.changed_to = between(4, 23);
    if (one_in(25)) e.poison = std::min(e.prompt - 1, between(0, 1) * 3);  // often the same beginning again
    e.max_tokens = between(1, s.max_context - e.prompt);
    e.seed = between(0, 3);
    e.warm = between(0, 1), e.top_k = between(0, 1) * 5, e.narrow = between(0, 1);
    e.repeated = one_in(4) ? 1 : 0, e.frequent = one_in(4) ? 1 : 0, e.ignore_eos = between(0, 1);
    if (one_in(4)) e.stop = between(4, 23);
    if (one_in(2)) e.repeat = between(1, 2);
    if (one_in(8)) e.tenant = one_in(4) ? id + 2 : between(1, 2);  // of one request alone, or of many
    if (one_in(3)) e.priority = between(-1, 1);
    if (one_in(2)) e.account = one_in(20) ? id + 3 : between(1, 3);
    if (one_in(8)) e.timeout_ms = between(1, 400);
    if (one_in(2)) e.session = between(1, 4), e.lease_ms = one_in(3) ? 0 : between(1, 200);
    return e;
  }

  std::mt19937_64 random_, of_tier_;
  int64_t ahead_;  // not drawn, so that a world is otherwise the same
};

}  // namespace sim
