"""pack: each weight's way from the checkpoint's tensors to the plan's bytes.

Takes build.graph (weights with recipes) and build.targets[t].layouts. Gives build.weights, a `Packed`: what
tscompile/plan.py writes, in the graph's order, and the steps, which the plan keeps as "tsp/pack". Nothing is
computed here: a weight is made when its turn to be written comes. Targets share a weight wherever they want
the same layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tscompile.build import Build
from tscompile.checkpoint import Checkpoint
from tscompile.errors import CompileError, InternalError
from tscompile.ir import Weight
from tscompile.layout import STORED, lay_out, stored_bytes, stored_shape
from tscompile.plan import Entry
from tscompile.printer import print_recipe
from tscompile.recipe import Checkpoint as FromCheckpoint
from tscompile.recipe import checkpoint_names
from tscompile.weights import evaluate


@dataclass(frozen=True)
class PackedWeight:
    """One weight entry of the plan: `weight` in `layout`. make() and steps() say the same, one by doing
    it."""

    name: str
    weight: Weight
    layout: str
    checkpoint: Checkpoint

    def make(self) -> Tensor:
        """Reads, casts (to nearest even), merges, lays out."""
        merged = evaluate(self.weight, self.checkpoint.read)
        # Quantisation will come here, a step between merging and laying out, and in steps(): what it gives
        # (codes, and scales of their own layout) become entries of their own.
        return lay_out(self.layout, merged)

    def steps(self) -> list[dict[str, Any]]:
        """What make() does, for the plan's report."""
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
    def stored_shape(self) -> tuple[int, ...]:
        return stored_shape(self.layout, self.weight.dtype, shape_of(self.weight))

    @property
    def num_bytes(self) -> int:
        return stored_bytes(self.layout, self.weight.dtype, shape_of(self.weight))

    def entry(self) -> Entry:
        def data() -> Iterator[memoryview]:
            yield self.make().reshape(-1).view(torch.uint8).numpy().data

        return Entry(self.name, STORED[self.weight.dtype], self.stored_shape, data)


@dataclass(frozen=True)
class Packed:
    """weights: by entry, in the order they are written. names: (target, weight of the graph) -> the entry it
    reads."""

    weights: dict[str, PackedWeight]
    names: dict[tuple[str, str], str]

    def find(self, target: str, weight: Weight) -> PackedWeight:
        return self.weights[self.names[target, weight.name]]

    def report(self) -> list[dict[str, Any]]:
        """The plan's "tsp/pack"."""
        return [{"weight": name, "steps": packed.steps()} for name, packed in self.weights.items()]


def run(build: Build) -> None:
    if build.mesh.num_ranks > 1:
        raise CompileError(f"{build.mesh}: plans of several ranks cannot be written yet; leave --tp at 1")
    weights: dict[str, PackedWeight] = {}
    names: dict[tuple[str, str], str] = {}
    for weight in build.graph.weights:
        wanted = {target: layout_of(build, target, weight) for target in build.targets}
        for layout in dict.fromkeys(wanted.values()):
            # the plain name if all targets agree, as they do today
            name = weight.name if len(set(wanted.values())) == 1 else f"{weight.name}:{layout}"
            weights[name] = PackedWeight(name, weight, layout, build.checkpoint)
            names.update({(target, weight.name): name for target, it in wanted.items() if it == layout})
    build.weights = Packed(weights, names)


def layout_of(build: Build, target: str, weight: Weight) -> str:
    layouts = build.targets[target].layouts
    if weight.name not in layouts:
        raise InternalError(f"select gave @{weight.name} no layout for {target}")
    return layouts[weight.name]


def shape_of(weight: Weight) -> tuple[int, ...]:
    return tuple(dim for dim in weight.shape if isinstance(dim, int))
