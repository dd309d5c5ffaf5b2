"""pack: each weight's way from the checkpoint's tensors to the plan's bytes.

Takes build.graph (weights with recipes) and build.targets[t].buckets and layouts. Gives build.weights, a
`Packed`: what tscompile/plan.py writes, in the graph's order, and the steps, which the plan keeps as
"tsp/pack". Nothing is computed here: a weight is made when its turn to be written comes, and a sharded one a
shard at a time. Targets share a weight wherever they want the same layout, ranks wherever it is not sharded,
and weights of one recipe, as stages have that read the same, are one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tscompile.build import Build
from tscompile.checkpoint import Checkpoint
from tscompile.errors import InternalError
from tscompile.ir import Weight
from tscompile.layout import STORED, lay_out, stored_bytes, stored_shape
from tscompile.mesh import Mesh
from tscompile.plan import Entry
from tscompile.printer import print_recipe
from tscompile.recipe import Checkpoint as FromCheckpoint
from tscompile.recipe import axes_of, checkpoint_names
from tscompile.rewrite import weights_in_use
from tscompile.weights import evaluate

Coords = dict[str, int]  # axis -> coordinate


@dataclass(frozen=True)
class PackedWeight:
    """One weight of the plan: `weight` in `layout`, an entry, or one a coordinate on the axes that it is
    sharded over. make() and steps() say the same, one by doing it."""

    name: str
    weight: Weight
    layout: str
    checkpoint: Checkpoint
    mesh: Mesh

    def make(self, coords: Coords | None = None) -> Tensor:
        """Reads, cuts, casts (to nearest even), merges, lays out. coords: whose; rank 0's if not given."""
        merged = evaluate(self.weight, self.checkpoint.read, self.mesh, self.mesh.coords(0) | (coords or {}))
        # Quantisation will come here, a step between merging and laying out, and in steps(): what it gives
        # (codes, and scales of their own layout) become entries of their own.
        return lay_out(self.layout, merged)

    def steps(self) -> list[dict[str, Any]]:
        """What make() does, for the plan's report: the same for every shard."""
        weight, recipe = self.weight, self.weight.recipe
        sources = [self.checkpoint.tensors[name] for name in checkpoint_names(recipe)]
        steps: list[dict[str, Any]] = []
        if sources:
            tensors = [{"name": t.name, "dtype": t.dtype, "shape": t.shape} for t in sources]
            steps.append({"step": "read", "tensors": tensors})
        if any(t.dtype != STORED[weight.dtype] for t in sources):
            steps.append({"step": "cast", "to": STORED[weight.dtype], "rounding": "nearest even"})
        if not isinstance(recipe, FromCheckpoint):
            steps.append(
                {
                    "step": "merge" if sources else "compute",
                    "recipe": print_recipe(recipe),
                    "shape": weight.shape,
                }
            )
        return [*steps, {"step": "layout", "layout": self.layout, "shape": self.stored_shape}]

    @property
    def axes(self) -> list[str]:
        """What it is sharded over, in the mesh's order."""
        sharded = axes_of(self.weight.recipe)
        return [axis for axis in self.mesh.names if axis in sharded]

    @property
    def shards(self) -> list[Coords]:
        """The coordinates of each shard, on `axes`; one without any if all ranks read the same."""
        sizes = [range(self.mesh.size(axis)) for axis in self.axes]
        return [dict(zip(self.axes, at, strict=True)) for at in itertools.product(*sizes)]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of one shard."""
        return stored_shape(self.layout, self.weight.dtype, shape_of(self.weight))

    @property
    def num_bytes(self) -> int:
        """Of one shard."""
        return stored_bytes(self.layout, self.weight.dtype, shape_of(self.weight))

    def argument(self) -> dict[str, Any]:
        """A launch's argument that names it."""
        sharded = {"axes": self.axes} if self.axes else {}
        return {"weight": self.name, "bytes": self.num_bytes} | sharded

    def entries(self) -> list[Entry]:
        """An entry a shard, each made when it is written."""
        return [self._entry(coords) for coords in self.shards]

    def _entry(self, coords: Coords) -> Entry:
        def data() -> Iterator[memoryview]:
            yield self.make(coords).reshape(-1).view(torch.uint8).numpy().data

        name = shard_name(self.name, coords)
        return Entry(name, STORED[self.weight.dtype], self.stored_shape, data)


def shard_name(weight: str, coords: Coords) -> str:
    """The entry of a weight's shard: `NAME@ep=0,tp=1`, or `NAME` where nothing is sharded."""
    return weight + ("@" + ",".join(f"{axis}={at}" for axis, at in coords.items()) if coords else "")


@dataclass(frozen=True)
class Packed:
    """weights: by name, in the order they are written. names: (target, weight of the graph) -> the name of
    what it reads."""

    weights: dict[str, PackedWeight]
    names: dict[tuple[str, str], str]

    def find(self, target: str, weight: Weight) -> PackedWeight:
        return self.weights[self.names[target, weight.name]]

    def entries(self) -> list[Entry]:
        return [entry for packed in self.weights.values() for entry in packed.entries()]

    def report(self) -> list[dict[str, Any]]:
        """The plan's "tsp/pack": for each weight the axes it is sharded over, and the steps that made each
        shard."""
        return [
            {"weight": name, "axes": packed.axes, "steps": packed.steps()}
            for name, packed in self.weights.items()
        ]


def run(build: Build) -> None:
    weights: dict[str, PackedWeight] = {}
    names: dict[tuple[str, str], str] = {}
    alike: dict[object, str] = {}
    for weight in weights_of(build):
        if "@" in weight.name:
            raise InternalError(f"{weight!r}: a weight's name has no @, which the names of shards begin with")
        wanted = {target: layout_of(build, target, weight) for target in build.targets}
        for layout in dict.fromkeys(wanted.values()):
            # the plain name if all targets agree, as they do today
            name = weight.name if len(set(wanted.values())) == 1 else f"{weight.name}:{layout}"
            name = alike.setdefault((weight.recipe, weight.dtype, layout), name)
            if name not in weights:
                weights[name] = PackedWeight(name, weight, layout, build.checkpoint, build.mesh)
            names.update({(target, weight.name): name for target, it in wanted.items() if it == layout})
    build.weights = Packed(weights, names)


def weights_of(build: Build) -> list[Weight]:
    """The graph's, then those that steps need besides; each once. InternalError if two differ that have one
    name."""
    buckets = [bucket for target in build.targets.values() for bucket in target.buckets.values()]
    used = [weight for bucket in buckets for weight in weights_in_use(bucket.steps)]
    found: dict[str, Weight] = {}
    for weight in [*build.graph.weights, *used]:
        first = found.setdefault(weight.name, weight)
        if (first.recipe, first.shape, first.dtype) != (weight.recipe, weight.shape, weight.dtype):
            raise InternalError(f"two weights are called {weight!r}: {first.recipe} and {weight.recipe}")
    return list(found.values())


def layout_of(build: Build, target: str, weight: Weight) -> str:
    layouts = build.targets[target].layouts
    if weight.name not in layouts:
        raise InternalError(f"select gave @{weight.name} no layout for {target}")
    return layouts[weight.name]


def shape_of(weight: Weight) -> tuple[int, ...]:
    return tuple(dim for dim in weight.shape if isinstance(dim, int))
