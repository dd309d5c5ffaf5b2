#include "collective.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

namespace ts {
namespace {

constexpr int64_t kGrain = 16;        // elements: threads part a value at lines of 64 bytes
constexpr int64_t kBlock = 1024;      // elements reduced at a time, so that their sums stay in the first cache
constexpr int64_t kTwoSteps = 32768;  // elements from which an all_reduce of more than two ranks goes in two steps

constexpr size_t kSender = 0, kReceiver = 1;  // of the two that a send has

StagedPart no_parts(size_t, size_t) { return {}; }

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

/// The share [first, second) of `count` elements that part `index` of `parts` has.
std::pair<int64_t, int64_t> share_of(int64_t count, int64_t index, int64_t parts) {
  const int64_t grains = (count + kGrain - 1) / kGrain;
  return {std::min(count, grains * index / parts * kGrain), std::min(count, grains * (index + 1) / parts * kGrain)};
}

/// The rows [first, second) of `count` that a thread copies.
std::pair<int64_t, int64_t> rows_of_thread(int64_t count, int thread, int num_threads) {
  return {count * thread / num_threads, count * (thread + 1) / num_threads};
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

template <class T>
void add(T *__restrict sum, const T *__restrict x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += x[i];
}

/// As torch: a NaN stays.
void take_max(float *__restrict most, const float *__restrict x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) most[i] = x[i] > most[i] || std::isnan(x[i]) ? x[i] : most[i];
}

}  // namespace

BoundCollective::BoundCollective(const Collective &what, const Mesh &mesh, int32_t rank, RankGroup *group, int32_t half,
                                 const void *in, void *out, const void *counts, bool is_here)
    : what_(what),
      group_(group),
      half_(half),
      coordinate_(static_cast<size_t>(mesh.coordinate(rank, what.axis))),
      in_(static_cast<const uint8_t *>(in)),
      out_(static_cast<uint8_t *>(out)),
      counts_(static_cast<const int32_t *>(counts)) {
  if (what.kind == Collective::Kind::send) {
    const auto mine = static_cast<int32_t>(coordinate_);
    coordinate_ = mine == what.src ? kSender : kReceiver;
    if (mine != what.src && mine != what.dst) return;
    peers_ = {mesh.peer(rank, what.axis, what.src), mesh.peer(rank, what.axis, what.dst)};
  } else if (is_here) {
    for (int32_t q = 0; q < what.num_ranks; ++q) peers_.push_back(mesh.peer(rank, what.axis, q));
  }
}

uint64_t BoundCollective::staging_bytes(const Collective &what, const Limits &limits, const Mesh &mesh) {
  if (!what.exchanges()) return 0;
  if (what.kind == Collective::Kind::ragged_all_to_all) {
    return static_cast<uint64_t>(round_up(what.most_taken(limits, mesh), kGrain) * what.element_bytes);
  }
  const int64_t elements =
      what.most_outer(limits, mesh) * what.in_run(what.most_tokens(limits, mesh), limits.max_tokens);
  const int64_t results = what.kind == Collective::Kind::all_reduce ? largest_share(elements, what.num_ranks) : 0;
  return static_cast<uint64_t>((round_up(elements, kGrain) + results) * what.element_bytes);
}

const uint8_t *BoundCollective::part_of(size_t peer) const {
  return peer == coordinate_ ? in_ : group_->staging(peers_[peer], half_);
}

BoundCollective::Parts BoundCollective::parts(const TokenParts &tokens, int64_t unit) const {
  return {what_.tokens ? &tokens : nullptr, what_.axis, unit, what_.num_ranks};
}

BoundCollective::Extent BoundCollective::extent(const TokenParts &tokens) const {
  const ts_batch &whole = tokens.of(TokenParts::kWhole);
  // Every rank must take as many steps, whatever its part of the tokens.
  const int64_t most = what_.outer(whole.num_tokens, whole.num_logits) * what_.run;
  const bool large = most >= kTwoSteps && !what_.integers;
  return {whole.num_tokens, what_.outer(tokens.of(what_.rows_axis).num_tokens, whole.num_logits),
          what_.kind == Collective::Kind::all_reduce && what_.num_ranks > 2 && large};
}

/// Elements that rank q of the axis stages, of any but rows of routes. Even where there are no rows: barriers keep the halves apart.
int64_t BoundCollective::elements(const Extent &step, const TokenParts &tokens, size_t q) const {
  if (what_.kind == Collective::Kind::send && q != kSender) return 0;
  return step.outer * what_.in_run(parts(tokens, 1).size(q), step.all);
}

/// use(what each rank reads of each one's staging area), and what it gives.
template <class Use>
auto BoundCollective::with_staged(const Extent &step, const TokenParts &tokens, const Use &use) const {
  const auto to_rank = [&](size_t from, size_t to) {
    const int64_t bytes = what_.run * what_.element_bytes;
    return StagedPart{static_cast<uint64_t>(first_row(from, to) * bytes),
                      static_cast<uint64_t>(rows_between(from, to) * bytes)};
  };
  const auto in_shares = [&](size_t, size_t to) { return share_of_rank(step, to, 0); };
  const auto whole = [&](size_t from, size_t) {
    return StagedPart{0, static_cast<uint64_t>(elements(step, tokens, from) * what_.element_bytes)};
  };
  if (peers_.empty()) return use(no_parts);
  if (what_.kind == Collective::Kind::ragged_all_to_all) return use(std::ref(to_rank));
  if (step.in_two) return use(std::ref(in_shares));
  return use(std::ref(whole));
}

bool BoundCollective::run(const TokenParts &tokens, int thread, int num_threads) const {
  const Extent step = extent(tokens);
  if (what_.exchanges()) {
    put(step, tokens, thread, num_threads);
    const auto exchange = [this](const StagedParts &staged) { return group_->exchange(half_, peers_, staged); };
    if (!with_staged(step, tokens, exchange)) return false;
  }
  return take(step, tokens, thread, num_threads);
}

uint32_t BoundCollective::start(const TokenParts &tokens, int thread, int num_threads) const {
  const Extent step = extent(tokens);
  put(step, tokens, thread, num_threads);
  return with_staged(step, tokens,
                     [this](const StagedParts &staged) { return group_->start_exchange(half_, peers_, staged); });
}

bool BoundCollective::finish(uint32_t started, const TokenParts &tokens, int thread, int num_threads) const {
  return group_->finish_exchange(started) && take(extent(tokens), tokens, thread, num_threads);
}

void BoundCollective::put(const Extent &step, const TokenParts &tokens, int thread, int num_threads) const {
  if (peers_.empty()) return;
  if (what_.kind != Collective::Kind::ragged_all_to_all) {
    put_range(elements(step, tokens, coordinate_), thread, num_threads);
  } else if (what_.to_experts) {
    put_range(first_row(coordinate_, peers_.size()) * what_.run, thread, num_threads);
  } else {
    put_rows(thread, num_threads);
  }
}

/// When all have staged.
bool BoundCollective::take(const Extent &step, const TokenParts &tokens, int thread, int num_threads) const {
  if (peers_.empty()) return !step.in_two || group_->exchange(half_, {}, no_parts);
  if (step.in_two) return reduce_in_two(step, thread, num_threads);
  const Parts runs = parts(tokens, what_.run);
  switch (what_.kind) {
    case Collective::Kind::all_reduce:
      reduce(step.outer, what_.run, 0, what_.run, thread, num_threads);
      break;
    case Collective::Kind::reduce_scatter:
      reduce(step.outer, runs.whole(), runs.begin(coordinate_), runs.size(coordinate_), thread, num_threads);
      break;
    case Collective::Kind::all_gather:
      gather(step.outer, runs, thread, num_threads);
      break;
    case Collective::Kind::all_to_all:
      exchange(step.outer, parts(tokens, what_.part), thread, num_threads);
      break;
    case Collective::Kind::slice:
      slice(step.outer, runs, thread, num_threads);
      break;
    case Collective::Kind::send:
      if (coordinate_ == kReceiver) receive(step.outer * what_.run, thread, num_threads);
      break;
    case Collective::Kind::ragged_all_to_all:
      what_.to_experts ? take_by_expert(thread, num_threads) : take_by_token(thread, num_threads);
      break;
  }
  return true;
}

void BoundCollective::receive(int64_t elements, int thread, int num_threads) const {
  const auto [begin, end] = share_of(elements, thread, num_threads);
  const auto at = static_cast<size_t>(begin * what_.element_bytes);
  std::memcpy(out_ + at, part_of(kSender) + at, static_cast<size_t>((end - begin) * what_.element_bytes));
}

/// A thread's part of the first elements of the input, into staging.
void BoundCollective::put_range(int64_t elements, int thread, int num_threads) const {
  const auto [begin, end] = share_of(elements, thread, num_threads);
  if (begin == end) return;  // a value without elements may have no address
  const auto at = static_cast<size_t>(begin * what_.element_bytes);
  std::memcpy(group_->staging(group_->rank(), half_) + at, in_ + at,
              static_cast<size_t>((end - begin) * what_.element_bytes));
}

/// out[0, count) = the reduction of elements from.. of every rank's part.
template <class T>
void BoundCollective::reduce_range(T *out, int64_t from, int64_t count) const {
  for (int64_t done = 0; done < count; done += kBlock) {
    const int64_t size = std::min(kBlock, count - done);
    for (size_t q = 0; q < peers_.size(); ++q) {
      const T *x = reinterpret_cast<const T *>(part_of(q)) + from + done;
      if (q == 0) {
        std::memcpy(out + done, x, static_cast<size_t>(size) * sizeof(T));
      } else if (what_.reduce == Collective::Reduce::sum) {
        add(out + done, x, size);
      } else if constexpr (std::is_same_v<T, float>) {
        take_max(out + done, x, size);
      }
    }
  }
}

/// all_reduce and reduce_scatter: `size` elements from `begin` on of each row, which for all_reduce are the row.
void BoundCollective::reduce(int64_t outer, int64_t row, int64_t begin, int64_t size, int thread,
                             int num_threads) const {
  for_rows(share_of(outer * size, thread, num_threads), size, [&](int64_t o, int64_t e, int64_t count) {
    const int64_t at = o * size + e, from = o * row + begin + e;
    what_.integers ? reduce_range(reinterpret_cast<int32_t *>(out_) + at, from, count)
                   : reduce_range(reinterpret_cast<float *>(out_) + at, from, count);
  });
}

/// Of an all_reduce in two steps, what one rank reduces: in an area, elements from `from` on are the value's.
StagedPart BoundCollective::share_of_rank(const Extent &step, size_t owner, int64_t from) const {
  const auto [begin, end] =
      share_of(step.outer * what_.run, static_cast<int64_t>(owner), static_cast<int64_t>(peers_.size()));
  return {static_cast<uint64_t>(from == 0 ? begin : from) * sizeof(float),
          static_cast<uint64_t>(end - begin) * sizeof(float)};
}

/// A rank reads of all inputs what it reduces, and then of all results what others have reduced.
bool BoundCollective::reduce_in_two(const Extent &step, int thread, int num_threads) const {
  const auto num_ranks = static_cast<int64_t>(peers_.size());
  const int64_t elements = step.outer * what_.run;
  const auto results = [&](size_t from, size_t) { return share_of_rank(step, from, round_up(elements, kGrain)); };
  const auto results_of = [&](size_t q) {  // after the staged part
    return reinterpret_cast<float *>(group_->staging(peers_[q], half_)) + round_up(elements, kGrain);
  };
  const auto mine = share_of(elements, static_cast<int64_t>(coordinate_), num_ranks);
  const auto [begin, end] = share_of(mine.second - mine.first, thread, num_threads);
  reduce_range(results_of(coordinate_) + begin, mine.first + begin, end - begin);
  if (!group_->exchange(half_, peers_, std::ref(results))) return false;
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

void BoundCollective::gather(int64_t outer, const Parts &parts, int thread, int num_threads) const {
  const int64_t bytes = what_.element_bytes, row = parts.whole();
  for (size_t q = 0; q < peers_.size(); ++q) {
    const uint8_t *part = part_of(q);
    const int64_t begin = parts.begin(q), size = parts.size(q);
    for_rows(share_of(outer * size, thread, num_threads), size, [&](int64_t o, int64_t e, int64_t count) {
      std::memcpy(out_ + (o * row + begin + e) * bytes, part + (o * size + e) * bytes,
                  static_cast<size_t>(count * bytes));
    });
  }
}

void BoundCollective::slice(int64_t outer, const Parts &parts, int thread, int num_threads) const {
  const int64_t bytes = what_.element_bytes, row = parts.whole();
  const int64_t begin = parts.begin(coordinate_), size = parts.size(coordinate_);
  for_rows(share_of(outer * size, thread, num_threads), size, [&](int64_t o, int64_t e, int64_t count) {
    std::memcpy(out_ + (o * size + e) * bytes, in_ + (o * row + begin + e) * bytes, static_cast<size_t>(count * bytes));
  });
}

/// all_to_all: whole runs, of the first dim's parts those of each rank if it is gathered, this rank's if it is split.
void BoundCollective::exchange(int64_t outer, const Parts &parts, int thread, int num_threads) const {
  const int64_t bytes = what_.element_bytes, run = what_.run, all = parts.whole();
  const auto num_ranks = static_cast<int64_t>(peers_.size());
  for (size_t q = 0; q < peers_.size(); ++q) {
    const uint8_t *from = part_of(q);
    const size_t owner = what_.gathers_first ? q : coordinate_;  // of the part of the first dim
    const int64_t begin = parts.begin(owner), size = parts.size(owner);
    for_rows(share_of(outer * size * run, thread, num_threads), run, [&](int64_t row, int64_t e, int64_t count) {
      const int64_t whole = row / size * all + begin + row % size;  // the row where the first dim is whole
      const int64_t in = what_.gathers_first ? row * num_ranks + static_cast<int64_t>(coordinate_) : whole;
      const int64_t out = what_.gathers_first ? whole : row * num_ranks + static_cast<int64_t>(q);
      std::memcpy(out_ + (out * run + e) * bytes, from + (in * run + e) * bytes, static_cast<size_t>(count * bytes));
    });
  }
}

// ---- rows of routes: what one rank has for another lies together in its staging area ----------------------------------

void BoundCollective::copy_rows(uint8_t *to, int64_t to_row, const uint8_t *from, int64_t from_row,
                                int64_t count) const {
  const int64_t bytes = what_.run * what_.element_bytes;
  std::memcpy(to + to_row * bytes, from + from_row * bytes, static_cast<size_t>(count * bytes));
}

/// Rows of the experts of a rank, of all tokens.
int64_t BoundCollective::rows_of_experts(size_t owner) const {
  int64_t rows = 0;
  for (size_t q = 0; q < peers_.size(); ++q) {
    rows += what_.rows_for(counts_, static_cast<int64_t>(q), first_expert(owner), first_expert(owner + 1));
  }
  return rows;
}

/// Of the rows of a rank's experts, by expert and then by their tokens' rank, those in the range, piece by piece:
/// body(the tokens' rank, its first row of these, the first row, how many), where a rank's rows are numbered from 0 for these experts.
template <class Body>
void BoundCollective::for_pieces(size_t owner, std::pair<int64_t, int64_t> range, const Body &body) const {
  std::array<int64_t, kMaxRanks> before{};  // of each rank's tokens
  int64_t row = 0;
  for (int64_t e = first_expert(owner); e < first_expert(owner + 1); ++e) {
    for (size_t q = 0; q < peers_.size(); ++q) {
      const int64_t count = counts_[static_cast<int64_t>(q) * what_.experts + e];
      const int64_t first = std::max(row, range.first), last = std::min(row + count, range.second);
      if (first < last) body(q, before[q] + first - row, first, last - first);
      before[q] += count;
      row += count;
    }
  }
}

/// Rows that go from one rank to another.
int64_t BoundCollective::rows_between(size_t from, size_t to) const {
  const auto [of_tokens, of_experts] = what_.to_experts ? std::pair(from, to) : std::pair(to, from);
  return what_.rows_for(counts_, static_cast<int64_t>(of_tokens), first_expert(of_experts),
                        first_expert(of_experts + 1));
}

/// Where they begin in the area of the one that they come from.
int64_t BoundCollective::first_row(size_t from, size_t to) const {
  if (what_.to_experts) return what_.rows_for(counts_, static_cast<int64_t>(from), 0, first_expert(to));
  int64_t rows = 0;
  for (size_t q = 0; q < to; ++q) rows += rows_between(from, q);
  return rows;
}

/// A rank stages its tokens' rows as they lie, by expert, and so by rank; and puts what it reads of all in order.
void BoundCollective::take_by_expert(int thread, int num_threads) const {
  std::array<int64_t, kMaxRanks> begins{};
  for (size_t q = 0; q < peers_.size(); ++q) begins[q] = first_row(q, coordinate_);
  for_pieces(coordinate_, rows_of_thread(rows_of_experts(coordinate_), thread, num_threads),
             [&](size_t q, int64_t from, int64_t row, int64_t count) {
               copy_rows(out_, row, part_of(q), begins[q] + from, count);
             });
}

/// A rank stages its experts' rows by their tokens' rank, and reads of each what it gets as it lies.
void BoundCollective::put_rows(int thread, int num_threads) const {
  uint8_t *const area = group_->staging(group_->rank(), half_);
  std::array<int64_t, kMaxRanks> begins{};
  for (size_t q = 0; q < peers_.size(); ++q) begins[q] = first_row(coordinate_, q);
  for_pieces(
      coordinate_, rows_of_thread(rows_of_experts(coordinate_), thread, num_threads),
      [&](size_t q, int64_t to, int64_t row, int64_t count) { copy_rows(area, begins[q] + to, in_, row, count); });
}

void BoundCollective::take_by_token(int thread, int num_threads) const {
  const int64_t all = what_.rows_for(counts_, static_cast<int64_t>(coordinate_), 0, what_.experts);
  const auto [first, last] = rows_of_thread(all, thread, num_threads);
  if (peers_.size() == 1) {  // nothing was staged
    copy_rows(out_, first, in_, first, last - first);
    return;
  }
  int64_t row = 0;
  for (size_t q = 0; q < peers_.size(); ++q) {
    const int64_t rows = rows_between(q, coordinate_);
    const int64_t begin = std::max(row, first), end = std::min(row + rows, last);
    if (begin < end) {
      copy_rows(out_, begin, group_->staging(peers_[q], half_), first_row(q, coordinate_) + begin - row, end - begin);
    }
    row += rows;
  }
}

}  // namespace ts
