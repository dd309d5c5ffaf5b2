#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>

namespace ts {

/// How long a thread that waits for others spins before it sleeps. Shared by the threads of one place of waiting.
///
/// Turns of a pause, 25 to 60 ns each: long enough to bridge the time between launches and between steps, short enough that an idle
/// engine rests. Where others want the cores too, spinning only takes time from the thread that is waited for: each wait that had to
/// sleep halves the turns, and waits that did not bring them back step by step.
class Patience {
 public:
  static constexpr int kMostTurns = 4000;

  /// `most`: turns before sleeping; 0 where threads outnumber cores, so that who waits makes room.
  explicit Patience(int most) : most_(most), turns_(most) {}

  /// Spins until met() says true, and returns true; or false once it is time to sleep.
  template <class Met>
  bool spin(const Met &met) {
    const int turns = turns_.load(std::memory_order_relaxed);
    for (int i = 0; i < turns; ++i) {
      if (met()) {
        if (turns < most_) turns_.store(std::min(turns + kMore, most_), std::memory_order_relaxed);
        return true;
      }
      _mm_pause();
    }
    turns_.store(std::min(std::max(turns / 2, kFewest), most_), std::memory_order_relaxed);
    return false;
  }

 private:
  static constexpr int kFewest = 32;
  static constexpr int kMore = 64;

  const int most_;
  std::atomic<int> turns_;  // what waits at present are worth
};

}  // namespace ts
