#include "scheduler.h"

#include <algorithm>
#include <utility>

#include "check.h"

namespace ts {

int32_t Scheduler::youngest() const {
  const auto it = std::max_element(running_.begin(), running_.end(), [](const Running &a, const Running &b) {
    return a.sequence().turn < b.sequence().turn;
  });
  return static_cast<int32_t>(it - running_.begin());
}

void Scheduler::move_row(int32_t from, int32_t to) {
  running(to) = std::move(running(from));
  arrays_.move_row(from, to, running(to).context().num_entries(options_.groups));
}

/// The row behind those of `owner`: of each owner after it, the first sequence moves behind the last. If it is no new row, what
/// runs there is spent.
int32_t Scheduler::make_row(int32_t owner) {
  int32_t row = num_running();
  for (int32_t o = cache_.num_owners() - 1; o > owner; --o) {
    const int32_t count = num_running_of_[static_cast<size_t>(o)];
    if (count == 0) continue;
    const int32_t first = row - count;
    if (row == num_running()) {
      running_.push_back(std::move(running(first)));
      arrays_.move_row(first, row, running_.back().context().num_entries(options_.groups));
    } else {
      move_row(first, row);
    }
    row = first;
  }
  ++num_running_of_[static_cast<size_t>(owner)];
  return row;
}

/// Takes out the r-th sequence, whose state is spent; the last one of its owner moves to its row, to that one's the last of the
/// next owner, and so on.
void Scheduler::remove(int32_t r) {
  int32_t end = 0, hole = r;
  for (int32_t &count : num_running_of_) {
    const bool mine = end <= r && r < end + count;
    end += count;
    if (end <= r) continue;
    if (mine) --count;
    if (hole != end - 1) move_row(end - 1, hole);
    hole = end - 1;
  }
  running_.pop_back();
  short_of_pages_.reset();
}

void Scheduler::remove_ended() {
  for (int32_t r = num_running() - 1; r >= 0; --r) {
    if (running(r).num_tokens == 0) remove(r);
  }
}

void Scheduler::fill_arrays(BatchArrays &arrays, std::vector<LogitRow> &logit_rows) {
  int32_t num_tokens = 0;
  for (const Running &seq : running_) num_tokens += seq.num_tokens;
  arrays.clear(num_tokens);
  logit_rows.clear();
  for (int32_t r = 0; r < num_running(); ++r) {
    const Running &seq = running(r);
    const Sequence &sequence = seq.sequence();
    const int32_t begin = seq.begin();
    const int32_t end = begin + seq.num_tokens;
    const int32_t said = sequence.num_tokens(), known = said + (seq.awaits ? 1 : 0);
    TS_ASSERT(seq.num_tokens >= 1 && end <= known + seq.draft.size, "every running sequence has tokens in every step");
    const int32_t first_token = arrays.num_tokens();
    arrays.add_sequence(end);
    for (int32_t p = begin; p < end;) {
      const WritablePage &page = seq.context().open_page(options_.groups, 0, p, options_.page_size);
      int32_t offset = p % options_.page_size;
      for (; p < end && offset < options_.page_size; ++p) {
        const int32_t token = p < said    ? sequence.tokens[static_cast<size_t>(p)]
                              : p < known ? BatchArrays::kToCome
                                          : seq.draft.tokens[static_cast<size_t>(p - known)];
        arrays.add_token(token, p, page.slot(offset++));
        if (p < known - 1) continue;
        arrays.want_logits();
        logit_rows.push_back({r, p - (known - 1)});
      }
    }
    if (num_groups() > 1) set_slots(arrays, r, first_token);
  }
}

/// Of the r-th sequence's tokens, the first of which is `first_token` of the step, in the groups behind the first.
void Scheduler::set_slots(BatchArrays &arrays, int32_t r, int32_t first_token) {
  const Running &seq = running(r);
  const int32_t begin = seq.begin(), end = begin + seq.num_tokens, page_size = options_.page_size;
  for (int32_t g = 1; g < num_groups(); ++g) {
    int32_t token = first_token;
    for (int32_t p = begin; p < end;) {
      const WritablePage &page = seq.context().open_page(options_.groups, static_cast<size_t>(g), p, page_size);
      for (const int32_t stop = std::min(end, (p / page_size + 1) * page_size); p < stop; ++p) {
        arrays.set_slot(g, token++, page.slot(p % page_size));
      }
    }
  }
}

}  // namespace ts
