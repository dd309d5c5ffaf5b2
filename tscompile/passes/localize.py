"""localize: from global shapes to those of one rank.

Takes a placed graph whose placements differ only across collectives. Gives the program of one rank, the same
for all: a dim that is sharded over n ranks is an nth (tokens: `T/tp`, as mesh.token_starts says; routed rows
of a rank's tokens: `R*8/tp`, but of its experts as many as there are), weights are `shard`s of their recipes,
and attrs that say sizes say local ones. Placements stay, to tell what the values are.
"""

from __future__ import annotations

from dataclasses import replace

from tscompile.build import Build
from tscompile.errors import InternalError
from tscompile.ir import Dim, Graph, Op, Sym, Value, Weight
from tscompile.ops import lookup
from tscompile.placement import Shard
from tscompile.recipe import ShardOf
from tscompile.sharding import chosen


def run(build: Build) -> None:
    if build.mesh.num_ranks > 1:
        for graph in build.buckets.values():
            localize(graph)


def localize(graph: Graph) -> None:
    axes = [_sharded_factors(graph, op) for op in graph.ops]
    for value in list(graph.values()):
        _shrink(graph, value)
    for op, sharded in zip(graph.ops, axes, strict=True):
        if "ranks" in op.attrs:
            op.attrs["ranks"] = graph.mesh.size(str(op.attrs["axis"]))
        op.attrs = lookup(op.kind).localize(op.attrs, op.outputs, sharded)


def _sharded_factors(graph: Graph, op: Op) -> dict[str, str]:
    """{factor of the op's rule: the axis that it is sharded over}."""
    if lookup(op.kind).across:
        return {}
    found = {}
    for index, (axis, ranks) in enumerate(graph.mesh.axes):
        strategy = chosen(op, axis, index, ranks)
        if strategy.factor:
            found[strategy.factor] = axis
    return found


def _shrink(graph: Graph, value: Value) -> None:
    for index, (axis, ranks) in enumerate(graph.mesh.axes):
        placement = value.placement[index]
        if not isinstance(placement, Shard):
            continue
        dim = value.shape[placement.dim]
        if isinstance(dim, Sym) and dim.ragged and not placement.owner:
            continue
        if isinstance(dim, Sym):
            local: Dim = replace(dim, over=(*dim.over, axis))
        elif dim % ranks == 0:
            local = dim // ranks
        else:
            raise InternalError(f"{value!r}: {axis}={ranks} does not divide dim {placement.dim}, {dim}")
        value.shape = (*value.shape[: placement.dim], local, *value.shape[placement.dim + 1 :])
        if isinstance(value, Weight):
            value.recipe = ShardOf(value.recipe, placement.dim, axis)
