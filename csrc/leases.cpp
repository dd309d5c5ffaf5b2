#include "leases.h"

#include <utility>

#include "check.h"

namespace ts {

void Leases::add(Leased &&leased) {
  end(leased.session());
  const uint64_t session = leased.session();
  const int64_t until_ms = leased.until_ms();
  num_pages_ += leased.num_pages();
  by_session_[session] = by_end_.emplace(until_ms, std::move(leased));
}

void Leases::end(uint64_t session) {
  const auto found = by_session_.find(session);
  if (found != by_session_.end()) end(found->second);
}

void Leases::end_soonest() {
  TS_ASSERT(!empty(), "there is no lease to end");
  end(by_end_.begin());
}

bool Leases::end_due(int64_t now_ms) {
  bool any = false;
  for (; !empty() && by_end_.begin()->first <= now_ms; any = true) end_soonest();
  return any;
}

void Leases::end(ByEnd::iterator it) {
  num_pages_ -= it->second.num_pages();
  by_session_.erase(it->second.session());
  Transition::apply(std::move(it->second), Expire{});
  by_end_.erase(it);
}

}  // namespace ts
