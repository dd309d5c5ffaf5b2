#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "check.h"
#include "huge_vector.h"
#include "page_hash.h"

namespace ts {

/// Which of `size` places has a hash, each at most one, no two the same: chains in place, O(1) expected.
class HashIndex {
 public:
  static constexpr int32_t kNone = -1;

  explicit HashIndex(int32_t size)
      : places_(static_cast<size_t>(size)), buckets_(std::bit_ceil(static_cast<size_t>(size)), kNone) {}

  bool holds(int32_t place) const { return places_[static_cast<size_t>(place)].held; }
  const PageHash &hash(int32_t place) const { return places_[static_cast<size_t>(place)].hash; }

  int32_t find(const PageHash &hash) const {
    int32_t place = buckets_[bucket(hash)];
    while (place != kNone && places_[static_cast<size_t>(place)].hash != hash)
      place = places_[static_cast<size_t>(place)].next;
    return place;
  }

  void insert(int32_t place, const PageHash &hash) {
    TS_ASSERT(!holds(place), "a page has one hash");
    places_[static_cast<size_t>(place)] = {hash, std::exchange(buckets_[bucket(hash)], place), true};
  }

  void erase(int32_t place) {
    TS_ASSERT(holds(place), "only an indexed page can leave the index");
    int32_t *link = &buckets_[bucket(hash(place))];
    while (*link != place) {
      TS_ASSERT(*link != kNone, "an indexed page is missing from its chain");
      link = &places_[static_cast<size_t>(*link)].next;
    }
    *link = places_[static_cast<size_t>(place)].next;
    places_[static_cast<size_t>(place)] = {};
  }

  /// What find(hash) will read first, and then: the place that it probably finds is returned, or kNone.
  void prefetch(const PageHash &hash) const { __builtin_prefetch(&buckets_[bucket(hash)]); }
  int32_t prefetch_place(const PageHash &hash) const {
    const int32_t place = buckets_[bucket(hash)];
    if (place != kNone) __builtin_prefetch(&places_[static_cast<size_t>(place)]);
    return place;
  }

  void check() const {  ///< asserts that every place that holds a hash is in its chain, once
    size_t num_held = 0;
    for (const Place &place : places_) num_held += place.held ? 1 : 0;
    for (size_t b = 0; b < buckets_.size(); ++b) {
      for (int32_t at = buckets_[b]; at != kNone; at = places_[static_cast<size_t>(at)].next) {
        TS_ASSERT(holds(at) && bucket(hash(at)) == b, "a page is in the chain of its hash");
        TS_ASSERT(num_held-- > 0, "no page is in two chains");
      }
    }
    TS_ASSERT(num_held == 0, "every indexed page is in a chain");
  }

 private:
  struct Place {
    PageHash hash;
    int32_t next = kNone;  // in its bucket's chain
    bool held = false;
  };

  size_t bucket(const PageHash &hash) const { return hash.tail & (buckets_.size() - 1); }

  HugeVector<Place> places_;
  HugeVector<int32_t> buckets_;  // first place of each chain; a power of two, at least as many as places
};

}  // namespace ts
