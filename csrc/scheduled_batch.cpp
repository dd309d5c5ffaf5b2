#include "scheduled_batch.h"

#include <algorithm>
#include <exception>

namespace ts {

Batch::~Batch() {
  TS_ASSERT((running_.empty() && copies_.empty()) || std::uncaught_exceptions() > 0,
            "a batch was dropped: its requests would never end");
}

void Batch::fill(const Batch &older, std::span<const Outcome> outcomes) {
  for (size_t logit = 0; logit < outcomes.size(); ++logit) {
    const Passed &passed = older.passed_[static_cast<size_t>(older.logit_rows_[logit].running)];
    if (passed.sequence == nullptr) continue;
    // In place of an error: it runs for nothing.
    arrays_->set_token(arrays().query_start[passed.row], std::max(outcomes[logit].token, 0));
  }
}

}  // namespace ts
