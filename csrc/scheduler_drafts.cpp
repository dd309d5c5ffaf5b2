#include "scheduler.h"

#include <algorithm>

namespace ts {

/// Lets decodes guess ahead, with tokens and rows of logits that nobody else wants, and pages that nobody may miss.
void Scheduler::draft(int32_t left) {
  if (num_decodes_ == 0) return;
  static const StepCost kFree({{1, 1}}, 0, 0);
  const StepCost &cost = options_.drafts_at_any_cost ? kFree : cost_;
  const double decodes_ns = cost.ns({num_decodes_, load_.decode_keys, 0});
  const double token_ns = decodes_ns / num_decodes_;
  StepValue step{cost, load_, decodes_ns, static_cast<double>(num_decodes_)};
  int32_t rows = options_.max_seqs - num_running();
  for (int32_t r = 0; r < num_running(); ++r) {
    auto *decoding = std::get_if<Decoding>(&running(r).state);
    if (decoding == nullptr || decoding->sequence().drafts == nullptr) continue;
    const Sequence &sequence = decoding->sequence();
    sequence.drafts->earn(token_ns);
    const bool spare = pool(sequence.owner).num_available() >= num_groups() * (num_running() + 1);
    const int32_t room =
        decoding->context().room(options_.groups, spare ? num_groups() : 0, options_.page_size) - sequence.num_tokens();
    const int32_t before_last = sequence.max_tokens - sequence.num_outputs() - 1;
    const int32_t most = fitting(std::min({options_.max_draft, left, rows, room, before_last}), sequence.num_tokens());
    if (most <= 0) continue;
    running(r).draft = sequence.drafts->guess(sequence.tokens, sequence.root, earlier_, most, step);
    const int32_t num_drafted = running(r).draft.size;
    running(r).num_tokens += num_drafted;
    decoding->context().reserve(cache_.of(sequence.owner), sequence.num_tokens() + num_drafted, arrays_.row(r));
    load_ = step.load;
    left -= num_drafted;
    rows -= num_drafted;
  }
}

/// What it has said, and the end of what that answers, is where drafts of its tenant's later requests are found.
void Scheduler::remember(const Sequence &sequence) {
  if (options_.max_draft == 0 || sequence.num_outputs() == 0) return;
  const auto before =
      static_cast<size_t>(sequence.num_prompt) - std::min<size_t>(sequence.num_prompt, TextIndex::kEnough);
  earlier_.add(sequence.root, std::span(sequence.tokens).subspan(before));
}

}  // namespace ts
