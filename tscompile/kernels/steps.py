"""Fused groups -> what a CPU runs, a launch each: kernels, and collectives of the engine.

The engine's collectives do nothing but their collective, and kernels are the same for all ranks and know of
none. So a group that holds both becomes two steps, and a kernel that depends on its rank's coordinate reads
it from a weight. A kernel that works on its rank's part of the tokens is given that part of the batch: to
slice a batch array is no step.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tscompile.errors import InternalError
from tscompile.ir import BATCH_ARRAYS, Dim, Graph, Group, Op, Sym, Value, Weight, stage_of, unique
from tscompile.mesh import Mesh
from tscompile.ops import lookup
from tscompile.ops.base import integer
from tscompile.placement import Replicate, Shard
from tscompile.recipe import Arange, ShardOf

COLLECTIVE, START, FINISH = "collective", "start", "finish"
BETWEEN_RANKS = (COLLECTIVE, START, FINISH)  # kinds of steps that the engine does itself
REST = {"all_reduce_rms_norm": "rms_norm"}  # kind of group -> what is left of it without its collective


def steps_of(graph: Graph) -> list[Group]:
    """The launches of the fused graph, in order, each a group of its own. Values are the graph's, what lies
    between two steps of one group, and coordinates, which are inputs of a step that no op of its body
    reads. What is in flight lies where it is finished: a start gives the value itself, and a finish gives
    nothing more."""
    steps: list[Group] = []
    coordinates: dict[str, Weight] = {}
    groups = _of_the_batch(graph.groups())
    finished = {id(group.inputs[0]): group.outputs[0] for group in groups if group.group == FINISH}
    for group in groups:
        if group.group == START:
            out = finished[id(group.outputs[0])]
            body = [*group.body[:-1], dataclasses.replace(group.body[-1], outputs=[out])]
            steps.append(dataclasses.replace(group, outputs=[out], body=body))
        elif group.group == FINISH:
            steps.append(
                dataclasses.replace(group, inputs=[*group.outputs, *group.inputs[1:]], outputs=[], body=[])
            )
        elif any(lookup(op.kind).across for op in group.body):
            steps += filter(None, at_collective(group))
        else:
            steps.append(_located(group, graph.mesh, coordinates))
    return steps


def at_collective(group: Group) -> tuple[Group, Group | None]:
    """The group's collective, and what is left of it."""
    across = next(op for op in group.body if lookup(op.kind).across)
    first = _ancestors(group, across)
    rest = [op for op in group.body if not any(op is other for other in first)]
    return _part(COLLECTIVE, first, group), _part(REST[group.group], rest, group) if rest else None


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


def tokens_of(step: Group) -> str:
    """The axis over which the tokens are sharded that the step works on, or ""."""
    values = [*step.outputs, *step.inputs]
    axes = {dim.over for v in values for dim in v.shape if isinstance(dim, Sym) and dim.over}
    if len(axes) > 1 or any(len(over) > 1 for over in axes):
        raise InternalError(f"{step.name} works on tokens over {sorted(axes)}, wanted one axis")
    return next((over[0] for over in axes), "")


def stage_of_step(step: Group) -> int | None:
    """The pipeline stage whose ranks alone run the step; None if all do, as a send."""
    if step.group == COLLECTIVE and step.body[-1].kind == "send":
        return None
    stages = {stage for v in [*step.inputs, *step.outputs] if (stage := stage_of(v)) is not None}
    if len(stages) > 1:
        raise InternalError(f"{step.name} works on values of stages {sorted(stages)}, wanted one")
    return next(iter(stages), None)


def launch_fields(step: Group) -> dict[str, Any]:
    """A collective step as the program says it (ARCHITECTURE.md, "The program"), but for its arguments. The
    value is [rows, times, run of one rank] or, where the ranks' parts lie together, [rows, times, ranks,
    run]; of an all_to_all, [rows, times, part of one rank, ranks, run of one rank] or [..., ranks, part,
    run]. Of routes, rows of `run`, at most `top` a token."""
    if step.group == FINISH:
        return {"op": step.inputs[0].name, "phase": "finish"}
    return _fields(step) | ({"phase": "start"} if step.group == START else {})


def _fields(step: Group) -> dict[str, Any]:
    op = step.body[-1]
    kind, x, out = op.kind, op.inputs[0], op.outputs[0]
    fields: dict[str, Any] = {
        "collective": kind,
        "op": step.name,
        "axis": str(op.attrs["axis"]),
        "dtype": x.dtype,
    }
    rows = x.shape[0]
    if isinstance(rows, Sym) and rows.ragged:
        experts = _known(op.inputs[1].shape[0]) // integer(op.attrs, "ranks")
        to = "tokens" if op.attrs["target"] == "T" else "experts"
        return fields | {"to": to, "experts": experts, "top": rows.times, "run": x.row_elements}
    if "op" in op.attrs and x.dtype != "f32" and (x.dtype, op.attrs["op"]) != ("i32", "sum"):
        raise InternalError(f"{step.name}: {kind} of {x.dtype}, wanted f32: what a linear gives")
    first = sum(isinstance(dim, Sym) for dim in x.shape)  # dim that is no row
    dims = sorted(integer(op.attrs, key) for key in ("source", "dim") if key in op.attrs) or [first]
    if first > 1 or any(isinstance(d, Sym) for d in x.shape[first:]):
        raise InternalError(f"{step.name}: {kind} of {list(map(str, x.shape))}")
    # of each dim that is moved, what one rank has; of any other dim the two are alike
    local = [_shorter(a, b) for a, b in zip(x.shape, out.shape, strict=True)]
    tokens = first == 1 and dims[0] == 0  # the first dim that is moved
    fields |= {
        "rows": "1" if tokens or not first else str(x.shape[0]),
        "times": math.prod(_known(d) for d in local[first : dims[0]]),
        "run": math.prod(_known(d) for d in local[dims[-1] :] if not isinstance(d, Sym)),
    }
    if tokens:
        fields["parts"] = "tokens"
    if kind == "all_to_all":
        fields["gathers"] = "first" if integer(op.attrs, "source") == dims[0] else "second"
        fields["part"] = math.prod(_known(d) for d in local[dims[0] + tokens : dims[1]])
    fields |= {end: integer(op.attrs, end) for end in ("src", "dst") if end in op.attrs}
    return fields | ({"reduce": str(op.attrs["op"])} if "op" in op.attrs else {})


def _shorter(one: Dim, other: Dim) -> Dim:
    return min(one, other) if isinstance(one, int) and isinstance(other, int) else one


def _known(dim: Dim) -> int:
    assert isinstance(dim, int), dim
    return dim


def _of_the_batch(groups: list[Group]) -> list[Group]:
    """The groups without those that slice a batch array; what these gave is the array again, of which a
    launch sees its rank's part."""
    arrays: dict[int, Value] = {}
    rest = []
    for group in groups:
        op, array = group.body[-1], group.inputs[0] if group.inputs else None
        sliced = len(group.body) == 1 and op.kind == "slice" and array is not None
        if sliced and array is not None and array.name in BATCH_ARRAYS and integer(op.attrs, "dim") == 0:
            arrays[id(op.outputs[0])] = array
        else:
            rest.append(group)

    def renamed(op: Op) -> Op:
        return dataclasses.replace(op, inputs=[arrays.get(id(v), v) for v in op.inputs])

    if not arrays:
        return rest
    return [
        dataclasses.replace(group, inputs=renamed(group).inputs, body=[renamed(op) for op in group.body])
        for group in rest
    ]


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
