#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace ts {

/// The mesh of ranks that a plan was built for: named axes, slowest first. Rank r's coordinates are the digits of r in the
/// mixed radix of the sizes (tscompile/mesh.py).
struct Mesh {
  struct Axis {
    std::string name;
    int32_t size = 1;
  };
  std::vector<Axis> axes;

  int32_t num_ranks() const;
  int32_t find(std::string_view name) const;             ///< the axis's index; -1 if there is none of that name
  int32_t coordinate(int32_t rank, int32_t axis) const;  ///< where `rank` stands on the axis
  int32_t peer(int32_t rank, int32_t axis,
               int32_t coordinate) const;  ///< who stands at `coordinate` there, else like `rank`
  bool by_sequence(int32_t axis) const;    ///< whether tokens that are sharded over it lie with their sequence
  int32_t num_stages() const;              ///< pipeline stages
  int32_t stage(int32_t rank) const;       ///< which of them `rank` runs
  int32_t num_owners() const;              ///< parts that sequences and their cache are shared out in
  int32_t owner(int32_t rank) const;       ///< which of them `rank` has
  std::string text() const;                ///< "tp=2" or "dp=2,tp=4"

 private:
  int32_t size(std::string_view name) const;                      ///< 1 if there is no such axis
  int32_t coordinate(int32_t rank, std::string_view name) const;  ///< 0 if there is no such axis
  int32_t stride(int32_t axis) const;                             ///< ranks from one coordinate of the axis to the next
};

}  // namespace ts
