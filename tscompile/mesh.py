"""The mesh of ranks: named axes and their sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """Axes in order, slowest first. Rank r's coordinates are the digits of r in the mixed radix of the
    sizes."""

    axes: tuple[tuple[str, int], ...] = (("tp", 1),)

    @property
    def num_ranks(self) -> int:
        return math.prod(size for _, size in self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    def size(self, axis: str) -> int:
        """Ranks along `axis`; KeyError if the mesh has none of that name."""
        return dict(self.axes)[axis]

    def coords(self, rank: int) -> dict[str, int]:
        """Where `rank` stands on each axis."""
        result = {}
        for name, size in reversed(self.axes):
            rank, result[name] = divmod(rank, size)
        return result

    def group(self, rank: int, axis: str) -> list[int]:
        """The ranks that differ from `rank` only along `axis`, in the axis's order."""
        stride = math.prod(size for name, size in self.axes[self.names.index(axis) + 1 :])
        first = rank - self.coords(rank)[axis] * stride
        return [first + i * stride for i in range(self.size(axis))]

    def __str__(self) -> str:
        return "mesh(" + ", ".join(f"{name}={size}" for name, size in self.axes) + ")"
