"""Fused groups -> what a CPU runs, a launch each: kernels, and collectives of the engine.

The engine's collectives do nothing but their collective, and kernels are the same for all ranks and know of
none. So a group that holds both becomes two steps, an all_to_all an all_gather and a slice, and a kernel that
depends on its rank's coordinate reads it from a weight.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tscompile.errors import InternalError
from tscompile.ir import Graph, Group, Op, Sym, Value, Weight, unique
from tscompile.kernels.roles import is_constant, rows_of
from tscompile.mesh import Mesh
from tscompile.ops import lookup
from tscompile.ops.base import integer
from tscompile.placement import Replicate, Shard
from tscompile.recipe import Arange, ShardOf

COLLECTIVE = "collective"
REST = {"all_reduce_rms_norm": "rms_norm"}  # kind of group -> what is left of it without its collective


def steps_of(graph: Graph) -> list[Group]:
    """The launches of the fused graph, in order, each a group of its own. Values are the graph's, what lies
    between two steps of one group, and coordinates, which are inputs of a step that no op of its body
    reads."""
    steps: list[Group] = []
    coordinates: dict[str, Weight] = {}
    for group in graph.groups():
        across = next((op for op in group.body if lookup(op.kind).across), None)
        if across is None:
            steps.append(_located(group, graph.mesh, coordinates))
            continue
        first = _ancestors(group, across)
        rest = [op for op in group.body if not any(op is other for other in first)]
        steps += _realised(_part(COLLECTIVE, first, group), across)
        if rest:
            steps.append(_part(REST[group.group], rest, group))
    return steps


def coordinate_of(step: Group) -> Weight | None:
    """The weight f32[1] that tells the step its rank's coordinate, if it depends on it."""
    read = {id(v) for op in step.body for v in op.inputs}
    return next((v for v in step.inputs if isinstance(v, Weight) and id(v) not in read), None)


def _located(group: Group, mesh: Mesh, coordinates: dict[str, Weight]) -> Group:
    """The group, with the coordinate that one of its ops depends on."""
    axes = [str(op.attrs.get(lookup(op.kind).coordinate, "")) for op in group.body]
    axis = next(filter(None, axes), "")
    if not axis:
        return group
    if axis not in coordinates:
        shards = tuple(Shard(0) if name == axis else Replicate() for name in mesh.names)
        recipe = ShardOf(Arange(mesh.size(axis)), 0, axis)
        coordinates[axis] = Weight(f"rank.{axis}", (1,), "f32", False, shards, recipe=recipe)
    return dataclasses.replace(group, inputs=[*group.inputs, coordinates[axis]])


def launch_fields(step: Group) -> dict[str, Any]:
    """A collective step as the program says it (ARCHITECTURE.md, "The program"), but for its arguments. The
    value is [rows, times, run of one rank] or, where the ranks' parts lie together, [rows, times, ranks,
    run]."""
    op = step.body[-1]
    kind, x, out = op.kind, op.inputs[0], op.outputs[0]
    reduces = "op" in op.attrs
    if reduces and x.dtype != "f32":
        raise InternalError(f"{step.name}: {kind} of {x.dtype}, wanted f32: what a linear gives")
    part = x if kind == "all_gather" else out  # of one rank
    first = sum(isinstance(dim, Sym) for dim in part.shape)
    dim = integer(op.attrs, "dim") if "dim" in op.attrs else first
    if first > 1 or dim < first or any(isinstance(d, Sym) for d in part.shape[first:]):
        raise InternalError(f"{step.name}: {kind} of {list(map(str, part.shape))} along dim {dim}")
    fields = {
        "collective": kind,
        "op": step.name,
        "axis": str(op.attrs["axis"]),
        "dtype": x.dtype,
        "rows": "1" if is_constant(part) else rows_of(part),
        "times": math.prod(d for d in part.shape[first:dim] if isinstance(d, int)),
        "run": math.prod(d for d in part.shape[dim:] if isinstance(d, int)),
    }
    return fields | ({"reduce": str(op.attrs["op"])} if reduces else {})


def _ancestors(group: Group, op: Op) -> list[Op]:
    """`op`, and what of the body leads to it, in order."""
    wanted = {id(v) for v in op.inputs}
    found = [op]
    for other in reversed(group.body):
        if any(id(v) in wanted for v in other.outputs):
            wanted |= {id(v) for v in other.inputs}
            found.append(other)
    if any(other.kind != "reshape" for other in found[1:]):
        raise InternalError(f"{group.name}: {[other.kind for other in found[1:]]} before its collective")
    return found[::-1]


def _part(kind: str, body: list[Op], group: Group) -> Group:
    """The group of these ops of `group`."""
    made = unique([v for op in body for v in op.outputs])
    inside = {id(v) for v in made}
    inputs = unique([v for op in body for v in op.inputs if id(v) not in inside])
    mine = {id(op) for op in body}
    others = {id(v) for op in group.body if id(op) not in mine for v in op.inputs}
    kept = others | {id(v) for v in group.outputs}
    outputs = [v for v in made if id(v) in kept]
    return Group("group", inputs, outputs, {}, body[0].source, group=kind, body=body)


def _realised(step: Group, op: Op) -> list[Group]:
    """The step as collectives that the engine has."""
    if op.kind != "all_to_all":
        return [step]
    x, out = op.inputs[0], op.outputs[0]
    source, dim, ranks = (integer(op.attrs, key) for key in ("source", "dim", "ranks"))
    shape = list(x.shape)
    shape[source] = _times(shape[source], ranks)
    whole = Value(f"{out.name}.whole", tuple(shape), x.dtype)
    shared = {"axis": op.attrs["axis"], "ranks": ranks}
    gather = Op("all_gather", [x], [whole], {**shared, "dim": source}, op.source)
    cut = Op("slice", [whole], [out], {**shared, "dim": dim}, op.source)
    before = [other for other in step.body if other is not op]
    return [
        Group("group", list(step.inputs), [whole], {}, op.source, group=COLLECTIVE, body=[*before, gather]),
        Group("group", [whole], list(step.outputs), {}, op.source, group=COLLECTIVE, body=[cut]),
    ]


def _times(dim: object, ranks: int) -> int:
    assert isinstance(dim, int), dim
    return dim * ranks
