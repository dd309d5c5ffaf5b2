#include "cache_parts.h"

#include <ranges>
#include <utility>

#include "check.h"

namespace ts {

CacheParts::CacheParts(int32_t num_owners, int32_t num_pages, int32_t page_size, bool prefix_cache,
                       const std::vector<CacheGroup> &groups, const TierOptions &tier)
    : tier_(tier) {
  TS_ASSERT(num_owners >= 1, "the cache has an owner");
  TS_ASSERT(prefix_cache || tier.num_slots == 0, "a second tier keeps what a prefix cache evicts");
  TS_ASSERT(tier.num_slots == 0 || static_cast<size_t>(tier.max_loads) >= groups.size(),
            "a step brings back at least one page of the text, of every group");
  for (int32_t owner = 0; owner < num_owners; ++owner) {
    auto second = tier.num_slots > 0 ? std::make_unique<Tier>(tier, owner * tier.num_slots, copies_) : nullptr;
    parts_.push_back(
        std::make_unique<Part>(owner * num_pages, num_pages, page_size, prefix_cache, groups, std::move(second)));
  }
}

std::vector<PageCopy> CacheParts::take_copies() {
  if (copies_.empty()) return {};
  std::vector<PageCopy> taken = std::exchange(copies_, std::exchange(spare_, {}));
  copies_.reserve(static_cast<size_t>(tier_.max_copies()));
  return taken;
}

void CacheParts::end_copies(std::vector<PageCopy> &&copies) {
  if (copies.empty()) return;
  const auto end = [this](const PageCopy &copy) {
    parts_[static_cast<size_t>(copy.slot / tier_.num_slots)]->tier->end(copy);
  };
  // The deepest page of a text first, so that it is given away first: so pages are evicted, but brought back the other way.
  for (const PageCopy &copy : copies) {
    if (copy.to == PageCopy::To::slot) end(copy);
  }
  for (const PageCopy &copy : std::views::reverse(copies)) {
    if (copy.to == PageCopy::To::page) end(copy);
  }
  copies.clear();
  spare_ = std::move(copies);
}

int32_t CacheParts::num_blank() const {
  int32_t pages = 0;
  for (const auto &part : parts_) pages += part->pool.num_blank();
  return pages;
}

int32_t CacheParts::num_idle() const {
  int32_t pages = 0;
  for (const auto &part : parts_) pages += part->pool.num_idle();
  return pages;
}

int32_t CacheParts::num_held() const {
  int32_t slots = 0;
  for (const auto &part : parts_) slots += part->tier ? part->tier->num_held() : 0;
  return slots;
}

void CacheParts::check() const {
  for (const auto &part : parts_) {
    part->cache.check();
    if (part->tier) part->tier->check();
  }
}

}  // namespace ts
