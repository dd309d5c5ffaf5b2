"""stages: cuts the ops into consecutive pipeline stages, one a rank of the mesh's axis of stages.

Takes a graph in global shapes. Gives the same graph with every value placed on that axis: an op, what it
makes and its KV cache lie on one stage, batch arrays on every rank. Cuts come where one value alone crosses;
of all ways to cut there, the slowest stage takes least, at the prices of `propagate`, its send to the next
counted. A weight that several stages read is there once for each. Without such an axis nothing is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tscompile.build import Build
from tscompile.errors import CompileError
from tscompile.ir import Graph, Op, Sym, Value, Weight, replicated
from tscompile.passes import propagate
from tscompile.placement import Placement, Replicate, Stage
from tscompile.price import Prices
from tscompile.sharding import Strategy


@dataclass(frozen=True)
class Piece:
    """Ops that stay together, and what they are predicted to take. leaves: the one value that crosses to the
    next piece; of the last the model's outputs."""

    ops: tuple[Op, ...]
    seconds: float
    leaves: tuple[Value, ...]


def run(build: Build) -> None:
    if build.mesh.stage_axis >= 0:
        build.placed["stages"] = cut(build.graph, propagate.prices_of(build.options))


def cut(graph: Graph, prices: Prices) -> list[dict[str, object]]:
    """Sets every placement on the axis of stages. A row a stage: its first and last value and its predicted
    microseconds in a step of so many tokens, as on one rank of the other axes. CompileError if the ops cannot
    be cut into so many."""
    index = graph.mesh.stage_axis
    axis, ranks = graph.mesh.axes[index]
    pieces = pieces_of(graph, prices)
    if len(pieces) < ranks:
        raise CompileError(
            f"{axis}={ranks}: {graph.name} can be cut into {len(pieces)} stages at most, as it has "
            f"{len(pieces) - 1} places between its ops where one value alone crosses: {axis} can be 1 to "
            f"{len(pieces)}"
        )

    def seconds(first: int, stop: int) -> float:
        sends = sum(prices.send(value, graph.mesh.num_ranks) for value in pieces[stop - 1].leaves)
        return sum(piece.seconds for piece in pieces[first:stop]) + sends

    starts = partition(len(pieces), ranks, seconds)
    ends = [*starts[1:], len(pieces)]
    for value in graph.values():
        value.placement = replicated(graph.mesh)
    found, rows, tokens = [], list[dict[str, object]](), dict(prices.sizes)["T"]
    for stage, (first, stop) in enumerate(zip(starts, ends, strict=True)):
        ops = [op for piece in pieces[first:stop] for op in piece.ops]
        found += [_on(op, Stage(stage)) for op in ops]
        us = round(seconds(first, stop) * 1e6, 2)
        rows.append({"stage": stage, "first": ops[0].name, "last": ops[-1].name, "us": us, "tokens": tokens})
    propagate.assign(graph, index, found)
    return rows


def _on(op: Op, stage: Stage) -> Strategy:
    def taken(value: Value) -> Placement:
        return stage if isinstance(value, Weight) or value.state else Replicate()

    return Strategy("", tuple(taken(value) for value in op.inputs), (stage,) * len(op.outputs))


def pieces_of(graph: Graph, prices: Prices) -> list[Piece]:
    """The ops in order, cut wherever a stage may end: one value alone crosses, neither a cache nor rows whose
    number only their rank knows, and either side computes something."""
    last_use = {id(v): i for i, op in enumerate(graph.ops) for v in op.inputs}
    last_use |= {id(v): len(graph.ops) for v in graph.outputs}
    pieces: list[Piece] = []
    ops: list[Op] = []
    live: dict[int, Value] = {}
    for i, op in enumerate(graph.ops):
        ops.append(op)
        live |= {id(v): v for v in op.outputs}
        live = {key: v for key, v in live.items() if last_use.get(key, -1) > i}
        if i < len(graph.ops) - 1 and not (len(live) == 1 and all(map(_crosses, live.values()))):
            continue
        if all(op.kind == "boundary" for op in ops) and pieces:  # says where a value lies, and makes none
            ops = [*pieces.pop().ops, *ops]
        pieces.append(Piece(tuple(ops), sum(prices.op(op) for op in ops), tuple(live.values())))
        ops = []
    return pieces


def _crosses(value: Value) -> bool:
    ragged = any(isinstance(dim, Sym) and dim.ragged for dim in value.shape)
    return not value.state and not ragged


def partition(count: int, parts: int, cost: Callable[[int, int], float]) -> Sequence[int]:
    """Cuts `count` items in a row into `parts` that are not empty: the first item of each, such that the
    dearest part costs least, and of such the sum of their squares is least. cost(first, stop): of a part."""
    costs = {(i, j): cost(i, j) for j in range(1, count + 1) for i in range(j)}
    most, _ = _best(count, parts, costs, max, math.inf)
    _, starts = _best(count, parts, costs, lambda so_far, part: so_far + part * part, most * (1 + 1e-9))
    return starts


def _best(
    count: int,
    parts: int,
    costs: dict[tuple[int, int], float],
    add: Callable[[float, float], float],
    most: float,
) -> tuple[float, tuple[int, ...]]:
    """The least total of parts that cost `most` at most, and their first items: by dynamic programming over
    where the last part begins."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(parts):
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for first, (total, starts) in best.items():
            for stop in range(first + 1, count + 1):
                part = costs[first, stop]
                way = (add(total, part), (*starts, first))
                if part <= most and (stop not in after or way < after[stop]):
                    after[stop] = way
        best = after
    return best[count]
