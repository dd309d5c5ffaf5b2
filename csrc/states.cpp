#include "states.h"

#include <algorithm>

#include "check.h"

namespace ts {

Context &Context::operator=(Context &&other) noexcept {
  Context taken = std::move(other);  // first: other may be this one
  sealed_.swap(taken.sealed_);
  open_.swap(taken.open_);
  return *this;
}

void Context::release() {
  open_.clear();
  while (!sealed_.empty()) sealed_.pop_back();
}

void Context::adopt(std::vector<SharedPage> &&pages, std::span<int32_t> row) {
  open_.clear();
  for (SharedPage &page : pages) {
    row[sealed_.size()] = page.number();
    sealed_.push_back(std::move(page));
  }
  pages.clear();
}

void Context::reserve(PrefixCache &cache, int32_t num_tokens, std::span<int32_t> row) {
  const int32_t wanted = num_pages_for(num_tokens, cache.pool().page_size());
  TS_ASSERT(static_cast<size_t>(wanted) <= row.size(), "a context is longer than its row of the page table");
  while (num_pages() < wanted) {
    WritablePage page = cache.allocate();
    row[static_cast<size_t>(num_pages())] = page.number();
    open_.push_back(std::move(page));
  }
}

void Context::seal(PrefixCache &cache, const Sequence &sequence, int32_t num_computed, std::span<int32_t> row) {
  const int32_t num_full = num_computed / cache.pool().page_size();
  TS_ASSERT(num_full <= num_pages(), "more tokens were computed than there is room for");
  size_t num_newly = 0;
  for (; num_sealed() < num_full; ++num_newly) {
    const size_t index = sealed_.size();
    TS_ASSERT(!cache.enabled() || index < sequence.hashes.size(), "a page was filled before its hash was known");
    sealed_.push_back(cache.enabled() ? cache.seal(std::move(open_[num_newly]), sequence.hashes[index],
                                                   sequence.parent(index), sequence.page(index))
                                      : cache.seal(std::move(open_[num_newly]), {}));
    row[index] = sealed_.back().number();  // another page, if the same content was here already
  }
  open_.erase(open_.begin(), open_.begin() + static_cast<ptrdiff_t>(num_newly));
}

void Context::forget(PrefixCache &cache) const {
  for (const SharedPage &page : sealed_) cache.forget(page);
}

const WritablePage &Context::open_page(int32_t position, int32_t page_size) const {
  const int32_t index = position / page_size - num_sealed();
  TS_ASSERT(index >= 0, "a sealed page must not be written");
  TS_ASSERT(static_cast<size_t>(index) < open_.size(), "a token has no page");
  return open_[static_cast<size_t>(index)];
}

void Prefilling::adopt(PrefixCache &cache, std::span<int32_t> row) {
  const int32_t page_size = cache.pool().page_size();
  std::vector<SharedPage> pages = match_prefix(cache, *sequence_, context_.num_sealed());
  if (pages.empty()) return;
  context_.adopt(std::move(pages), row);
  const int32_t behind = context_.num_sealed() * page_size;
  TS_ASSERT(behind > num_computed_ && behind < sequence_->num_tokens(),
            "adopted pages lead on, and leave a token to compute");
  const int32_t known = std::max(num_computed_, sequence_->num_reached);
  sequence_->num_cached += std::max(0, std::min(behind, sequence_->num_prompt) - known);
  sequence_->num_reached = std::max(sequence_->num_reached, behind);
  num_computed_ = behind;
  if (sequence_->num_outputs() == 0) sequence_->miss = explain_miss(cache, *sequence_, context_.num_sealed());
}

std::vector<SharedPage> match_prefix(PrefixCache &cache, const Sequence &sequence, int32_t first) {
  const auto last = static_cast<size_t>((sequence.num_tokens() - 1) / sequence.page_size);
  const std::span<const PageHash> hashes(sequence.hashes);
  const size_t end = std::min(last, hashes.size()), begin = std::min(static_cast<size_t>(first), end);
  return cache.find_prefix(hashes.subspan(begin, end - begin));
}

Miss explain_miss(const PrefixCache &cache, const Sequence &sequence, int32_t num_found) {
  const auto page = static_cast<size_t>(num_found);
  const int32_t begin = num_found * sequence.page_size;
  if (!cache.enabled()) return {TS_MISS_OFF, 0};
  if (begin + sequence.page_size > sequence.num_prompt - 1) return {};  // the last token's page is computed always
  Miss miss = cache.explain(sequence.hashes[page], sequence.parent(page), sequence.page(page));
  miss.at = begin + (sequence.salted ? miss.at : 0);
  return miss;
}

}  // namespace ts
