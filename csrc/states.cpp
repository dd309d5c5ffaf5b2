#include "states.h"

#include <algorithm>

#include "check.h"

namespace ts {

void Prefilling::adopt(PrefixCache &cache, int32_t most, std::span<int32_t> row) {
  const int32_t page_size = cache.pool().page_size();
  Prefix prefix = match_prefix(cache, *sequence_, num_computed_ / page_size, most);
  const int32_t behind = prefix.num_pages * page_size;
  if (behind <= num_computed_) return;
  context_.adopt(cache, std::move(prefix), row);
  TS_ASSERT(behind < sequence_->num_tokens(), "adopted pages leave a token to compute");
  const int32_t known = std::max(num_computed_, sequence_->num_reached);
  sequence_->num_cached += std::max(0, std::min(behind, sequence_->num_prompt) - known);
  sequence_->num_reached = std::max(sequence_->num_reached, behind);
  num_computed_ = behind;
  if (sequence_->num_outputs() == 0) sequence_->miss = explain_miss(cache, *sequence_, behind / page_size);
}

}  // namespace ts
