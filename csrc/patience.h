#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>

namespace ts {

/// How long a thread that waits for others spins before it sleeps. Shared by the threads of one place of waiting.
///
/// Turns of a pause, 25 to 60 ns each: long enough to bridge what threads of one step differ by, short enough that an idle engine rests.
/// To be woken costs more than most such waits, some hundred microseconds on a virtual machine. Where others want the cores too, spinning only takes time from the
/// thread that is waited for: when more waits sleep after all their turns than do not, the next ones get few, and then it is tried again.
class Patience {
 public:
  static constexpr int kMostTurns = 16000;

  /// `most`: turns before sleeping; 0 where threads outnumber cores, so that who waits makes room.
  explicit Patience(int most) : most_(most) {}

  /// Spins until met() says true, and returns true; or false once it is time to sleep.
  template <class Met>
  bool spin(const Met &met) {
    const int credit = credit_.load(std::memory_order_relaxed);
    const int turns = credit > 0 ? most_ : std::min(most_, kFewTurns);
    for (int i = 0; i < turns; ++i) {
      if (met()) {
        if (credit < kMostCredit) credit_.store(credit + 1, std::memory_order_relaxed);
        return true;
      }
      _mm_pause();
    }
    // -kFewInARow, ..., 0 have few turns each; the one behind it is a trial.
    credit_.store(credit > 1 ? credit - 1 : credit == 1 ? -kFewInARow : credit + 1, std::memory_order_relaxed);
    return false;
  }

 private:
  static constexpr int kFewTurns = 32;
  static constexpr int kMostCredit = 16;
  static constexpr int kFewInARow = 256;

  const int most_;
  std::atomic<int> credit_ = kMostCredit;  // waits that may sleep after all turns before they get few
};

}  // namespace ts
