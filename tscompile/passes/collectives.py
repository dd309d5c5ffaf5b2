"""collectives: each redistribute becomes what realises it cheapest.

Takes a graph with redistributes; gives one with all_reduce, all_gather, reduce_scatter, all_to_all, send and
slice in their place, still in global shapes (ranks=1 in their attrs: localize says how many). Of rows that
are routed it is a ragged_all_to_all; before the first of these on an axis all ranks' counts are gathered.
"""

from __future__ import annotations

from tscompile.build import Build
from tscompile.errors import InternalError
from tscompile.ir import Attr, Graph, Op, Value
from tscompile.ops.base import ints
from tscompile.placement import Partial, Replicate, Shard, Stage, parse_placement
from tscompile.price import collective_of


def run(build: Build) -> None:
    for graph in build.buckets.values():
        realise(graph)


def realise(graph: Graph) -> None:
    names, ops = graph.mesh.names, list[Op]()
    gathered: dict[tuple[int, str], Value] = {}
    for op in graph.ops:
        if op.kind == "redistribute":
            axis = str(op.attrs["axis"])
            for counts in op.inputs[1:]:
                if (id(counts), axis) not in gathered:
                    ops.append(_all_terms(counts, axis, names.index(axis), graph.mesh.size(axis)))
                    gathered[id(counts), axis] = ops[-1].outputs[0]
                op.inputs[1] = gathered[id(counts), axis]
            op.kind, op.attrs = _realise(op)
        ops.append(op)
    graph.ops = ops


def _all_terms(counts: Value, axis: str, index: int, ranks: int) -> Op:
    """Every rank's term of a sum, end to end, on all ranks of the axis."""
    placement = (*counts.placement[:index], Replicate(), *counts.placement[index + 1 :])
    shape = (ranks * ints(counts.shape)[0],)
    terms = Value(f"{counts.name}.{axis}-terms", shape, counts.dtype, False, placement)
    return Op("all_gather", [counts], [terms], {"axis": axis, "dim": 0, "ranks": ranks})


def _realise(op: Op) -> tuple[str, dict[str, Attr]]:
    """(kind, attrs) of the collective for one (from, to) pair."""
    source, target = parse_placement(str(op.attrs["source"])), parse_placement(str(op.attrs["target"]))
    kind = collective_of(source, target)
    if kind in ("", "nothing"):
        raise InternalError(f"no collective leads from {source} to {target}, at {op.outputs[0]!r}")
    attrs: dict[str, Attr] = {"axis": op.attrs["axis"]}
    if isinstance(source, Stage) and isinstance(target, Stage):
        return kind, attrs | {"src": source.index, "dst": target.index}
    if kind == "ragged_all_to_all" and isinstance(target, Shard):
        return kind, {**attrs, "target": target.owner, "ranks": 1}
    if isinstance(source, Partial):
        attrs["op"] = source.op
    if isinstance(source, Shard):
        attrs["source" if kind == "all_to_all" else "dim"] = source.dim
    if isinstance(target, Shard):
        attrs["dim"] = target.dim
    return kind, attrs if kind == "all_reduce" else {**attrs, "ranks": 1}
