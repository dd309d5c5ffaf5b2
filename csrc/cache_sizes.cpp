#include "cache_sizes.h"

#include <algorithm>
#include <limits>

#include "executor.h"
#include "host.h"
#include "rank_group.h"
#include "text.h"

namespace ts {
namespace {

constexpr int64_t kTokensPerSeq = 2048;                    // of the default KV cache
constexpr uint64_t kRestoredPerStep = uint64_t{32} << 20;  // bytes: what decodes wait for beside it

/// Of the rank that has the most layers.
uint64_t bytes_of_page(const Program &program) {
  return program.page_bytes * static_cast<uint64_t>(std::max(program.most_slabs(), 1));
}

/// Pages for kTokensPerSeq tokens of each of so many sequences, and for one of the longest.
int64_t default_pages(const Program &program, int64_t num_seqs) {
  const Limits &limits = program.limits;
  const int64_t tokens = std::max<int64_t>(limits.max_context, num_seqs * kTokensPerSeq);
  const int64_t num_longest = (tokens + limits.max_context - 1) / limits.max_context;
  const int64_t whole = (tokens + limits.page_size - 1) / limits.page_size;
  int64_t pages = 0;
  for (const CacheGroup &group : program.groups) {
    const int64_t each = group.most_pages(limits.max_context, limits.max_tokens, limits.page_size);
    pages += group.kind == CacheGroup::Kind::full ? whole : std::max(num_seqs, num_longest) * each;
  }
  return pages;
}

/// The host's memory, of which each rank has its part, and half is left to others. `offloaded`: what a second tier takes of it.
MemoryRoom room_here(const Program &program, const ExecutorOptions &options, const Mesh &mesh, uint64_t offloaded) {
  const int32_t num_here = options.ranks.num_here == 0 ? mesh.num_ranks() : options.ranks.num_here;
  const uint64_t free = available_memory() / static_cast<uint64_t>(num_here), fixed = program.arena_bytes + offloaded;
  const std::string second = offloaded > 0 ? ", evicted pages " + human_bytes(offloaded) : "";
  return {free, fixed, free / 2 - std::min(free / 2, fixed),
          "the arena takes " + human_bytes(program.arena_bytes) + second, ""};
}

TierOptions choose_tier(const Program &program, const ExecutorOptions &options, const Mesh &mesh) {
  const uint64_t page_bytes = bytes_of_page(program);
  const int64_t slots = options.offload_bytes / static_cast<int64_t>(page_bytes);
  if (options.offload_bytes == 0) return {};
  if (slots == 0) {
    fail(TS_BAD_REQUEST, "offload_bytes is ", options.offload_bytes, ", but one page of ", program.limits.page_size,
         " tokens takes ", page_bytes);
  }
  if (options.offload_folder.size() >= RankLayout{}.offload_folder.size()) {
    fail(TS_BAD_REQUEST, "offload_folder has ", options.offload_folder.size(), " bytes, wanted at most ",
         RankLayout{}.offload_folder.size() - 1);
  }
  const Limits &limits = program.limits;
  TierOptions tier;
  tier.num_slots = static_cast<int32_t>(
      std::min<int64_t>(slots, std::numeric_limits<int32_t>::max() / std::max(mesh.num_owners(), 1)));
  const auto num_groups = static_cast<int32_t>(program.groups.size());
  tier.max_loads = static_cast<int32_t>(
      std::clamp<uint64_t>(kRestoredPerStep / page_bytes, static_cast<uint64_t>(num_groups), 1024));
  // As many pages as a step may take, in each group: of its tokens, of each sequence one begun, and one of its draft.
  tier.max_stores = tier.max_loads + num_groups * (limits.max_tokens / limits.page_size + 2 * limits.max_seqs);
  return tier;
}

}  // namespace

int32_t choose_pages(const Program &program, const ExecutorOptions &options, const Mesh &mesh, const MemoryRoom &room) {
  const int32_t num_here = options.ranks.num_here == 0 ? mesh.num_ranks() : options.ranks.num_here;
  const int32_t num_owners = mesh.num_owners();
  const Limits &limits = program.limits;
  const uint64_t page_bytes = bytes_of_page(program);
  const int64_t most = std::numeric_limits<int32_t>::max() / limits.page_size / num_owners;  // a slot is an int32
  int64_t pages = options.num_pages;
  if (pages < 0 || pages > most) {
    fail(TS_BAD_REQUEST, "num_pages is ", pages, ", wanted 0 (from kv_bytes) to ", most);
  }
  if (options.kv_bytes < 0) fail(TS_BAD_REQUEST, "kv_bytes is ", options.kv_bytes, ", wanted 0 or more");
  if (options.max_seqs < 0) fail(TS_BAD_REQUEST, "max_seqs is ", options.max_seqs, ", wanted 0 or more");
  if (pages == 0 && options.kv_bytes > 0) {
    pages = std::min<int64_t>(most, static_cast<int64_t>(static_cast<uint64_t>(options.kv_bytes) / page_bytes));
    if (pages == 0) {
      fail(TS_BAD_REQUEST, "kv_bytes is ", options.kv_bytes, ", but one page of ", limits.page_size, " tokens takes ",
           page_bytes);
    }
  }
  if (pages == 0) {
    const int64_t seqs = options.max_seqs != 0 ? std::min(options.max_seqs, limits.max_seqs) : limits.max_seqs;
    const int64_t mine = (seqs + num_owners - 1) / num_owners;  // of the sequences that ranks share out
    pages = std::min({default_pages(program, mine), most,
                      static_cast<int64_t>(std::min<uint64_t>(room.for_cache / page_bytes, most))});
    pages = std::max<int64_t>(pages, 1);
  }
  const auto kv_bytes = static_cast<uint64_t>(pages) * page_bytes;
  if (room.fixed > room.free || kv_bytes > room.free - room.fixed) {
    const bool one_fits = room.fixed <= room.free && page_bytes <= room.free - room.fixed;
    fail(TS_NO_MEMORY, "not enough memory", room.where, ": ", room.what_is_fixed, " and the KV cache ",
         human_bytes(kv_bytes), " (", pages, pages == 1 ? " page of " : " pages of ", limits.page_size, " tokens, ",
         human_bytes(page_bytes), " a page), but ", human_bytes(room.free), " is free",
         num_here > 1 ? " for each rank" : "",
         one_fits ? ": ask for fewer pages"
                  : ": not even one page fits; end what else uses this memory, or build the plan for more ranks");
  }
  return static_cast<int32_t>(pages);
}

CacheSizes choose_cache_sizes(const Program &program, const ExecutorOptions &options, const Mesh &mesh) {
  CacheSizes sizes;
  sizes.tier = choose_tier(program, options, mesh);
  sizes.offload_folder = options.offload_folder;
  const bool in_memory = options.offload_folder.empty();
  const uint64_t offloaded = in_memory ? static_cast<uint64_t>(sizes.tier.num_slots) * bytes_of_page(program) : 0;
  sizes.num_pages = choose_pages(program, options, mesh, room_here(program, options, mesh, offloaded));
  return sizes;
}

}  // namespace ts
