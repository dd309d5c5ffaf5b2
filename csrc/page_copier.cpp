#include "page_copier.h"

#include <algorithm>
#include <atomic>
#include <numeric>

#include "check.h"

namespace ts {

PageCopier::PageCopier(const KvCache &kv, int32_t num_slots, int32_t max_copies, const std::string &folder,
                       RankGroup *group)
    : kv_(kv),
      num_slots_(num_slots),
      group_(group),
      store_(num_slots, kv.num_layers, kv.page_bytes, folder),
      failed_(static_cast<size_t>(max_copies)),
      ranks_(group == nullptr ? 0 : static_cast<size_t>(group->layout().num_ranks)) {
  std::iota(ranks_.begin(), ranks_.end(), 0);
}

void PageCopier::copy(std::span<const PageCopy> copies, Workers &workers) {
  TS_ASSERT(copies.size() <= failed_.size(), "a step has room for so many copies");
  std::ranges::fill(failed_, 0);
  auto job = [&](int thread, int num_threads, Barrier &barrier) {
    for (size_t i = 0; i < copies.size(); ++i) {
      if (i > 0) barrier.wait();  // it may read what the one before has written
      if (!copy_pieces(copies[i], thread, num_threads)) std::atomic_ref(failed_[i]).store(1, std::memory_order_relaxed);
    }
    if (group_ == nullptr) return;
    barrier.wait();
    tell_rank_0(copies.size(), thread);
  };
  workers.run(job);
}

/// This thread's share of the layers. A page of another owner is not here.
bool PageCopier::copy_pieces(const PageCopy &copy, int thread, int num_threads) {
  const int32_t page = copy.page - kv_.owner * kv_.num_pages, slot = copy.slot - kv_.owner * num_slots_;
  if (page < 0 || page >= kv_.num_pages) return true;
  TS_ASSERT(slot >= 0 && slot < num_slots_, "a page and its slot have one owner");
  bool good = true;
  for (int32_t layer = thread; layer < kv_.num_layers; layer += num_threads) {
    uint8_t *piece = kv_.data + (int64_t{layer} * kv_.num_pages + page) * static_cast<int64_t>(kv_.page_bytes);
    good &= copy.to == PageCopy::To::slot ? store_.store(slot, layer, piece) : store_.load(slot, layer, piece);
  }
  return good;
}

/// Every thread of every rank is here. Areas are as after a step, so the first half is nobody's.
void PageCopier::tell_rank_0(size_t num_copies, int thread) {
  if (thread == 0) std::copy_n(failed_.begin(), num_copies, group_->staging(group_->rank(), 0));
  const StagedParts parts = [num_copies](size_t, size_t to) { return StagedPart{0, to == 0 ? num_copies : 0}; };
  if (!group_->exchange(0, ranks_, parts)) return;
  for (const int32_t rank : ranks_) {
    if (thread > 0 || group_->rank() > 0) break;
    const uint8_t *theirs = group_->staging(rank, 0);
    for (size_t i = 0; i < num_copies; ++i) failed_[i] |= theirs[i];
  }
  group_->end_step();
}

}  // namespace ts
