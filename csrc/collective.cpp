#include "collective.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace ts {
namespace {

constexpr int64_t kGrain = 16;        // elements: threads part a value at lines of 64 bytes
constexpr int64_t kBlock = 1024;      // elements reduced at a time, so that their sums stay in the first cache
constexpr int64_t kTwoSteps = 32768;  // elements from which an all_reduce of more than two ranks goes in two steps

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

/// The share [first, second) of `count` elements that part `index` of `parts` has.
std::pair<int64_t, int64_t> share_of(int64_t count, int64_t index, int64_t parts) {
  const int64_t grains = (count + kGrain - 1) / kGrain;
  return {std::min(count, grains * index / parts * kGrain), std::min(count, grains * (index + 1) / parts * kGrain)};
}

/// The largest share, and so what a part's results take.
int64_t largest_share(int64_t count, int64_t parts) { return (count / kGrain / parts + 2) * kGrain; }

/// Calls body(row, begin, count) for each piece of [first, last) that lies within one row of `run` elements.
template <class Body>
void for_rows(std::pair<int64_t, int64_t> range, int64_t run, const Body &body) {
  for (int64_t at = range.first; at < range.second;) {
    const int64_t row = at / run, begin = at % run;
    const int64_t count = std::min(run - begin, range.second - at);
    body(row, begin, count);
    at += count;
  }
}

void add(float *__restrict sum, const float *__restrict x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += x[i];
}

/// As torch: a NaN stays.
void take_max(float *__restrict most, const float *__restrict x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) most[i] = x[i] > most[i] || std::isnan(x[i]) ? x[i] : most[i];
}

}  // namespace

BoundCollective::BoundCollective(const Collective &what, const Mesh &mesh, int32_t rank, RankGroup *group, int32_t half,
                                 const void *in, void *out)
    : what_(what),
      group_(group),
      half_(half),
      coordinate_(static_cast<size_t>(mesh.coordinate(rank, what.axis))),
      in_(static_cast<const uint8_t *>(in)),
      out_(static_cast<uint8_t *>(out)) {
  for (int32_t q = 0; q < what.num_ranks; ++q) peers_.push_back(mesh.peer(rank, what.axis, q));
}

uint64_t BoundCollective::staging_bytes(const Collective &what, const Limits &limits) {
  if (what.num_ranks == 1 || what.kind == Collective::Kind::slice) return 0;
  const int64_t elements = what.outer(limits.max_tokens, limits.max_seqs) * what.in_run();
  const int64_t results = what.kind == Collective::Kind::all_reduce ? largest_share(elements, what.num_ranks) : 0;
  return static_cast<uint64_t>((round_up(elements, kGrain) + results) * what.element_bytes);
}

const uint8_t *BoundCollective::part_of(size_t peer) const {
  return peer == coordinate_ ? in_ : group_->staging(peers_[peer], half_);
}

bool BoundCollective::run(int64_t num_tokens, int64_t num_logits, int thread, int num_threads) const {
  const int64_t outer = what_.outer(num_tokens, num_logits);
  const bool alone = what_.num_ranks == 1;
  // Staged even where there are no rows: barriers keep the halves apart.
  switch (what_.kind) {
    case Collective::Kind::all_reduce:
      if (what_.num_ranks > 2 && outer * what_.run >= kTwoSteps) {
        return all_reduce_in_two(outer * what_.run, thread, num_threads);
      }
      [[fallthrough]];
    case Collective::Kind::reduce_scatter:
      if (!alone && !stage(outer * what_.in_run(), thread, num_threads)) return false;
      reduce(outer, thread, num_threads);
      return true;
    case Collective::Kind::all_gather:
      if (!alone && !stage(outer * what_.run, thread, num_threads)) return false;
      gather(outer, thread, num_threads);
      return true;
    case Collective::Kind::slice:
      slice(outer, thread, num_threads);
      return true;
  }
  return true;
}

bool BoundCollective::stage(int64_t elements, int thread, int num_threads) const {
  const auto [begin, end] = share_of(elements, thread, num_threads);
  const auto at = static_cast<size_t>(begin * what_.element_bytes);
  std::memcpy(group_->staging(group_->rank(), half_) + at, in_ + at,
              static_cast<size_t>((end - begin) * what_.element_bytes));
  const auto staged = static_cast<uint64_t>(elements * what_.element_bytes);
  return group_->exchange(half_, peers_, [staged](size_t, size_t) { return StagedPart{0, staged}; });
}

/// out[0, count) = the reduction of elements from.. of every rank's part.
void BoundCollective::reduce_range(float *out, int64_t from, int64_t count) const {
  for (int64_t done = 0; done < count; done += kBlock) {
    const int64_t size = std::min(kBlock, count - done);
    for (size_t q = 0; q < peers_.size(); ++q) {
      const float *x = reinterpret_cast<const float *>(part_of(q)) + from + done;
      if (q == 0) {
        std::memcpy(out + done, x, static_cast<size_t>(size) * sizeof(float));
      } else if (what_.reduce == Collective::Reduce::sum) {
        add(out + done, x, size);
      } else {
        take_max(out + done, x, size);
      }
    }
  }
}

/// all_reduce and reduce_scatter: this rank's part of each row, which for all_reduce is the row.
void BoundCollective::reduce(int64_t outer, int thread, int num_threads) const {
  auto *out = reinterpret_cast<float *>(out_);
  const int64_t in_run = what_.in_run();
  const int64_t mine = in_run == what_.run ? 0 : static_cast<int64_t>(coordinate_) * what_.run;
  for_rows(share_of(outer * what_.run, thread, num_threads), what_.run, [&](int64_t o, int64_t e, int64_t count) {
    reduce_range(out + o * what_.run + e, o * in_run + mine + e, count);
  });
}

bool BoundCollective::all_reduce_in_two(int64_t elements, int thread, int num_threads) const {
  if (!stage(elements, thread, num_threads)) return false;
  const auto num_ranks = static_cast<int64_t>(peers_.size());
  const auto results_of = [&](size_t q) {  // after the staged part
    return reinterpret_cast<float *>(group_->staging(peers_[q], half_)) + round_up(elements, kGrain);
  };
  const auto mine = share_of(elements, static_cast<int64_t>(coordinate_), num_ranks);
  const auto [begin, end] = share_of(mine.second - mine.first, thread, num_threads);
  reduce_range(results_of(coordinate_) + begin, mine.first + begin, end - begin);
  if (!group_->barrier()) return false;
  auto *out = reinterpret_cast<float *>(out_);
  const auto range = share_of(elements, thread, num_threads);
  for (size_t q = 0; q < peers_.size(); ++q) {
    const auto part = share_of(elements, static_cast<int64_t>(q), num_ranks);
    const int64_t from = std::max(range.first, part.first), to = std::min(range.second, part.second);
    if (from >= to) continue;
    std::memcpy(out + from, results_of(q) + (from - part.first), static_cast<size_t>(to - from) * sizeof(float));
  }
  return true;
}

void BoundCollective::gather(int64_t outer, int thread, int num_threads) const {
  const int64_t size = what_.element_bytes;
  const auto num_ranks = static_cast<int64_t>(peers_.size());
  const auto range = share_of(outer * what_.run, thread, num_threads);
  for (int64_t q = 0; q < num_ranks; ++q) {
    const uint8_t *part = part_of(static_cast<size_t>(q));
    for_rows(range, what_.run, [&](int64_t o, int64_t e, int64_t count) {
      std::memcpy(out_ + ((o * num_ranks + q) * what_.run + e) * size, part + (o * what_.run + e) * size,
                  static_cast<size_t>(count * size));
    });
  }
}

void BoundCollective::slice(int64_t outer, int thread, int num_threads) const {
  const int64_t size = what_.element_bytes;
  const auto mine = static_cast<int64_t>(coordinate_);
  for_rows(share_of(outer * what_.run, thread, num_threads), what_.run, [&](int64_t o, int64_t e, int64_t count) {
    std::memcpy(out_ + (o * what_.run + e) * size, in_ + ((o * what_.num_ranks + mine) * what_.run + e) * size,
                static_cast<size_t>(count * size));
  });
}

}  // namespace ts
