"""The search behind `propagate`: of all ways to place a graph over one axis, the cheapest.

A dynamic program over the ops in order. A state says where the live values lie; between modules little is
live, so there are few. The ops are cut into segments where one value alone crosses; segments that are alike,
with the same states before them and the same differences of cost between these, are solved once: the layers
of a model, from the second or third on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeAlias

from tscompile.errors import CompileError
from tscompile.ir import Attr, Graph, Op, Value, Weight
from tscompile.mesh import by_sequence
from tscompile.placement import Owned, Partial, Placement, Replicate, Shard
from tscompile.price import Prices, collective_of
from tscompile.recipe import checkpoint_names
from tscompile.sharding import Strategy, Taken, chosen, rule_of, strategies

MAX_STATES = 64  # kept after each op, the cheapest
CROSSING = 0  # in a segment's own states: the value that came into it, or leaves it

# id(live value) -> every placement that it has been brought to so far. After one op the values of all states
# are the same, in the same order; between segments they are sorted, so that equal states are equal
State: TypeAlias = tuple[tuple[int, tuple[Placement, ...]], ...]
# What came of a segment: (its last state, cost, which of the states before it led there, its ops' strategies)
Ends: TypeAlias = list[tuple[State, float, State, tuple[Strategy, ...]]]


@dataclass(frozen=True)
class Path:
    """A way to place the ops so far: what it costs, the last ops' strategies, and the path before them."""

    cost: float
    strategies: tuple[Strategy, ...] = ()
    before: Path | None = None


@dataclass(frozen=True)
class Earlier:
    """What the axes before this one have settled. of_op: parts in all, and of each factor. of_value: into
    how many parts it is cut. moved: rows of experts that go from one rank to another."""

    of_op: Mapping[int, tuple[int, Taken]] = field(default_factory=dict)
    of_value: Mapping[int, int] = field(default_factory=dict)
    moved: Set[int] = frozenset()

    def op(self, op: Op) -> tuple[int, Taken]:
        return self.of_op.get(id(op), (1, frozenset()))

    def parts(self, value: Value) -> int:
        return self.of_value.get(id(value), 1)

    def keeps_whole(self, value: Value, placement: Placement) -> bool:
        """Rows that move over one axis are counted there, so no other axis shares them out."""
        return not (id(value) in self.moved and isinstance(placement, Shard) and placement.dim == 0)


def settled(graph: Graph, index: int) -> Earlier:
    """What the axes before the index-th have sharded."""
    of_op: dict[int, tuple[int, Taken]] = {}
    of_value: dict[int, int] = {}
    moved: set[int] = set()
    for earlier, (axis, ranks) in enumerate(graph.mesh.axes[:index]):
        if ranks == 1:
            continue
        for op in graph.ops:
            if op.kind == "redistribute":  # after reshard: no axis shares a move out
                continue
            strategy = chosen(op, axis, earlier, ranks)
            factor = strategy.factor
            for value, wanted in zip(op.inputs, strategy.takes, strict=True):
                if collective_of(value.placement[earlier], wanted) == "ragged_all_to_all":
                    moved.add(id(value))
            parts, taken = of_op.get(id(op), (1, Taken()))
            if op.kind == "boundary" and isinstance(op.outputs[0].placement[earlier], Shard):
                factor = "t"
            if factor:
                factors = dict(taken)
                factors[factor] = factors.get(factor, 1) * ranks
                of_op[id(op)] = (parts * ranks, frozenset(factors.items()))
        for value in graph.values():
            if isinstance(value.placement[earlier], (Shard, Owned)):
                of_value[id(value)] = of_value.get(id(value), 1) * ranks
    return Earlier(of_op, of_value, moved)


class Search:
    def __init__(
        self,
        graph: Graph,
        axis: str,
        ranks: int,
        prices: Prices,
        earlier: Earlier | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        """pinned: weights and KV caches stay where they are."""
        self.graph, self.axis, self.ranks, self.prices = graph, axis, ranks, prices
        self.earlier = earlier or Earlier()
        self.index = graph.mesh.names.index(axis)
        self.pinned = pinned
        self.cost = math.inf  # of what best() found
        self.solved = 0  # segments that were not like one before
        self.first_use: dict[int, int] = {}
        self.last_use: dict[int, int] = {}
        for i, op in enumerate(graph.ops):
            for value in op.inputs:
                self.first_use.setdefault(id(value), i)
                self.last_use[id(value)] = i
        self.last_use.update({id(v): len(graph.ops) for v in graph.outputs})
        self.made_by = {id(v): op for op in graph.ops for v in op.outputs}
        self.brought: dict[
            tuple[int, tuple[Placement, ...], Placement], tuple[float, tuple[Placement, ...]]
        ] = {}

    def best(self) -> list[Strategy]:
        """One strategy an op, the cheapest together. CompileError if there is none."""
        paths: dict[State, Path] = {(): Path(0.0)}
        known: dict[object, Ends] = {}
        for start, stop, comes, leaves in self._segments():
            base = min(path.cost for path in paths.values())
            before = {renamed(s, comes, CROSSING): round(p.cost - base, 15) for s, p in paths.items()}
            key = (self._signature(start, stop, comes), tuple(sorted(before.items(), key=str)))
            if key not in known:
                known[key] = self._solve(start, stop, before, comes, leaves)
            of = {renamed(s, comes, CROSSING): p for s, p in paths.items()}
            paths = {
                renamed(end, CROSSING, leaves): Path(base + cost, found, of[origin])
                for end, cost, origin, found in known[key]
            }
        self.solved = len(known)
        costs = [(p.cost + self._outputs_cost(state), i) for i, (state, p) in enumerate(paths.items())]
        self.cost, index = min(costs)
        path: Path | None = list(paths.values())[index]
        chunks = []
        while path is not None:
            chunks.append(path.strategies)
            path = path.before
        return [strategy for chunk in reversed(chunks) for strategy in chunk]

    # --- segments ---

    def _segments(self) -> list[tuple[int, int, int, int]]:
        """(start, stop, id of the value that comes in, of the one that leaves), 0 for none."""
        segments, live, start, comes = [], dict[int, int](), 0, 0
        for i, op in enumerate(self.graph.ops):
            live.update({id(v): self.last_use.get(id(v), -1) for v in op.outputs})
            live = {v: last for v, last in live.items() if last > i}
            if len(live) <= 1 or i == len(self.graph.ops) - 1:
                leaves = next(iter(live), 0) if len(live) == 1 else 0
                segments.append((start, i + 1, comes, leaves))
                start, comes = i + 1, leaves
        return segments

    def _signature(self, start: int, stop: int, comes: int) -> object:
        """Equal for two segments that are alike: ops, attrs, types, who reads what, what earlier axes did."""
        labels: dict[int, object] = {comes: "in"}

        def label(value: Value) -> object:
            alone = self.first_use[id(value)] >= start and self.last_use[id(value)] < stop
            if id(value) not in labels:
                labels[id(value)] = len(labels) if alone else id(value)
            pin, moved = self._pin(value), id(value) in self.earlier.moved
            return labels[id(value)], value.shape, value.dtype, self.earlier.parts(value), pin, moved

        lines = []
        for op in self.graph.ops[start:stop]:
            attrs: list[tuple[str, Attr]] = sorted((k, v) for k, v in op.attrs.items() if k != "module")
            takes = tuple(label(v) for v in op.inputs)
            for value in op.outputs:
                labels[id(value)] = ("made", len(labels))
            gives = tuple(
                (labels[id(v)], v.shape, v.dtype, self.last_use.get(id(v), -1) >= stop, self.earlier.parts(v))
                for v in op.outputs
            )
            lines.append((op.kind, tuple(attrs), takes, gives, self.earlier.op(op)))
        return tuple(lines)

    def _solve(self, start: int, stop: int, before: dict[State, float], comes: int, leaves: int) -> Ends:
        roots = {renamed(s, CROSSING, comes): Path(cost) for s, cost in before.items()}
        origin = {id(path): renamed(s, comes, CROSSING) for s, path in roots.items()}
        paths = roots
        for index in range(start, stop):
            paths = self._step(index, paths)
        ends: Ends = []
        for state, last in without_dominated(paths).items():
            found, path = [], last
            while path.before is not None:
                found.append(path.strategies[0])
                path = path.before
            ends.append((renamed(state, leaves, CROSSING), last.cost, origin[id(path)], tuple(found[::-1])))
        return ends

    # --- one op ---

    def _step(self, index: int, paths: dict[State, Path]) -> dict[State, Path]:
        op = self.graph.ops[index]
        options = [(s, self.op_cost(op, s)) for s in self.options(op)]
        inputs = {id(v) for v in op.inputs}
        ways: dict[State, list[tuple[float, Strategy, State]]] = {}  # by where the inputs lie
        after: dict[State, Path] = {}
        for state, path in paths.items():
            here = tuple(item for item in state if item[0] in inputs)
            others = tuple(item for item in state if item[0] not in inputs and self.last_use[item[0]] > index)
            if here not in ways:
                found = (self._way(index, dict(here), strategy, own) for strategy, own in options)
                ways[here] = [way for way in found if way[0] < math.inf]
            for cost, strategy, reached in ways[here]:
                key = (*others, *reached)
                if key not in after or path.cost + cost < after[key].cost:
                    after[key] = Path(path.cost + cost, (strategy,), path)
        if not after:
            raise CompileError(self._no_way(op, list(paths)), op.source)
        if len(after) <= MAX_STATES:
            return after
        return dict(sorted(after.items(), key=lambda item: item[1].cost)[:MAX_STATES])

    def _way(
        self, index: int, live: dict[int, tuple[Placement, ...]], strategy: Strategy, cost: float
    ) -> tuple[float, Strategy, State]:
        """(cost, the strategy, where the op's inputs and outputs lie then, those that are read again)."""
        op = self.graph.ops[index]
        for value, wanted in zip(op.inputs, strategy.takes, strict=True):
            more, live[id(value)] = self.bring(value, wanted, live.get(id(value), ()))
            cost += more
        live |= {id(v): (given,) for v, given in zip(op.outputs, strategy.gives, strict=True)}
        return cost, strategy, tuple((v, p) for v, p in live.items() if self.last_use.get(v, -1) > index)

    def options(self, op: Op) -> list[Strategy]:
        """What the search may choose from."""
        pins = [(i, pin) for i, pin in enumerate(map(self._pin, op.inputs)) if pin]
        return [s for s in self._all(op) if all(s.takes[i] == pin for i, pin in pins)]

    def _pin(self, value: Value) -> Placement | None:
        """Where a checkpoint's weight or a KV cache has to stay. What is computed is small: it may be there
        twice."""
        held = isinstance(value, Weight) and any(checkpoint_names(value.recipe))
        stays = self.pinned and (held or value.state)
        return value.placement[self.index] if stays else None

    def _all(self, op: Op) -> list[Strategy]:
        _, taken = self.earlier.op(op)
        tokens = by_sequence(self.axis) or self.prices.topology.tokens_sharded
        found = [
            s
            for s in strategies(op, self.axis, self.ranks, tokens=tokens, taken=taken)
            if all(map(self.earlier.keeps_whole, (*op.inputs, *op.outputs), (*s.takes, *s.gives)))
        ]
        sharded = [s for s in found if s.factor]
        if any(v.state for v in op.inputs):  # a KV cache is held whole only if it must be
            return sharded or found
        weights = [i for i, v in enumerate(op.inputs) if isinstance(v, Weight)]
        with_sequences = by_sequence(self.axis) and not any(v.routed for v in op.inputs)
        if with_sequences or not weights or not self.prices.is_product(op):
            return found
        # ranks of such an axis are there to share the matrices out: none is held whole to share out tokens;
        # nor are experts, most of a model, on any
        cut = [s for s in sharded if any(isinstance(s.takes[i], Shard) for i in weights)]
        return [s for s in found if s in cut or not s.factor] if cut else found

    def op_cost(self, op: Op, strategy: Strategy) -> float:
        """Of computing it, by itself."""
        parts, _ = self.earlier.op(op)
        weights = [i for i, v in enumerate(op.inputs) if isinstance(v, Weight)]
        held = min((self.earlier.parts(op.inputs[i]) for i in weights), default=1)
        cut = all(isinstance(strategy.takes[i], Shard) for i in weights)
        own = self.ranks if strategy.factor else 1
        return self.prices.op(op, parts * own, held * (own if cut else 1))

    def bring(
        self, value: Value, wanted: Placement, have: tuple[Placement, ...]
    ) -> tuple[float, tuple[Placement, ...]]:
        """The cost of having `value` as `wanted` where it has been brought to `have` so far, and what that
        becomes."""
        key = (id(value), have, wanted)
        if key not in self.brought:
            self.brought[key] = self._brought(value, wanted, have)
        return self.brought[key]

    def _brought(
        self, value: Value, wanted: Placement, have: tuple[Placement, ...]
    ) -> tuple[float, tuple[Placement, ...]]:
        """Weights are cut at build: what costs is to hold them."""
        if wanted in have:
            return 0.0, have
        parts = self.earlier.parts(value)
        if isinstance(value, Weight):
            held = parts * (1 if wanted == Replicate() else self.ranks)
            cost = math.inf if isinstance(wanted, Partial) else self.prices.resident(value, held)
            return cost, tuple(sorted((*have, wanted), key=str))
        if value.state:  # a KV cache lies as its first op wants it
            return (math.inf, have) if have else (0.0, (wanted,))
        source, *others = have or (Replicate(),)  # every rank has the batch arrays
        cost = self.prices.move(value, source, wanted, self.ranks, parts)
        return cost, (source, *sorted((*others, wanted), key=str))

    def _outputs_cost(self, state: State) -> float:
        live = dict(state)
        return sum(self.bring(v, Replicate(), live.get(id(v), ()))[0] for v in self.graph.outputs)

    # --- why not ---

    def _no_way(self, op: Op, states: Sequence[State]) -> str:
        """Which input keeps the op from being placed: where it lies, where it comes from, what is wanted, and
        what would be legal."""
        said = f"{op.kind} -> {op.outputs[0]!r} cannot be placed on {self.axis}={self.ranks}"
        for index, value in enumerate(op.inputs):
            found = {p for s in states for p in dict(s).get(id(value), (Replicate(),))[:1]}
            wanted = dict.fromkeys(s.takes[index] for s in self.options(op))
            if isinstance(value, Weight) or any(collective_of(f, w) for f in found for w in wanted):
                continue
            maker = self.made_by.get(id(value))
            comes = f"{maker.kind} ({maker.source}) gives it as" if maker else "it lies as"
            legal = {p for f in found for p in self._shardings(value) if collective_of(f, p)}
            return (
                f"{said}: it takes {value!r} as {_either(wanted)}, but {comes} {_either(found)}, and no "
                f"collective leads there; legal would be {_either(legal)}"
            )
        return f"{said}: no way leads from where its inputs lie to what its rule allows: {rule_of(op).text}"

    def _shardings(self, value: Value) -> list[Placement]:
        dims = [i for i, d in enumerate(value.shape) if isinstance(d, int) and d % self.ranks == 0]
        return [Replicate(), *(Shard(dim) for dim in dims)]


def without_dominated(paths: dict[State, Path]) -> dict[State, Path]:
    """Without the states that another makes needless: one where the same values come from the same
    placements, brought to all of these and maybe to more, at no greater cost."""

    def covers(a: State, b: State) -> bool:
        return len(a) == len(b) and all(
            v == w and have[0] == want[0] and set(have) >= set(want)
            for (v, have), (w, want) in zip(a, b, strict=True)
        )

    kept: dict[State, Path] = {}
    for state, path in sorted(
        paths.items(), key=lambda item: (item[1].cost, -sum(len(p) for _, p in item[0]))
    ):
        if not any(covers(better, state) for better in kept):
            kept[state] = path
    return kept


def renamed(state: State, old: int, new: int) -> State:
    """The state with one value under another id, sorted."""
    return tuple(sorted((new if value == old else value, placements) for value, placements in state))


def _either(placements: Sequence[Placement] | set[Placement] | dict[Placement, None]) -> str:
    return " or ".join(sorted(map(str, placements)))
