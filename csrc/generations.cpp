#include "generations.h"

#include <algorithm>
#include <utility>

namespace ts {

Generations::Tenant *Generations::find(const PageHash &tenant) {
  const auto found = std::ranges::find(keys_, tenant);
  if (found == keys_.end()) return nullptr;
  Tenant &t = tenants_[static_cast<size_t>(found - keys_.begin())];
  t.used = ++now_;
  return &t;
}

Generations::Tenant &Generations::make(const PageHash &tenant) {
  if (keys_.size() < options_.num_tenants) {
    tenants_.reserve(keys_.size() + 1);
    keys_.reserve(keys_.size() + 1);  // both or neither
    tenants_.push_back({Half(options_.num_tokens), Half(options_.num_tokens), ++now_});
    keys_.push_back(tenant);
    return tenants_.back();
  }
  const auto oldest = std::ranges::min_element(tenants_, {}, &Tenant::used);
  for (Half *half : {&oldest->younger, &oldest->older}) {
    half->text.clear();
    half->index.clear();
  }
  oldest->used = ++now_;
  keys_[static_cast<size_t>(oldest - tenants_.begin())] = tenant;
  return *oldest;
}

void Generations::add(const PageHash &tenant, std::span<const int32_t> text) {
  text = text.last(std::min(text.size(), options_.num_tokens - 1));
  if (text.size() <= TextIndex::kLeast) return;  // nothing could be found in it
  Tenant *known = find(tenant);
  Tenant &t = known != nullptr ? *known : make(tenant);
  if (t.younger.text.size() + text.size() + 1 > options_.num_tokens) {
    std::swap(t.younger, t.older);
    t.younger.text.clear();
    t.younger.index.clear();
  }
  Half &half = t.younger;
  half.text.insert(half.text.end(), text.begin(), text.end());
  half.text.push_back(kEnd);
  half.index.add(half.text);
}

Generations::Found Generations::longest(const PageHash &tenant, std::span<const int32_t> tail) {
  Found found;
  Tenant *known = find(tenant);
  if (known == nullptr) return found;
  for (const Half *half : {&known->younger, &known->older}) {
    const auto [end, length] = half->index.longest(half->text, tail);
    if (length <= found.length) continue;
    found = {std::span(half->text).subspan(end), length};
  }
  return found;
}

}  // namespace ts
