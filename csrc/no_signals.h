#pragma once

#include <pthread.h>

#include <csignal>

namespace ts {

/// Blocks every signal on this thread while it lives, and so on threads that it starts: handlers belong to the process, not to us.
class NoSignals {
 public:
  NoSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  NoSignals(const NoSignals &) = delete;
  NoSignals &operator=(const NoSignals &) = delete;

 private:
  sigset_t before_{};
};

}  // namespace ts
