"""The least that a step can cost, from the graph that a plan carries and the op registry's FLOPs and
bytes."""

from __future__ import annotations

import math
from pathlib import Path

from tscompile.ir import DTYPES, Op, Weight
from tscompile.ops import lookup
from tscompile.ops.base import num_bytes
from tscompile.parser import parse
from tscompile.reader import Plan
from tscompile.recipe import RopeTable


class Model:
    """A plan's graph, priced."""

    def __init__(self, path: Path) -> None:
        plan = Plan(path)
        self.graph = parse(bytes(plan.bytes("tsp/graph")).decode())
        self.limits = plan.json(f"tsp/program/{plan.manifest['targets'][0]}")["limits"]
        self.ops = [op for group in self.graph.groups() for op in group.body]
        tables = (weight for weight in self.graph.weights if not isinstance(weight.recipe, RopeTable))
        self.num_parameters = sum(weight.row_elements for weight in tables)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers; heads are padded to 32 elements."""
        sizes = 0
        for state in self.graph.states:
            heads, head_dim = (dim for dim in state.shape if isinstance(dim, int))
            sizes += 2 * heads * -(-head_dim // 32) * 32 * DTYPES[state.dtype]
        return sizes

    def step_seconds(self, tokens: int, seqs: int, context: int, bandwidth: float, peak: float) -> float:
        """A step of `tokens` for `seqs` sequences whose tokens see `context` keys on average."""
        sizes = {"T": tokens, "S": seqs, "L": seqs, "P": 1, "context": context}
        flops = sum(lookup(op.kind).flops(op.inputs, op.outputs, op.attrs, sizes) for op in self.ops)
        return max(flops / peak, sum(_traffic(op, sizes) for op in self.ops) / bandwidth)

    def prefill_seconds(self, prompt: int, batch: int, bandwidth: float, peak: float) -> float:
        """All prompts, in steps as large as the plan allows."""
        left, most, seconds = prompt * batch, self.limits["max_tokens"], 0.0
        steps = math.ceil(left / most)
        for step in range(steps):
            tokens = min(most, left - step * most)
            # sequences one after the other: a token sees half of what its sequence has at that point, on
            # average
            seen = (step * most + tokens / 2) % prompt if prompt > most else prompt / 2
            seconds += self.step_seconds(tokens, max(1, tokens // prompt), int(seen), bandwidth, peak)
        return seconds

    def decode_seconds(self, context: int, batch: int, bandwidth: float, peak: float) -> float:
        """One token for each of `batch` sequences."""
        return self.step_seconds(batch, batch, context, bandwidth, peak)


def _traffic(op: Op, sizes: dict[str, int]) -> int:
    """Bytes from and to memory: weights and KV cache. Activations stay in the caches; of the RoPE table few
    rows are read; batch arrays are nothing."""
    if any(isinstance(v, Weight) and isinstance(v.recipe, RopeTable) for v in op.inputs):
        return 0
    activations = [v for v in (*op.inputs, *op.outputs) if not isinstance(v, Weight) and v.dtype != "i32"]
    return max(
        lookup(op.kind).bytes(op.inputs, op.outputs, op.attrs, sizes) - num_bytes(activations, sizes), 0
    )
