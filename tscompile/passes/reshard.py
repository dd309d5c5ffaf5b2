"""reshard: drops the boundaries once their placements have been taken up."""

from __future__ import annotations

from tscompile.build import Build
from tscompile.ir import Op, Value


def run(build: Build) -> None:
    given: dict[int, Value] = {}
    ops: list[Op] = []
    for op in build.graph.ops:
        op.inputs = [given.get(id(v), v) for v in op.inputs]
        if op.kind == "boundary":
            given[id(op.outputs[0])] = op.inputs[0]
        else:
            ops.append(op)
    build.graph.ops = ops
