#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "page_hash.h"
#include "text_index.h"

namespace ts {

/// What earlier requests of a tenant have said, where drafts for later ones are found: agents repeat themselves.
///
/// Tenants share nothing, not even a table in which the text of one could displace that of another: no draft, and no time, depends
/// on what another tenant has said. A tenant keeps its last num_tokens to 2 * num_tokens tokens, in two halves of which the older
/// is emptied when the younger is full. Of more than num_tenants the one that was used the longest ago is forgotten. So memory is
/// bounded, by num_tenants * num_tokens * 24 bytes, and is taken when a tenant ends its first request, never in a step that only
/// decodes. A plain function of the calls it gets.
class Generations {
 public:
  struct Options {
    size_t num_tokens = 1 << 15;  ///< a power of two
    size_t num_tenants = 64;      ///< 48 MiB at most
  };

  explicit Generations(Options options) : options_(options) {}

  /// `text`, of whose tokens the last are taken, has ended. O(its tokens).
  void add(const PageHash &tenant, std::span<const int32_t> text);

  /// What once followed most of the last tokens of `tail`, and how many those are (TextIndex): none if `length` is 0.
  struct Found {
    std::span<const int32_t> next;  ///< a negative token among them ends that generation
    size_t length = 0;
  };
  Found longest(const PageHash &tenant, std::span<const int32_t> tail);

  size_t num_tenants() const { return keys_.size(); }

 private:
  struct Half {
    explicit Half(size_t num_tokens) : index(num_tokens) { text.reserve(num_tokens); }
    std::vector<int32_t> text;  // each generation ends with kEnd
    TextIndex index;
  };
  struct Tenant {
    Half younger, older;
    uint64_t used = 0;
  };
  static constexpr int32_t kEnd = -1;

  Tenant *find(const PageHash &tenant);
  Tenant &make(const PageHash &tenant);

  Options options_;
  std::vector<PageHash> keys_;
  std::vector<Tenant> tenants_;
  uint64_t now_ = 0;  // calls
};

}  // namespace ts
