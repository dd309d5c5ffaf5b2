#include "rank_group.h"

#include <utility>

#include "check.h"
#include "text.h"

namespace ts {

RankGroup::RankGroup(const RankLayout &layout, int32_t rank, std::vector<FileDescriptor> sockets)
    : layout_(layout), rank_(rank), sockets_(std::move(sockets)) {
  TS_ASSERT(rank >= 0 && rank < layout.num_ranks && layout.num_ranks <= kMaxRanks, "a rank beyond the layout");
}

void RankGroup::check() const {
  if (aborted()) throw Error(TS_LOST_RANK, failure());
}

}  // namespace ts
