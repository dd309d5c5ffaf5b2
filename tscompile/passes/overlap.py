"""overlap: a collective starts as soon as it can, and what does not depend on it runs before it finishes.

Takes the fused build.graph, of every bucket of tokens. Gives the same with two groups, `start` and `finish`,
in place of each collective that gains by it, and between them groups that ran before or after it; receipts,
and build.placed["overlaps"]. Collectives stay in order, and one is in flight at a time: so the ranks need
agree on no more than the list of launches.

It is list scheduling by predicted cost, as XLA's latency-hiding scheduler does it: what a collective needs
comes first, then the collective starts, and of all groups that could run, those that the next collective
needs soonest run until what may be hidden of this one (`Prices.hidden`) is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tscompile.build import Build, Receipt
from tscompile.inspect import alike, of_any_layer
from tscompile.ir import Graph, Group, Op, Value, Weight
from tscompile.kernels.steps import FINISH, START, at_collective, stage_of_step
from tscompile.mesh import Mesh
from tscompile.ops import lookup
from tscompile.passes import propagate
from tscompile.price import Prices


@dataclass(frozen=True)
class Overlap:
    """A collective, the groups that run while it is in flight, and predicted seconds. hideable: of the
    collective, what goes on without the rank's own cores."""

    collective: Group
    beside: list[Group]
    seconds: float
    hideable: float
    seconds_beside: float
    split: float  # what two launches take more than one

    @property
    def hidden(self) -> float:
        """Of the step."""
        return max(min(self.hideable, self.seconds_beside) - self.split, 0.0)

    @property
    def reason(self) -> str:
        """Why nothing is hidden, or nothing."""
        if self.hidden > 0:
            return ""
        if self.hideable <= self.split:
            return (
                f"{_us(self.hideable)} us of it could be hidden, and two launches take {_us(self.split)} more"
            )
        return "what could run takes no time" if self.beside else "all else that is left to run depends on it"


def run(build: Build) -> None:
    if build.mesh.num_ranks == 1:
        return
    for tokens, graph in build.buckets.items():
        prices = propagate.prices_of(dataclasses.replace(build.options, tokens=tokens))
        found = overlap(graph, prices)
        build.receipts += [_receipt(each) for each in found]
        rows = alike(_told(each) for each in found)
        build.placed["overlaps"].append({"max_tokens": tokens, "collectives": rows})


def overlap(graph: Graph, prices: Prices) -> list[Overlap]:
    """Rewrites the graph. What was found for each of its collectives, in order."""
    order = _Order(graph, prices)
    for index in order.movers:
        order.place(index)
    found = [each for each in order.found if each.hidden > 0]
    if found:
        order.emit_all(range(len(order.groups)))
        split = {id(each.collective): each for each in found}
        beside = {id(group) for each in found for group in each.beside}
        apart = [g for g in order.emitted if id(g) not in beside]
        graph.ops = [op for group in apart for op in _in_two(group, split.get(id(group)))]
    return order.found


def _in_two(group: Group, found: Overlap | None) -> Iterator[Group]:
    """The group, or its collective in two, around what runs meanwhile."""
    if found is None:
        yield group
        return
    collective, rest = at_collective(group)
    (out,), op = collective.outputs, collective.body[-1]
    flying = Value(f"{out.name}.started", out.shape, out.dtype, False, out.placement)
    start = dataclasses.replace(op, outputs=[flying])
    finish = Op("finish", [flying, *collective.inputs], [out], {}, op.source)
    yield dataclasses.replace(collective, outputs=[flying], group=START, body=[*collective.body[:-1], start])
    yield from found.beside
    yield Group("group", finish.inputs, [out], {}, op.source, group=FINISH, body=[finish])
    if rest is not None:
        yield rest


@dataclass
class _Order:
    """The groups as they are placed one after the other."""

    graph: Graph
    prices: Prices
    emitted: list[Group] = field(default_factory=list)
    found: list[Overlap] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.groups = self.graph.groups()
        self.movers = [i for i, group in enumerate(self.groups) if _moves(group) is not None]
        self.before = dependences(self.groups)
        self.after: list[list[int]] = [[] for _ in self.groups]
        for index, before in enumerate(self.before):
            for other in before:
                self.after[other].append(index)
        self.unmet = [len(before) for before in self.before]
        self.ready = {index for index, unmet in enumerate(self.unmet) if not unmet}
        self.done: set[int] = set()
        moving = set(self.movers)
        self.needed = [len(self.groups)] * len(self.groups)  # by which collective first
        for index in reversed(range(len(self.groups))):
            for after in self.after[index]:
                by = after if after in moving else self.needed[after]
                self.needed[index] = min(self.needed[index], by)
        # what computes works on a rank's part of the tokens
        sizes = (*self.prices.sizes, *self.graph.mesh.axes)
        self.local = dataclasses.replace(self.prices, sizes=sizes)

    def emit(self, index: int) -> None:
        self.emitted.append(self.groups[index])
        self.done.add(index)
        self.ready.discard(index)
        for after in self.after[index]:
            self.unmet[after] -= 1
            if not self.unmet[after]:
                self.ready.add(after)

    def emit_all(self, indices: Iterable[int]) -> None:
        for index in indices:
            if index not in self.done:
                self.emit(index)

    def place(self, index: int) -> None:
        """What a collective needs, what runs while it is in flight, and itself."""
        self.emit_all(sorted(self._needs(index)))
        while parts := [i for i in self.ready if i != index and _is_slice(self.groups[i])]:
            self.emit_all(sorted(parts))  # no work, but some waits for them
        group, topology = self.groups[index], self.prices.topology
        seconds, hideable = _collective_seconds(group, self.prices, self.graph.mesh)
        beside: list[Group] = []
        took, stage = 0.0, stage_of_step(group)
        while took < hideable > topology.split_s:
            free = [i for i in self.ready if i != index and _moves(self.groups[i]) is None]
            free = [i for i in free if stage_of_step(self.groups[i]) == stage]
            if not free:
                break
            chosen = min(free, key=lambda i: (self.needed[i], i))
            beside.append(self.groups[chosen])
            took += sum(self.local.op(op) for op in self.groups[chosen].body)
            self.emit(chosen)
        self.emit(index)
        self.found.append(Overlap(group, beside, seconds, hideable, took, topology.split_s))

    def _needs(self, index: int) -> set[int]:
        """What must run before it and has not."""
        found, left = set[int](), [index]
        while left:
            new = [i for i in self.before[left.pop()] if i not in self.done and i not in found]
            found.update(new)
            left += new
        return found


def _moves(group: Group) -> Op | None:
    """The op of the group for which ranks wait for each other, if there is one."""
    return next((op for op in group.body if lookup(op.kind).exchanges), None)


def _is_slice(group: Group) -> bool:
    """Whether it gives a rank its part of what it has."""
    return _moves(group) is None and any(lookup(op.kind).across for op in group.body)


def dependences(groups: list[Group]) -> list[set[int]]:
    """Of each group those that must run before it: who makes what it reads, and of a KV cache that it updates
    all who read it as it was."""
    made: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    found = []
    for index, group in enumerate(groups):
        before = {made[id(value)] for value in group.inputs if id(value) in made}
        updates = any(value.state for value in group.outputs)
        for value in group.inputs:
            if value.state and updates:
                before.update(readers.get(id(value), ()))
            readers.setdefault(id(value), []).append(index)
        made.update({id(value): index for value in group.outputs})
        found.append(before)
    return found


def _collective_seconds(group: Group, prices: Prices, mesh: Mesh) -> tuple[float, float]:
    """What the group's collective takes, and what of that may be hidden."""
    op = _moves(group)
    assert op is not None
    # stages are farthest apart
    ranks = mesh.num_ranks if "src" in op.attrs else mesh.size(str(op.attrs["axis"]))
    num_bytes = max(prices.bytes_of(v) for v in (*op.inputs, *op.outputs) if not isinstance(v, Weight))
    return prices.collective(op.kind, num_bytes, ranks)[0], prices.hidden(op.kind, num_bytes, ranks)


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2) if math.isfinite(seconds) else seconds


def _receipt(found: Overlap) -> Receipt:
    op = _moves(found.collective)
    assert op is not None
    names = ", ".join(group.name for group in found.beside)
    why = found.reason or f"beside {names}: {_us(found.hidden)} us hidden"
    return Receipt("overlap", op.name, str(op.source or ""), not found.reason, why)


def _told(found: Overlap) -> dict[str, Any]:
    """For `tscompile explain`."""
    op = _moves(found.collective)
    assert op is not None
    return {
        "collective": op.kind,
        "axis": op.attrs["axis"],
        "value": of_any_layer(op.inputs[0].name),
        "us": _us(found.seconds),
        "beside": [] if found.reason else [of_any_layer(group.name) for group in found.beside],
        "us_beside": 0.0 if found.reason else _us(found.seconds_beside),
        "us_hidden": _us(found.hidden),
        "why_not": found.reason,
    }
