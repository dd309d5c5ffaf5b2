#include "mesh.h"

namespace ts {
namespace {

constexpr const char *kBySequence = "dp";  // AXES in tscompile/mesh.py
constexpr const char *kByStage = "pp";

}  // namespace

int32_t Mesh::num_ranks() const {
  int32_t ranks = 1;
  for (const Axis &axis : axes) ranks *= axis.size;
  return ranks;
}

int32_t Mesh::find(std::string_view name) const {
  for (size_t i = 0; i < axes.size(); ++i) {
    if (axes[i].name == name) return static_cast<int32_t>(i);
  }
  return -1;
}

int32_t Mesh::stride(int32_t axis) const {
  int32_t ranks = 1;
  for (size_t i = static_cast<size_t>(axis) + 1; i < axes.size(); ++i) ranks *= axes[i].size;
  return ranks;
}

int32_t Mesh::coordinate(int32_t rank, int32_t axis) const {
  return rank / stride(axis) % axes[static_cast<size_t>(axis)].size;
}

int32_t Mesh::peer(int32_t rank, int32_t axis, int32_t coordinate) const {
  return rank + (coordinate - this->coordinate(rank, axis)) * stride(axis);
}

bool Mesh::by_sequence(int32_t axis) const { return axis == find(kBySequence); }

int32_t Mesh::size(std::string_view name) const {
  const int32_t axis = find(name);
  return axis < 0 ? 1 : axes[static_cast<size_t>(axis)].size;
}

int32_t Mesh::coordinate(int32_t rank, std::string_view name) const {
  const int32_t axis = find(name);
  return axis < 0 ? 0 : coordinate(rank, axis);
}

int32_t Mesh::num_stages() const { return size(kByStage); }
int32_t Mesh::stage(int32_t rank) const { return coordinate(rank, kByStage); }
int32_t Mesh::num_owners() const { return size(kBySequence); }
int32_t Mesh::owner(int32_t rank) const { return coordinate(rank, kBySequence); }

std::string Mesh::text() const {
  std::string text;
  for (const Axis &axis : axes) {
    text += (text.empty() ? "" : ",") + axis.name + "=" + std::to_string(axis.size);
  }
  return text;
}

}  // namespace ts
