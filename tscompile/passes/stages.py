"""stages: cuts the ops into consecutive pipeline stages, one a rank of the mesh's axis of stages.

Takes a graph in global shapes. Gives the same graph with every value placed on that axis: an op, what it
makes and its KV cache lie on one stage, batch arrays on every rank. Cuts come where one value alone crosses;
of all ways to cut there, the slowest stage takes least, at the prices of `propagate`, its send to the next
counted. A weight that several stages read is there once for each. Without such an axis nothing is done.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tscompile.build import Build
from tscompile.errors import CompileError
from tscompile.ir import Graph, Op, Sym, Value, Weight, replicated
from tscompile.mesh import Mesh
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
    pieces = pieces_of(graph, prices)
    starts, seconds = starts_of(graph, graph.mesh, pieces, prices)
    put(graph, first_ops(pieces, starts))
    rows, tokens = list[dict[str, object]](), dict(prices.sizes)["T"]
    for stage, of_stage in enumerate(seconds):
        ops = [op for piece in pieces[starts[stage] : [*starts, None][stage + 1]] for op in piece.ops]
        us = round(of_stage * 1e6, 2)
        rows.append({"stage": stage, "first": ops[0].name, "last": ops[-1].name, "us": us, "tokens": tokens})
    return rows


def starts_of(
    graph: Graph, mesh: Mesh, pieces: Sequence[Piece], prices: Prices
) -> tuple[Sequence[int], list[float]]:
    """The first piece of each stage of the mesh, and the stages' seconds."""
    axis, ranks = mesh.axes[mesh.stage_axis]
    if len(pieces) < ranks:
        raise CompileError(
            f"{axis}={ranks}: {graph.name} can be cut into {len(pieces)} stages at most, as it has "
            f"{len(pieces) - 1} places between its ops where one value alone crosses: {axis} can be 1 to "
            f"{len(pieces)}"
        )
    sends = [sum(prices.send(value, mesh.num_ranks) for value in piece.leaves) for piece in pieces]

    def seconds(first: int) -> Iterator[float]:
        """Of a stage from `first` on, that ends after one piece, two, ..."""
        total = itertools.accumulate(piece.seconds for piece in pieces[first:])
        return (own + send for own, send in zip(total, sends[first:], strict=True))

    starts = partition(len(pieces), ranks, seconds)
    sizes = [stop - first for first, stop in itertools.pairwise([*starts, len(pieces)])]
    return starts, [
        next(itertools.islice(seconds(first), size - 1, None))
        for first, size in zip(starts, sizes, strict=True)
    ]


def first_ops(pieces: Sequence[Piece], starts: Sequence[int]) -> list[int]:
    """Of the pieces that are the starts-th: where in the graph their first ops are."""
    return [sum(len(piece.ops) for piece in pieces[:start]) for start in starts]


def put(graph: Graph, firsts: Sequence[int]) -> None:
    """Sets every placement on the axis of stages, whose first ops are the firsts-th."""
    index, stage = graph.mesh.stage_axis, -1
    for value in graph.values():
        value.placement = replicated(graph.mesh)
    found = []
    for i, op in enumerate(graph.ops):
        stage += i in firsts
        found.append(_on(op, Stage(stage)))
    propagate.assign(graph, index, found)


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


def partition(count: int, parts: int, costs_from: Callable[[int], Iterable[float]]) -> Sequence[int]:
    """Cuts `count` items in a row into `parts` that are not empty: the first item of each, such that the
    dearest part costs least, and of such the sum of their squares is least. costs_from(first): what a part
    costs that begins there, and has one item, two, ..."""
    costs = {
        (first, first + size): cost
        for first in range(count)
        for size, cost in enumerate(costs_from(first), 1)
    }
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
                if part <= most:
                    way = (add(total, part), (*starts, first))
                    if stop not in after or way < after[stop]:
                        after[stop] = way
        best = after
    return best[count]
