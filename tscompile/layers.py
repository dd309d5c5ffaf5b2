"""A graph without most of its layers, for `plan`: of layers that are alike and follow each other a few are
kept, and one of these stands for all that are not.

What is found for the few holds for all where the search has come to rest: where that one layer leads from a
state back to the same state, and no other state comes nearer meanwhile. `Folded.steady` says whether that was
so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tscompile.ir import Graph, Op, Value, Weight
from tscompile.rewrite import weights_in_use
from tscompile.search import Search
from tscompile.segments import Segments

KEPT = 4  # of the layers in a row
STANDS = 2  # which of them stands for those that went: neither the first nor the last


@dataclass(frozen=True)
class Run:
    """Layers that are alike, in a row. segment: where the first begins; segments: of each."""

    segment: int
    segments: int


@dataclass(frozen=True)
class Folded:
    """times: by an op's name, how many it stands for; one, where it is not said. firsts: where the parts
    begin that `fold` was given. runs: of what was folded."""

    graph: Graph
    times: Mapping[str, int]
    firsts: tuple[int, ...]
    runs: tuple[Run, ...]

    def steady(self, search: Search) -> bool:
        """Whether a search of this graph found what one of the whole graph would have found."""
        begins = ((run.segment + STANDS * run.segments, run.segments) for run in self.runs)
        return all(search.passed[i].recurs_in(search.passed[i + size]) for i, size in begins)

    def count(self, op: Op) -> int:
        """How many ops this one stands for."""
        return self.times.get(op.name, 1)

    def of_each_op(self, graph: Graph) -> list[tuple[Op, int]]:
        """The ops of the graph, placed and maybe resharded, and how many each stands for. What was put in
        belongs to the op that it was put before."""
        found, count = list[tuple[Op, int]](), 1
        for op in reversed(graph.ops):
            if op.kind != "redistribute":
                count = self.count(op)
            found.append((op, count))
        return found[::-1]

    def of_each_value(self, graph: Graph) -> dict[int, int]:
        """id(weight or KV cache) -> how many it stands for: one, if all layers share it."""
        found: dict[int, int] = {}
        for op, count in self.of_each_op(graph):
            for value in op.inputs:
                if isinstance(value, Weight) or value.state:
                    found[id(value)] = min(count, found.get(id(value), count))
        return found


class Layers:
    """A graph, and which of its segments are alike. It must not change any more."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        segments = Segments(graph)
        self.segments = segments.all()
        numbers: dict[object, int] = {}
        self.kinds = [numbers.setdefault(segments.signature(s), len(numbers)) for s in self.segments]

    def fold(self, firsts: Sequence[int] = (0,), kept: int = KEPT) -> Folded:
        """A copy of the graph without the layers that others stand for. firsts: the first op of each part of
        it, no layer standing for one of another part. kept: more than all layers for the graph as it is."""
        starts = {segment.start: i for i, segment in enumerate(self.segments)}
        edges = [*(starts[first] for first in firsts), len(self.segments)]
        gone, times, runs = set[int](), dict[str, int](), list[Run]()
        stands_for: dict[str, str] = {}  # what leaves the last layer left out: what leaves the last kept
        for begin, end in itertools.pairwise(edges):
            for segment, period, count in _runs(self.kinds[:end], begin, kept):
                layers = [self._ops(segment + i * period, period) for i in range(count)]
                times |= {self.graph.ops[i].name: count - kept + 1 for i in layers[STANDS]}
                dropped = {i for layer in layers[kept:] for i in layer}
                fewer = sum(s.start in gone for s in self.segments[:segment])
                runs.append(Run(segment - fewer, period))
                gone |= dropped
                left, came = (self.segments[segment + n * period - 1].leaves for n in (count, kept))
                stands_for[left] = came
        folded = self._without(gone, stands_for)
        places = tuple(first - sum(i < first for i in gone) for first in firsts)
        return Folded(folded, times, places, tuple(runs))

    def _ops(self, segment: int, count: int) -> range:
        return range(self.segments[segment].start, self.segments[segment + count - 1].stop)

    def _without(self, gone: set[int], stands_for: Mapping[str, str]) -> Graph:
        graph = self.graph
        made = {repr(v): v for op in graph.ops for v in op.outputs}

        def kept(values: Sequence[Value]) -> list[Value]:
            return [made[stands_for[repr(v)]] if repr(v) in stands_for else v for v in values]

        ops = [
            Op(op.kind, kept(op.inputs), op.outputs, op.attrs, op.source)
            for i, op in enumerate(graph.ops)
            if i not in gone
        ]
        read = {id(v) for op in ops for v in op.inputs}
        inputs = [v for v in graph.inputs if not v.state or id(v) in read]
        return Graph(graph.name, graph.mesh, inputs, weights_in_use(ops), ops, kept(graph.outputs)).copy()


def _runs(kinds: Sequence[int], start: int, kept: int) -> Iterator[tuple[int, int, int]]:
    """(where it begins, segments a layer, layers) of each run of more than `kept` layers from `start` on; of
    several that begin in one place the one that has most segments too many."""
    while start < len(kinds):
        most, found = 0, (start, 1, 1)
        for period in range(1, (len(kinds) - start) // (kept + 1) + 1):
            count = 1
            while (
                kinds[start : start + period] == kinds[start + count * period : start + (count + 1) * period]
            ):
                count += 1
            if period * (count - kept) > most:
                most, found = period * (count - kept), (start, period, count)
        if most:
            yield found
        start += found[1] * found[2]
