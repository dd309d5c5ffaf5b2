#include "ranks.h"

#include <algorithm>

#include "batch.h"
#include "collective.h"
#include "meeting_place.h"
#include "mpi.h"
#include "mpi_group.h"
#include "rendezvous.h"
#include "shared_group.h"
#include "text.h"

namespace ts {
namespace {

constexpr int32_t kTimeout_ms = 60'000;

/// What rank 0 knows before it has met anyone.
RankLayout layout_of(const Program &program, const Mesh &mesh, const CacheSizes &sizes) {
  const Limits &limits = program.limits;
  RankLayout layout;
  layout.num_pages = sizes.num_pages;
  layout.tier = sizes.tier;
  std::ranges::copy(sizes.offload_folder, layout.offload_folder.begin());
  layout.page_size = limits.page_size;
  layout.num_groups = static_cast<int32_t>(program.groups.size());
  layout.batch_ints =
      BatchArrays::num_ints(limits.max_tokens, limits.max_seqs,
                            page_table_width(program.groups, limits.max_context, limits.page_size), layout.num_groups) +
      ints_of(sizes.tier.max_copies());
  layout.staging_bytes = static_cast<uint64_t>(sizes.tier.max_copies());  // each rank tells what became of each
  for (const Bucket &bucket : program.buckets) {
    for (const Launch &launch : bucket.launches) {
      if (!launch.collective) continue;
      layout.staging_bytes =
          std::max(layout.staging_bytes, BoundCollective::staging_bytes(*launch.collective, bucket.limits, mesh));
    }
  }
  return layout;
}

/// All on this host: memory that they share.
std::shared_ptr<RankGroup> meet_here(RendezvousOptions options, const std::string &name, const RankHello &hello,
                                     const RankLayout &layout) {
  LocalPlace place(name);
  options.place = &place;
  Company company = options.rank == 0 ? lead(options, hello, layout) : join(options, hello);
  return std::make_shared<SharedGroup>(std::move(company.memory), company.layout, options.rank,
                                       std::move(company.sockets));
}

/// On several hosts: MPI, through which all learn where rank 0 listens, and sockets that tell who dies.
std::shared_ptr<RankGroup> meet_between_hosts(RendezvousOptions options, const std::string &library,
                                              const RankHello &hello, const RankLayout &layout) {
  auto place = options.rank == 0 ? TcpPlace(options.num_ranks) : TcpPlace();
  auto mpi = std::make_shared<Mpi>(library, options.rank, options.num_ranks, place.word(), options.timeout_ms);
  options.place = &place;
  options.share_memory = false;
  Company company = options.rank == 0 ? lead(options, hello, layout) : join(options, hello);
  return std::make_shared<MpiGroup>(std::move(mpi), company.layout, options.rank, std::move(company.sockets));
}

}  // namespace

Ranks meet_ranks(const Plan &plan, const Program &program, const RankOptions &options, int32_t num_threads,
                 const CacheSizes &sizes) {
  const int32_t num_ranks = plan.mesh().num_ranks();
  const bool here = options.num_here == 0 || options.num_here >= num_ranks;
  if (here && options.rendezvous.empty()) {
    fail(TS_BAD_REQUEST, "the plan is for ", num_ranks, " ranks (", plan.mesh().text(),
         "): start a process for each, with one rendezvous name");
  }
  const int32_t timeout_ms = options.timeout_ms == 0 ? kTimeout_ms : options.timeout_ms;
  RendezvousOptions rendezvous;
  rendezvous.rank = options.rank;
  rendezvous.num_ranks = num_ranks;
  rendezvous.timeout_ms = timeout_ms;
  rendezvous.children = options.children;
  const RankHello hello = make_hello(plan.seal(), program.target, num_threads);
  const RankLayout layout = layout_of(program, plan.mesh(), sizes);
  Ranks ranks;
  ranks.group = here ? meet_here(rendezvous, options.rendezvous, hello, layout)
                     : meet_between_hosts(rendezvous, options.mpi_library, hello, layout);
  ranks.watch = std::make_unique<RankWatch>(ranks.group, timeout_ms);
  return ranks;
}

}  // namespace ts
