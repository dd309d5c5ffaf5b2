"""The mesh of ranks: named axes and their sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tscompile.errors import InternalError

# What an axis is for. Every axis but pp may share out weights, heads and experts by the ops' rules; what
# differs is who owns a step's tokens where they are shared out over it.
AXES = {
    "tp": "tensor parallel: tokens in equal parts",
    "ep": "expert parallel: tokens in equal parts",
    "dp": "attention data parallel: tokens, and the KV cache, by sequence",
    "cp": "context parallel: tokens in equal parts, the KV cache by position",
    "pp": "pipeline parallel: ops, with their weights and caches, in consecutive stages",
}


def by_sequence(axis: str) -> bool:
    """Whether tokens that are sharded over `axis` lie with their sequence."""
    return axis == "dp"


def by_position(axis: str) -> bool:
    """Whether a KV cache that is shared out over `axis` lies by position: of each page of ranks * n tokens,
    rank q has the q-th n."""
    return axis == "cp"


def by_stage(axis: str) -> bool:
    """Whether each op runs on one rank of `axis` alone."""
    return axis == "pp"


def token_starts(
    axis: str, ranks: int, num_tokens: int, query_start: Sequence[int], owners: Sequence[int]
) -> list[int]:
    """Who owns which tokens of a step, where they are sharded over `axis`: rank r of it those from result[r]
    up to result[r + 1]. In equal parts: ceil(tokens / ranks) each, the last ones shorter or empty. By
    sequence: query_start has their first tokens, owners their ranks, in order: a step's sequences are sorted
    by the rank whose part of the cache they have their pages in."""
    if not by_sequence(axis):
        part = -(-num_tokens // ranks)
        return [min(rank * part, num_tokens) for rank in range(ranks + 1)]
    if list(owners) != sorted(owners):
        raise InternalError(f"{axis}: the step's sequences lie on ranks {list(owners)}, wanted these sorted")
    firsts = [*query_start[: len(owners)], num_tokens]
    return [firsts[sum(owner < rank for owner in owners)] for rank in range(ranks + 1)]


@dataclass(frozen=True)
class Mesh:
    """Axes in order, slowest first. Rank r's coordinates are the digits of r in the mixed radix of the
    sizes."""

    axes: tuple[tuple[str, int], ...] = (("tp", 1),)

    @property
    def num_ranks(self) -> int:
        return math.prod(size for _, size in self.axes)

    @property
    def num_owners(self) -> int:
        """Ranks that share sequences out between them, along the axis that does."""
        return math.prod(size for name, size in self.axes if by_sequence(name))

    @property
    def num_parts(self) -> int:
        """Ranks that share each sequence's context out between them, along the axis that does."""
        return math.prod(size for name, size in self.axes if by_position(name))

    @property
    def stage_axis(self) -> int:
        """The index of the axis of stages; -1 if there is none of more than one."""
        return next((i for i, (name, size) in enumerate(self.axes) if by_stage(name) and size > 1), -1)

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
