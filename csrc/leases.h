#pragma once

#include <cstdint>
#include <map>
#include <unordered_map>

#include "events.h"

namespace ts {

/// What sessions have left between their turns, by when it ends. O(log(leases)) each.
class Leases {
 public:
  bool empty() const { return by_end_.empty(); }
  int32_t size() const { return static_cast<int32_t>(by_end_.size()); }
  int32_t num_pages() const { return num_pages_; }  ///< summed: what two share counts twice

  void add(Leased &&leased);     ///< in place of what the session had
  void end(uint64_t session);    ///< of this session, if it has any
  void end_soonest();            ///< demands that there is one
  bool end_due(int64_t now_ms);  ///< all whose time has come; false if there is none

 private:
  using ByEnd = std::multimap<int64_t, Leased>;
  void end(ByEnd::iterator it);

  ByEnd by_end_;
  std::unordered_map<uint64_t, ByEnd::iterator> by_session_;
  int32_t num_pages_ = 0;
};

}  // namespace ts
