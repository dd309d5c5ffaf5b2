"""expand: ops that a model file may say and no kernel does become the ops that compute them.

Takes the captured graph. Gives one in which every op that the registry can expand is expanded, with a receipt
each: multi-head latent attention becomes attention on the cached latents with kv_b absorbed. Before
`precision`, which rounds what the new ops read, and `propagate`, which splits their weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tscompile.build import Build, Receipt
from tscompile.ir import Attr, Op, Value, Weight
from tscompile.ops import lookup
from tscompile.recipe import Recipe
from tscompile.rewrite import Rewriter, weights_in_use


def run(build: Build) -> None:
    graph, rewriter = build.graph, Rewriter(build.graph)
    ops: list[Op] = []
    for op in graph.ops:
        expand = lookup(op.kind).expand
        if expand is None:
            ops.append(op)
            continue
        expanding = _Expanding(rewriter, op)
        expand(expanding, op)
        last = expanding.ops[-1]
        rewriter.names.discard(last.outputs[0].name)
        last.outputs = op.outputs
        ops += expanding.ops
        build.receipts.append(Receipt(f"expand_{op.kind}", op.name, str(op.source or ""), True))
    if len(ops) > len(graph.ops):
        graph.ops = ops
        graph.weights = weights_in_use(graph.ops)


class _Expanding:
    """Collects the ops that stand for `op`."""

    def __init__(self, rewriter: Rewriter, op: Op) -> None:
        self.rewriter, self.op = rewriter, op
        self.path = op.name.rpartition(".")[0]
        self.ops: list[Op] = []

    def emit(self, kind: str, inputs: Sequence[Value], attrs: Mapping[str, Attr], name: str) -> Value:
        (made,) = lookup(kind).infer(inputs, attrs)
        full = self.rewriter.fresh(f"{self.path}.{name}" if self.path else name)
        value = Value(full, made.shape, made.dtype, made.state)
        self.ops.append(Op(kind, list(inputs), [value], dict(attrs), self.op.source))
        return value

    def weight(self, name: str, shape: tuple[int, ...], recipe: Recipe) -> Weight:
        return Weight(self.rewriter.fresh(name), shape, "f32", recipe=recipe)
