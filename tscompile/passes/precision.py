"""precision: says where values are rounded.

Takes a graph whose floats are all f32. Gives one where what the plan stores has the plan's dtype: the weights
that a `storage` slot of the registry reads, the KV caches, and, by an explicit `cast` before the op that
reads it, every value that such a slot takes. One cast a value, shared by its readers. A f32 plan gets none.
Vectors (norms, biases) and tables stay f32.
"""

from __future__ import annotations

from tscompile.build import Build
from tscompile.ir import Op, Value, Weight
from tscompile.ops import lookup


def run(build: Build) -> None:
    dtype = build.options.dtype
    if dtype == "f32":
        return
    graph = build.graph
    for state in graph.states:
        state.dtype = dtype
    stored: dict[int, Value] = {}  # id(value) -> the same, as stored
    ops: list[Op] = []
    for op in graph.ops:
        definition = lookup(op.kind)
        for index, value in enumerate(op.inputs):
            if definition.slot(index).dtype != "storage" or value.dtype == dtype:
                continue
            if id(value) not in stored:
                if isinstance(value, Weight):
                    stored[id(value)] = Weight(value.name, value.shape, dtype, recipe=value.recipe)
                else:
                    rounded = Value(f"{value.name}.{dtype}", value.shape, dtype)
                    ops.append(Op("cast", [value], [rounded], {"to": dtype}, op.source))
                    stored[id(value)] = rounded
            op.inputs[index] = stored[id(value)]
        ops.append(op)
        for output, found in zip(op.outputs, definition.infer(op.inputs, op.attrs), strict=True):
            output.dtype = found.dtype
    graph.ops = ops
    _keep_weights(build, stored)


def _keep_weights(build: Build, stored: dict[int, Value]) -> None:
    """A weight may be read both ways, as stored and as f32: then it is there twice."""
    graph = build.graph
    read = {id(v) for op in graph.ops for v in op.inputs}
    weights: list[Weight] = []
    for weight in graph.weights:
        narrow = stored.get(id(weight))
        if id(weight) in read:
            weights.append(weight)
        if isinstance(narrow, Weight):
            narrow.name += f".{narrow.dtype}" if id(weight) in read else ""
            weights.append(narrow)
    graph.weights = weights
