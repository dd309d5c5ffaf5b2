#include "rank_group.h"

#include <utility>

#include "check.h"
#include "text.h"

namespace ts {

std::string rank_name(int32_t rank, int32_t pid, std::string_view host) {
  std::string text = "rank " + std::to_string(rank);
  if (pid > 0) text += " (process " + std::to_string(pid) + (host.empty() ? ")" : " on " + one_line(host) + ")");
  return text;
}

RankGroup::RankGroup(const RankLayout &layout, int32_t rank, std::vector<FileDescriptor> sockets)
    : layout_(layout), rank_(rank), sockets_(std::move(sockets)) {
  TS_ASSERT(rank >= 0 && rank < layout.num_ranks && layout.num_ranks <= kMaxRanks, "a rank beyond the layout");
}

std::string RankGroup::who(int32_t rank) const {
  const auto r = static_cast<size_t>(rank);
  return rank_name(rank, layout_.pids[r], layout_.hosts[r].data());
}

void RankGroup::check() const {
  if (aborted()) throw Error(TS_LOST_RANK, failure());
}

}  // namespace ts
