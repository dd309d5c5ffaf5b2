"""What a step of a plan will take, for the engine: `tsp/costs`.

    {TARGET: {"step_ns": [[tokens, ns], ...], "decode_key_ps": ps, "prefill_key_ps": ps}}

step_ns: a step of 1, 2, 4, ... tokens that see no keys; the other two, what each key that a token sees adds:
of a decode, where every token reads its own, and of a chunk of a prompt, whose tokens share what is read.
Prices are those that placements are chosen by (tscompile/price.py). The engine scales them by what steps
really take, so what counts is how they grow.
"""

from __future__ import annotations

from collections.abc import Iterator

from tscompile.build import Build
from tscompile.ir import Op
from tscompile.mesh import Mesh
from tscompile.ops import lookup
from tscompile.ops.base import num_bytes
from tscompile.price import Prices

KEYS = 1024  # of a context, where what a key costs is taken


def costs(build: Build) -> dict[str, dict[str, object]]:
    """The entry's content, from the fused graphs of one rank, each for the steps of its bucket."""
    ops = {n: [op for group in graph.groups() for op in group.body] for n, graph in build.buckets.items()}
    found: dict[str, dict[str, object]] = {}
    for target in build.targets:

        def seconds(tokens: int, sequences: int, context: int, target: str = target) -> float:
            prices = Prices.of(target, tokens, sequences, context)
            bucket = min(most for most in ops if most >= tokens)
            return sum(_op_seconds(op, prices, build.mesh) for op in ops[bucket])

        most, seqs = build.options.max_tokens, build.options.max_seqs
        decode = (seconds(seqs, seqs, KEYS) - seconds(seqs, seqs, 0)) / (seqs * KEYS)
        prefill = (seconds(most, 1, KEYS) - seconds(most, 1, 0)) / (most * KEYS)
        found[target] = {
            "step_ns": [[n, max(1, round(seconds(n, min(n, seqs), 0) * 1e9))] for n in sizes(most)],
            "decode_key_ps": round(decode * 1e12),
            "prefill_key_ps": round(prefill * 1e12),
        }
    return found


def sizes(most: int) -> Iterator[int]:
    """1, 2, 4, ... and `most`."""
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most


def _op_seconds(op: Op, prices: Prices, mesh: Mesh) -> float:
    if lookup(op.kind).across is None:
        return prices.op(op)
    if op.kind == "slice":  # which moves nothing
        return prices.topology.launch_s
    moved = num_bytes(op.inputs, dict(prices.sizes))
    return prices.collective(op.kind, moved, mesh.size(str(op.attrs["axis"])))[0]
