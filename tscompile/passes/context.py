"""context: with cp, every rank keeps a part of each sequence's context, and attention goes part by part.

Takes a graph in global shapes. Where the mesh has `cp` ranks, every op that reads or writes a KV cache takes
the numbers of the parts, 0..cp-1, which `propagate` will shard like the cache: a rank has one number, and the
tokens of that part (of each page of cp * page_size tokens the q-th page_size). What attended to the whole
context gives its parts' sums, and `merge_parts` makes them one. On one rank it is the same computation.
"""

from __future__ import annotations

from tscompile.build import Build
from tscompile.errors import CompileError, InternalError
from tscompile.ir import Op, Value, Weight
from tscompile.ops import lookup
from tscompile.recipe import Arange
from tscompile.rewrite import Rewriter, weights_in_use

MOST_TOKENS = 4096  # of a page


def run(build: Build) -> None:
    parts, page_size = build.mesh.num_parts, build.options.page_size
    if parts == 1:
        return
    if parts * page_size > MOST_TOKENS:
        raise CompileError(
            f"cp={parts} with a page size of {page_size}: a page of {parts * page_size} tokens would lie on "
            f"{parts} ranks, wanted at most {MOST_TOKENS}: a page size of at most "
            f"{MOST_TOKENS // parts // 32 * 32}"
        )
    if build.model and (used := -(-build.model.max_context // page_size)) < parts:
        build.notes.append(
            f"cp={parts}: a context of at most {build.model.max_context} tokens fills {used} of the "
            f"{parts} ranks' parts of a page, {page_size} tokens each; the others' caches stay empty"
        )
    graph, rewriter = build.graph, Rewriter(build.graph)
    numbers = Weight(rewriter.fresh("context_parts"), (parts,), "f32", recipe=Arange(parts))
    ops: list[Op] = []
    for op in graph.ops:
        ops.append(op)
        if any(value.state for value in op.inputs):
            ops += _in_parts(op, numbers, parts, rewriter)
    graph.ops = ops
    graph.weights = weights_in_use(ops)


def _in_parts(op: Op, numbers: Weight, parts: int, rewriter: Rewriter) -> list[Op]:
    """Makes `op` work part by part. What must follow it."""
    definition, (out,) = lookup(op.kind), op.outputs
    if "parts" not in definition.optional:
        raise InternalError(f"{op.kind} -> {out!r} takes a KV cache whole, and cp={parts} has it in parts")
    op.inputs.append(numbers)
    op.attrs["parts"] = parts
    if out.state:
        return []
    (made,) = definition.infer(op.inputs, op.attrs)
    apart = Value(rewriter.fresh(f"{out.name}.parts"), made.shape, made.dtype)
    op.outputs = [apart]
    return [Op("merge_parts", [apart], [out], {}, op.source)]
