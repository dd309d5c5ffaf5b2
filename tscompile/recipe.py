"""Weight recipes: how a weight of the graph is made from the checkpoint. Data; tscompile/weights.py executes
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint's tensor of this name, as it is."""

    name: str


@dataclass(frozen=True)
class Concat:
    """Parts one after the other along `dim`."""

    parts: tuple[Recipe, ...]
    dim: int = 0


@dataclass(frozen=True)
class Interleave:
    """Parts of one shape, along `dim`: each padded with zeros to a multiple of `tile`, then a tile of each in
    turn."""

    parts: tuple[Recipe, ...]
    tile: int = 16
    dim: int = 0


@dataclass(frozen=True)
class Stack:
    """Parts of one shape along a new first dim: one an expert."""

    parts: tuple[Recipe, ...]


@dataclass(frozen=True)
class Slice:
    """Rows start..stop of `part` along `dim`."""

    part: Recipe
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class View:
    """The elements of `part`, row-major, in another shape, whose dims are then taken in `order`."""

    part: Recipe
    shape: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class ShardOf:
    """This rank's part of `part` along `dim`: the i-th of n equal parts, i the rank's coordinate on mesh axis
    `axis`."""

    part: Recipe
    dim: int
    axis: str


@dataclass(frozen=True)
class Pad:
    """`part` with zeros after it along `dim`, `size` long there."""

    part: Recipe
    dim: int
    size: int


@dataclass(frozen=True)
class Repeat:
    """`part` cut into `parts` equal ones along `dim`, each of them `times` times in place: a b -> a a b b."""

    part: Recipe
    dim: int
    parts: int
    times: int


@dataclass(frozen=True)
class RopeTable:
    """f32 [rows, 2 * len(inv_freq)]: cos then sin of the f32 angles position * inv_freq, times `scaling`.

    `inv_freq` holds f32 values exactly (as Python floats)."""

    rows: int
    inv_freq: tuple[float, ...]
    scaling: float = 1.0


@dataclass(frozen=True)
class Arange:
    """f32 [count]: 0, 1, ... A rank's shard tells which experts, or parts of the context, are its own."""

    count: int


Recipe: TypeAlias = (
    Checkpoint | Concat | Interleave | Stack | Slice | View | ShardOf | Pad | Repeat | RopeTable | Arange
)


@dataclass(frozen=True)
class Origin:
    """A way to make a weight of the checkpoint's tensors, each of `shape`. Capture takes the first whose
    tensors are all there."""

    recipe: Recipe
    shape: tuple[int, ...]


def renamed(recipe: Recipe, name: Callable[[str], str]) -> Recipe:
    """`recipe` with the names of the checkpoint's tensors replaced."""
    match recipe:
        case Checkpoint(old):
            return Checkpoint(name(old))
        case Concat(parts) | Interleave(parts) | Stack(parts):
            return replace(recipe, parts=tuple(renamed(part, name) for part in parts))
        case Slice(part) | View(part) | ShardOf(part) | Pad(part) | Repeat(part):
            return replace(recipe, part=renamed(part, name))
        case RopeTable() | Arange():
            return recipe


def axes_of(recipe: Recipe) -> set[str]:
    """The mesh axes over which `recipe` is sharded: ranks that differ along others get the same weight."""
    match recipe:
        case ShardOf(part, _, axis):
            return {axis} | axes_of(part)
        case Concat(parts) | Interleave(parts) | Stack(parts):
            return set().union(*(axes_of(part) for part in parts))
        case Slice(part) | View(part) | Pad(part) | Repeat(part):
            return axes_of(part)
        case Checkpoint() | RopeTable() | Arange():
            return set()


def checkpoint_names(recipe: Recipe) -> Iterator[str]:
    """Names of the checkpoint's tensors that `recipe` reads, in order."""
    match recipe:
        case Checkpoint(name):
            yield name
        case Concat(parts) | Interleave(parts) | Stack(parts):
            for part in parts:
                yield from checkpoint_names(part)
        case Slice(part) | View(part) | ShardOf(part) | Pad(part) | Repeat(part):
            yield from checkpoint_names(part)
        case RopeTable() | Arange():
            return
