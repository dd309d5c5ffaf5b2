#pragma once

#include <cstdint>
#include <string>

#include "mesh.h"
#include "program.h"
#include "tier.h"

namespace ts {

struct ExecutorOptions;

/// The memory that a program runs in, of the host or of a GPU.
struct MemoryRoom {
  uint64_t free = 0;          ///< bytes
  uint64_t fixed = 0;         ///< bytes that all but the KV cache takes
  uint64_t for_cache = 0;     ///< bytes that the KV cache takes at most, if nobody says how much
  std::string what_is_fixed;  ///< "the arena takes 1.0 MiB"
  std::string where;          ///< " on NVIDIA H200", or nothing
};

/// The number of KV pages, as ts_engine_options says. Throws Error: TS_BAD_REQUEST, or TS_NO_MEMORY, telling the parts, if it does
/// not fit beside what is fixed. Each rank takes as much, from one memory: as much as the one that has the most layers.
int32_t choose_pages(const Program &program, const ExecutorOptions &options, const Mesh &mesh, const MemoryRoom &room);

/// How large the KV cache and its second tier are, in the host's memory: rank 0 decides it for all.
struct CacheSizes {
  int32_t num_pages = 0;  ///< of each rank, as all below
  TierOptions tier;
  std::string offload_folder;  ///< where the second tier lies; empty: in memory
};

/// As ts_engine_options says. Throws as choose_pages does.
CacheSizes choose_cache_sizes(const Program &program, const ExecutorOptions &options, const Mesh &mesh);

}  // namespace ts
