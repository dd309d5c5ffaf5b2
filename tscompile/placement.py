"""Placements: how a value lies over the ranks of one mesh axis."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Replicate:
    """Every rank holds the whole value."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Shard:
    """Rank i of n holds the i-th of n equal parts along `dim`. owner: of rows that are routed alone, whose
    they are: "" for those of the rank's experts, "T" for those of its tokens."""

    dim: int
    owner: str = ""

    def __str__(self) -> str:
        return f"S({self.dim},{self.owner})" if self.owner else f"S({self.dim})"


@dataclass(frozen=True)
class Partial:
    """Every rank holds a term of the whole shape; the value is their sum (or max)."""

    op: str = "sum"

    def __str__(self) -> str:
        return f"P({self.op})"


@dataclass(frozen=True)
class Owned:
    """Of a KV cache alone: a rank has tokens of its own: those of its sequences, or of its positions."""

    def __str__(self) -> str:
        return "O"


@dataclass(frozen=True)
class Stage:
    """On an axis of pipeline stages: rank `index` of it has the value, whole; the others have nothing."""

    index: int

    def __str__(self) -> str:
        return f"stage({self.index})"


Placement: TypeAlias = Replicate | Shard | Partial | Owned | Stage
Placements: TypeAlias = tuple[Placement, ...]  # one an axis of the mesh, in the mesh's order

_TEXT = re.compile(r"R|O|S\((\d+)(?:,(T))?\)|P\((sum|max)\)|stage\((\d+)\)")


def parse_placement(text: str) -> Placement:
    """The inverse of str(). ValueError if `text` is none of R, S(dim), S(dim,T), P(sum), P(max), O,
    stage(index)."""
    match = _TEXT.fullmatch(text)
    if match is None:
        known = "R, S(dim), S(dim,T), P(sum), P(max), O, stage(index)"
        raise ValueError(f"{text!r} is not a placement; known are {known}")
    if match[1] is not None:
        return Shard(int(match[1]), match[2] or "")
    if match[3] is not None:
        return Partial(match[3])
    if match[4] is not None:
        return Stage(int(match[4]))
    return Owned() if text == "O" else Replicate()
