#include "ranks.h"

#include <algorithm>

#include "batch.h"
#include "collective.h"
#include "rendezvous.h"
#include "shared_group.h"
#include "text.h"

namespace ts {
namespace {

constexpr int32_t kTimeout_ms = 60'000;

/// What rank 0 knows of the shared memory before it has met anyone.
RankLayout layout_of(const Program &program, const Mesh &mesh, int32_t num_pages) {
  const Limits &limits = program.limits;
  RankLayout layout;
  layout.num_pages = num_pages;
  layout.batch_ints = BatchArrays::num_ints(limits.max_tokens, limits.max_seqs,
                                            (limits.max_context + limits.page_size - 1) / limits.page_size);
  for (const Launch &launch : program.launches) {
    if (!launch.collective) continue;
    layout.staging_bytes =
        std::max(layout.staging_bytes, BoundCollective::staging_bytes(*launch.collective, limits, mesh));
  }
  return layout;
}

}  // namespace

Ranks meet_ranks(const Plan &plan, const Program &program, const RankOptions &options, int32_t num_threads,
                 int32_t num_pages) {
  const int32_t num_ranks = plan.mesh().num_ranks();
  if (options.rendezvous.empty()) {
    fail(TS_BAD_REQUEST, "the plan is for ", num_ranks, " ranks (", plan.mesh().text(),
         "): start a process for each, with one rendezvous name");
  }
  const int32_t timeout_ms = options.timeout_ms == 0 ? kTimeout_ms : options.timeout_ms;
  const RendezvousOptions rendezvous{options.rank, num_ranks, options.rendezvous, timeout_ms, options.children};
  const RankHello hello = make_hello(plan.seal(), program.target, num_threads);
  Company company =
      options.rank == 0 ? lead(rendezvous, hello, layout_of(program, plan.mesh(), num_pages)) : join(rendezvous, hello);
  Ranks ranks;
  ranks.group = std::make_shared<SharedGroup>(std::move(company.memory), company.layout, options.rank,
                                              std::move(company.sockets));
  ranks.watch = std::make_unique<RankWatch>(ranks.group, timeout_ms);
  return ranks;
}

}  // namespace ts
