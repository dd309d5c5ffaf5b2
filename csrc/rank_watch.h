#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "file.h"
#include "rank_group.h"

namespace ts {

/// Watches over the other ranks from a thread of its own: a socket that closes is a process that died; one that is open, but whose
/// watch has not beaten for the timeout, is stopped. Either aborts the group. Rank 0 watches all others, and they watch rank 0.
class RankWatch {
 public:
  RankWatch(std::shared_ptr<RankGroup> group, int32_t timeout_ms);
  ~RankWatch();
  RankWatch(const RankWatch &) = delete;
  RankWatch &operator=(const RankWatch &) = delete;

  /// Calls back, once, with the message when the group is aborted, by whomever; at once if it has been. Null: no more.
  void on_failure(std::function<void(const std::string &)> callback);

 private:
  void loop();
  void check_beats();
  void report();
  int32_t rank_of(size_t socket) const;

  const std::shared_ptr<RankGroup> group_;
  const int32_t timeout_ms_;
  const int32_t tick_ms_;
  FileDescriptor stop_;  // an eventfd
  struct Seen {
    uint32_t beats = 0;
    int64_t quiet_ms = 0;  // of this watch's own ticks: a stop of the whole run is no one's fault
  };
  std::vector<Seen> seen_;
  std::mutex mutex_;  // guards the following
  std::function<void(const std::string &)> callback_;
  bool failed_ = false;
  std::thread thread_;
};

}  // namespace ts
