#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>

#include "script.h"

namespace sim {

/// Runs job in a child process, because what it finds may abort. True if it returned true.
inline bool passes(const std::function<bool()> &job, bool quiet) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    if (quiet) (void)!(std::freopen("/dev/null", "w", stdout) && std::freopen("/dev/null", "w", stderr));
    if (quiet) alarm(10);  // what hangs has failed
    const bool passed = job();
    std::fflush(nullptr);
    std::_Exit(passed ? 0 : 1);
  }
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/// Cuts a failing script down while it still fails: leaves out events, many at a time and then one by one (delta debugging),
/// makes numbers smaller, and moves events together. Ends when nothing more can go, or after `seconds`.
class Shrink {
 public:
  Shrink(Script script, std::function<bool(const Script &)> fails, int seconds)
      : best_(std::move(script)),
        fails_(std::move(fails)),
        end_(std::chrono::steady_clock::now() + std::chrono::seconds(seconds)) {}

  Script run() {
    while (less_events() | smaller_numbers() | closer_together()) {
    }
    return best_;
  }

 private:
  bool keep(const Script &script) {
    if (std::chrono::steady_clock::now() > end_ || !script.legal() || !fails_(script)) return false;
    best_ = script;
    return true;
  }

  bool less_events() {
    bool any = false;
    for (size_t chunk = best_.events.size(); chunk >= 1; chunk /= 2) {
      for (size_t i = 0; i < best_.events.size();) {
        Script less = best_;
        const auto begin = less.events.begin() + static_cast<ptrdiff_t>(i);
        less.events.erase(begin, begin + static_cast<ptrdiff_t>(std::min(chunk, less.events.size() - i)));
        if (keep(less)) {
          any = true;
        } else {
          i += chunk;
        }
      }
    }
    return any;
  }

  /// Tries values from the simplest one on; `field` finds the number in a copy.
  bool smaller(const std::function<int64_t &(Script &)> &field, int64_t simplest) {
    const int64_t now = field(best_);
    for (const int64_t value : {simplest, simplest + (now - simplest) / 2, now - 1}) {
      if (value < simplest || value >= now) continue;
      Script less = best_;
      field(less) = value;
      if (keep(less)) return true;
    }
    return false;
  }

  bool smaller_numbers() {
    struct Number {
      int64_t Event::*of;
      int64_t simplest;
    };
    constexpr std::array kNumbers = {
        Number{&Event::prompt, 1},     Number{&Event::max_tokens, 1}, Number{&Event::changed, -1},
        Number{&Event::poison, -1},    Number{&Event::changed_to, 0}, Number{&Event::family, 0},
        Number{&Event::seed, 0},       Number{&Event::warm, 0},       Number{&Event::top_k, 0},
        Number{&Event::narrow, 0},     Number{&Event::repeated, 0},   Number{&Event::frequent, 0},
        Number{&Event::ignore_eos, 0}, Number{&Event::stop, 0},       Number{&Event::tenant, 0},
        Number{&Event::session, 0},    Number{&Event::lease_ms, 0},   Number{&Event::priority, 0},
        Number{&Event::account, 0},    Number{&Event::timeout_ms, 0},
    };
    bool any = false;
    for (size_t i = 0; i < best_.events.size(); ++i) {
      for (const Number &number : kNumbers) {
        any |= smaller([&](Script &s) -> int64_t & { return s.events[i].*number.of; }, number.simplest);
      }
    }
    for (const auto member : {&Script::max_seqs, &Script::token_budget, &Script::num_pages, &Script::max_loads}) {
      any |= smaller([&](Script &s) -> int64_t & { return s.*member; }, 1);
    }
    for (const auto member : {&Script::window_2, &Script::window, &Script::recurrent}) {
      any |= smaller([&](Script &s) -> int64_t & { return s.*member; }, 0);
    }
    return any;
  }

  bool closer_together() {
    bool any = false;
    for (size_t i = 0; i < best_.events.size(); ++i) {
      const int64_t before = i == 0 ? 0 : best_.events[i - 1].at;
      const int64_t gap = best_.events[i].at - before;
      for (const int64_t less : {gap, gap / 2, int64_t{1}}) {
        if (less < 1 || less > gap) continue;
        Script closer = best_;
        for (size_t j = i; j < closer.events.size(); ++j) closer.events[j].at -= less;
        if (keep(closer)) {
          any = true;
          break;
        }
      }
    }
    return any;
  }

  Script best_;
  std::function<bool(const Script &)> fails_;
  std::chrono::steady_clock::time_point end_;
};

}  // namespace sim
