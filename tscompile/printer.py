"""The graph's text. Line breaks mean nothing. Grammar:

    graph    = "graph" NAME mesh "{" {input | weight | op | group} "output" values "}"
    mesh     = "mesh(" AXIS "=" INT {"," AXIS "=" INT} ")"
    input    = "input" %NAME ":" type
    weight   = "weight" @NAME ":" type "=" recipe
    op       = made "=" KIND "(" [values] [attrs] ")" [source]
    group    = made "=" "group." KIND "(" values ")" "{" [source] {op} "}"
    made     = %NAME ":" type {"," %NAME ":" type}
    values   = (%NAME | @NAME) {"," (%NAME | @NAME)}
    source   = "#" FILE ":" LINE
    type     = ["state"] DTYPE "[" [dim {"," dim}] "]" {AXIS ":" placement}
    dim      = INT | ("T" | "S" | "L" | "P" | "S+1") {"/" AXIS}
    recipe   = "checkpoint(" STRING ")" | KIND "(" [recipe {"," recipe}] [attrs] ")"
    attrs    = ";" NAME "=" literal {"," NAME "=" literal}
    literal  = INT | FLOAT | STRING | "true" | "false" | "[" [literal {"," literal}] "]"

An axis on which a value is replicated is left out of its type.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from tscompile.ir import Graph, Group, Op, Value
from tscompile.mesh import Mesh
from tscompile.placement import Replicate
from tscompile.recipe import (
    Arange,
    Checkpoint,
    Concat,
    Interleave,
    Pad,
    Recipe,
    Repeat,
    RopeTable,
    ShardOf,
    Slice,
    Stack,
    View,
)


def print_graph(graph: Graph) -> str:
    """The whole graph; `parse` is the inverse."""
    mesh = graph.mesh
    lines = [f"graph {graph.name} {mesh} {{"]
    lines += [f"  input {v!r}: {print_type(v, mesh)}" for v in graph.inputs]
    lines += [f"  weight {w!r}: {print_type(w, mesh)} = {print_recipe(w.recipe)}" for w in graph.weights]
    for op in graph.ops:
        lines += print_op(op, mesh, "  ")
    lines += [f"  output {_names(graph.outputs)}", "}"]
    return "\n".join(lines) + "\n"


def print_op(op: Op, mesh: Mesh, indent: str = "") -> list[str]:
    """One op's line, or a group's lines."""
    given = ", ".join(f"{v!r}: {print_type(v, mesh)}" for v in op.outputs)
    where = f"  # {op.source}" if op.source else ""
    if isinstance(op, Group):
        head = f"{indent}{given} = group.{op.group}({_names(op.inputs)}) {{{where}"
        body = [line for inner in op.body for line in print_op(inner, mesh, indent + "  ")]
        return [head, *body, f"{indent}}}"]
    attrs = _attrs([(key, op.attrs[key]) for key in sorted(op.attrs)])
    return [f"{indent}{given} = {op.kind}({_names(op.inputs)}{attrs}){where}"]


def print_type(value: Value, mesh: Mesh) -> str:
    """E.g. `bf16[T, 256] tp:S(1)`."""
    dims = ", ".join(str(dim) for dim in value.shape)
    placed = "".join(
        f" {axis}:{placement}"
        for axis, placement in zip(mesh.names, value.placement, strict=False)
        if placement != Replicate()
    )
    return f"{'state ' if value.state else ''}{value.dtype}[{dims}]{placed}"


def print_recipe(recipe: Recipe) -> str:
    """E.g. `concat(checkpoint("a"), checkpoint("b"); dim=0)`."""
    match recipe:
        case Checkpoint(name):
            text = f"checkpoint({json.dumps(name)})"
        case Concat(parts, dim):
            text = f"concat({_recipes(parts)}; dim={dim})"
        case Interleave(parts, tile, dim):
            text = f"interleave({_recipes(parts)}; tile={tile}{f', dim={dim}' if dim else ''})"
        case Stack(parts):
            text = f"stack({_recipes(parts)})"
        case Arange(count):
            text = f"arange(; count={count})"
        case Slice(part, dim, start, stop):
            text = f"slice({print_recipe(part)}; dim={dim}, start={start}, stop={stop})"
        case View(part, shape, order):
            text = f"view({print_recipe(part)}; shape={_literal(shape)}, order={_literal(order)})"
        case ShardOf(part, dim, axis):
            text = f"shard({print_recipe(part)}; dim={dim}, axis={json.dumps(axis)})"
        case Pad(part, dim, size):
            text = f"pad({print_recipe(part)}; dim={dim}, size={size})"
        case Repeat(part, dim, pieces, times):
            text = f"repeat({print_recipe(part)}; dim={dim}, parts={pieces}, times={times})"
        case RopeTable(rows, inv_freq, scaling):
            text = f"rope_table(; rows={rows}, inv_freq={_literal(inv_freq)}, scaling={_literal(scaling)})"
    return text


def _recipes(parts: Sequence[Recipe]) -> str:
    return ", ".join(print_recipe(part) for part in parts)


def _names(values: Sequence[Value]) -> str:
    return ", ".join(repr(v) for v in values)


def _attrs(attrs: Sequence[tuple[str, object]]) -> str:
    return "; " + ", ".join(f"{key}={_literal(value)}" for key, value in attrs) if attrs else ""


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return repr(value)
