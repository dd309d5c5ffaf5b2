"""Tools for passes that rewrite the graph: fresh names, replaced ops, merged weights, order."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tscompile.ir import Graph, Op, Value, Weight
from tscompile.match import Matcher
from tscompile.recipe import Concat, Interleave, Slice

AnyOp = TypeVar("AnyOp", bound=Op)


class Rewriter:
    """A graph being rewritten. `matcher` sees the graph as it is, if every change is made here."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.names = {v.name for v in graph.values()}
        self.matcher = Matcher(graph)

    def fresh(self, name: str) -> str:
        """`name`, or with a number if it is taken."""
        unique, count = name, 1
        while unique in self.names:
            count += 1
            unique = f"{name}_{count}"
        self.names.add(unique)
        return unique

    def like(self, value: Value, name: str) -> Value:
        """A new value of the same type."""
        return Value(self.fresh(name), value.shape, value.dtype, value.state, value.placement)

    def replace(self, gone: Sequence[Op], at: Op, new: Sequence[Op]) -> None:
        """Puts `new` in the place of `at`, and drops `gone` (and `at`, unless it is among `new`)."""
        drop = {id(op) for op in gone}
        for op in [*gone, at]:
            self.matcher.remove(op)
        for op in new:
            self.matcher.add(op)
        ops: list[Op] = []
        for op in self.graph.ops:
            if op is at:
                ops += new
            elif id(op) not in drop:
                ops.append(op)
        self.graph.ops = ops

    @contextmanager
    def changing(self, ops: Sequence[Op]) -> Iterator[None]:
        """Inside, the inputs and outputs of `ops` may be changed."""
        for op in ops:
            self.matcher.remove(op)
        yield
        for op in ops:
            self.matcher.add(op)

    def reread(self, old: Value, new: Value, readers: Sequence[Op] = ()) -> None:
        """`readers`, or every reader of `old`, read `new` instead."""
        for op in readers or list(self.matcher.consumers.get(id(old), [])):
            self.matcher.remove(op)
            op.inputs = [new if v is old else v for v in op.inputs]
            self.matcher.add(op)

    def merge_weights(self, name: str, recipe: Concat | Interleave, parts: Sequence[Value]) -> Weight:
        """A weight made of `parts`, by `recipe`."""
        first, dim = parts[0], recipe.dim
        sizes = [size for part in parts if isinstance(size := part.shape[dim], int)]
        if isinstance(recipe, Interleave):
            sizes = [-(-size // recipe.tile) * recipe.tile for size in sizes]
        shape = (*first.shape[:dim], sum(sizes), *first.shape[dim + 1 :])
        weight = Weight(self.fresh(name), shape, first.dtype, False, first.placement, recipe=recipe)
        self.graph.weights.append(weight)
        return weight

    def slice_weight(self, whole: Value, start: int, stop: int) -> Weight:
        """Rows start..stop of a weight."""
        assert isinstance(whole, Weight)
        name, shape = self.fresh(f"{whole.name}.{start}"), (stop - start, *whole.shape[1:])
        recipe = Slice(whole.recipe, 0, start, stop)
        weight = Weight(name, shape, whole.dtype, False, whole.placement, recipe=recipe)
        self.graph.weights.append(weight)
        return weight


def in_order(ops: Sequence[AnyOp]) -> list[AnyOp]:
    """The ops such that each comes after those that make its inputs; otherwise in the order given."""
    maker = {id(v): i for i, op in enumerate(ops) for v in op.outputs}
    waits = [{maker[id(v)] for v in op.inputs if id(v) in maker} for op in ops]
    readers: list[list[int]] = [[] for _ in ops]
    for i, wait in enumerate(waits):
        for j in wait:
            readers[j].append(i)
    ready = [i for i, wait in enumerate(waits) if not wait]
    heapq.heapify(ready)
    ordered = []
    while ready:
        i = heapq.heappop(ready)
        ordered.append(ops[i])
        for reader in readers[i]:
            waits[reader].discard(i)
            if not waits[reader]:
                heapq.heappush(ready, reader)
    assert len(ordered) == len(ops), "a cycle"
    return ordered


def weights_in_use(ops: Iterable[Op]) -> list[Weight]:
    """The weights that ops read, in order of first use."""
    found = {id(v): v for op in ops for v in op.inputs if isinstance(v, Weight)}
    return list(found.values())


def common_path(names: Iterable[str]) -> str:
    """The module path that names share, with its dot: layers.0.mlp.gate.out and layers.0.mlp.up.out ->
    layers.0.mlp."""
    split = [name.split(".") for name in names]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)
