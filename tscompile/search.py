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
from tscompile.ir import Graph, Op, Value, Weight
from tscompile.mesh import by_position, by_sequence
from tscompile.placement import Owned, Partial, Placement, Replicate, Shard
from tscompile.price import Prices, collective_of
from tscompile.recipe import checkpoint_names
from tscompile.segments import NONE, Segment, Segments, sorted_attrs
from tscompile.sharding import Strategy, Taken, boundary_on, chosen, rows_shared, rule_of, strategies
from tscompile.states import (
    NOWHERE,
    PLACES,
    Live,
    Picker,
    State,
    covers,
    number_of,
    picker,
    renamed,
    without_dominated,
)

MAX_STATES = 256  # kept after each op, the cheapest
NOISE_S = 1e-12  # of sums of costs
CROSSING = NONE  # in a solved segment: the value that came into it, or leaves it

# A strategy's own cost, it, and the numbers of what it takes and gives
Priced: TypeAlias = tuple[float, Strategy, State, State]
Ways: TypeAlias = dict[State, tuple[float, Strategy, State]]  # cost so far, the last op's strategy, before it


@dataclass(frozen=True)
class Solved:
    """What came of a segment. ends: a last state -> cost, the state before the segment that led there, its
    ops' strategies."""

    live: Live
    ends: dict[State, tuple[float, State, tuple[Strategy, ...]]]


@dataclass(frozen=True)
class Before:
    """Where a segment begins. costs: of the states there, over the cheapest one's. best: of the path that was
    found to be the cheapest in the end."""

    live: Live
    costs: dict[State, float]
    best: State

    def recurs_in(self, later: Before) -> bool:
        """Whether further segments like those between here and there would be placed like them, however many
        they are. They would, where no state has come nearer to the path's own: costs that are nowhere less
        lead to costs that are nowhere less, and the path's would stay as they are."""
        own = later.costs[later.best] - self.costs[self.best]
        if (self.live, self.best) != (later.live, later.best) or abs(own) > NOISE_S:
            return False
        return all(
            any(covers(other, state) and self.costs[other] <= cost + NOISE_S for other in self.costs)
            for state, cost in later.costs.items()
        )


Known: TypeAlias = dict[object, Solved]  # by what a segment is; for searches at the same prices


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
        known: Known | None = None,
    ) -> None:
        """pinned: weights and KV caches stay where they are. known: what other searches have solved, at the
        same prices and on graphs of the same model."""
        self.graph, self.axis, self.ranks, self.prices = graph, axis, ranks, prices
        self.earlier = earlier or Earlier()
        self.index = graph.mesh.names.index(axis)
        self.pinned = pinned
        self.known = {} if known is None else known
        self.cost = math.inf  # of what best() found
        self.found: list[Strategy] = []  # by best(): one an op
        self.passed: list[Before] = []  # and where each segment began
        self.solved = 0  # segments that were not like one before
        self.segments = Segments(graph)
        self.last_use = self.segments.last_use
        self.made_by = {id(v): op for op in graph.ops for v in op.outputs}
        self.brought: dict[tuple[str, int, int], tuple[float, int]] = {}

    def best(self) -> list[Strategy]:
        """One strategy an op, the cheapest together. CompileError if there is none."""
        live, totals = Live(), {State(): 0.0}
        chain, starts = list[Solved](), list[tuple[Live, dict[State, float]]]()
        asked = (by_sequence(self.axis), by_position(self.axis), self.ranks, self.pinned)
        for segment in self.segments.all():
            base = min(totals.values())
            before = {state: round(cost - base, 15) for state, cost in totals.items()}
            live = renamed(live, segment.comes, CROSSING)
            signature = self.segments.signature(segment, self._of_value, self._of_op)
            key = (asked, signature, live, frozenset(before.items()))
            if key not in self.known:
                self.known[key] = self._solve(segment, live, before)
                self.solved += 1
            chain.append(self.known[key])
            starts.append((live, before))
            live = renamed(chain[-1].live, CROSSING, segment.leaves)
            totals = {state: base + cost for state, (cost, *_) in chain[-1].ends.items()}
        costs = [
            (cost + self._outputs_cost(live, state), i) for i, (state, cost) in enumerate(totals.items())
        ]
        self.cost, index = min(costs)
        state, chunks = list(totals)[index], list[tuple[Strategy, ...]]()
        for solved, (live, before) in zip(reversed(chain), reversed(starts), strict=True):
            _, state, strategies = solved.ends[state]
            chunks.append(strategies)
            self.passed.insert(0, Before(live, before, state))
        self.found = [strategy for chunk in reversed(chunks) for strategy in chunk]
        return self.found

    # --- segments ---

    def _of_value(self, value: Value) -> object:
        return self.earlier.parts(value), self._pin(value), id(value) in self.earlier.moved

    def _of_op(self, op: Op) -> object:
        said = boundary_on(op, self.axis) if op.kind == "boundary" else sorted_attrs(op)
        return said, self.earlier.op(op)

    def _solve(self, segment: Segment, live: Live, before: dict[State, float]) -> Solved:
        """live, before: where what it reads lies, the crossing value under that name."""
        live = renamed(live, CROSSING, segment.comes)
        steps: list[Ways] = []
        costs = before
        for index in range(segment.start, segment.stop):
            live, ways = self._step(index, live, costs)
            steps.append(ways)
            costs = {state: cost for state, (cost, *_) in ways.items()}
        live = renamed(live, segment.leaves, CROSSING)
        order = sorted(range(len(live)), key=live.__getitem__)  # so that equal states are equal
        pick, ends = picker(order), {}
        for last, cost in without_dominated(costs).items():
            state, found = last, list[Strategy]()
            for ways in reversed(steps):
                _, strategy, state = ways[state]
                found.append(strategy)
            ends[pick(last)] = cost, state, tuple(reversed(found))
        return Solved(tuple(live[i] for i in order), ends)

    # --- one op ---

    def _step(self, index: int, live: Live, costs: dict[State, float]) -> tuple[Live, Ways]:
        """What is live after the op, and the cheapest way to each state that it leads to."""
        op = self.graph.ops[index]
        reads = dict.fromkeys(repr(v) for v in op.inputs)
        here = [i for i, name in enumerate(live) if name in reads]
        others = [i for i, name in enumerate(live) if name not in reads and self.last_use[name] > index]
        touched = [*(live[i] for i in here), *(name for name in reads if name not in live)]
        touched += [repr(v) for v in op.outputs]
        stay = picker([i for i, name in enumerate(touched) if self.last_use.get(name, -1) > index])
        of_inputs, of_others, options = picker(here), picker(others), self._priced(op)
        known: dict[State, list[tuple[float, Strategy, State]]] = {}  # by where the inputs lie
        after: Ways = {}
        for state, cost in costs.items():
            inputs, rest = of_inputs(state), of_others(state)
            if inputs not in known:
                known[inputs] = self._ways(
                    op, dict(zip((live[i] for i in here), inputs, strict=True)), options, stay
                )
            for more, strategy, reached in known[inputs]:
                key = rest + reached
                if key not in after or cost + more < after[key][0]:
                    after[key] = cost + more, strategy, state
        if not after:
            raise CompileError(self._no_way(op, live, list(costs)), op.source)
        if len(after) > MAX_STATES:
            after = dict(sorted(after.items(), key=lambda item: item[1][0])[:MAX_STATES])
        return (*(live[i] for i in others), *stay(tuple(touched))), after

    def _priced(self, op: Op) -> list[Priced]:
        return [
            (
                self.op_cost(op, strategy),
                strategy,
                tuple(number_of((placement,)) for placement in strategy.takes),
                tuple(number_of((placement,)) for placement in strategy.gives),
            )
            for strategy in self.options(op)
        ]

    def _ways(
        self, op: Op, here: dict[str, int], options: list[Priced], stay: Picker
    ) -> list[tuple[float, Strategy, State]]:
        """(cost, strategy, where the op's inputs and outputs lie then, those that are read again): the
        cheapest to each such state. here: where its inputs lie."""
        found: Ways = {}
        for own, strategy, takes, gives in options:
            cost, lies = own, dict(here)
            for value, wanted in zip(op.inputs, takes, strict=True):
                more, lies[repr(value)] = self._bring(value, wanted, lies.get(repr(value), NOWHERE))
                cost += more
            lies.update((repr(v), given) for v, given in zip(op.outputs, gives, strict=True))
            reached = stay(tuple(lies.values()))
            if cost < math.inf and (reached not in found or cost < found[reached][0]):
                found[reached] = cost, strategy, reached
        return list(found.values())

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
        found = [
            s
            for s in strategies(op, self.axis, self.ranks, taken)
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
        own = self._shares(op, strategy) if strategy.factor else 1
        return self.prices.op(op, parts * own, held * (self.ranks if cut and strategy.factor else 1))

    def _shares(self, op: Op, strategy: Strategy) -> float:
        """How many times less the op is for the rank that has most of it: of few tokens, some ranks have
        none."""
        rows = rows_shared(op, strategy)
        return self.prices.shares(rows, self.ranks) if rows else self.ranks

    def bring(self, value: Value, wanted: Placement, have: tuple[Placement, ...]) -> float:
        """The cost of having `value` as `wanted` where it has been brought to `have` so far."""
        return self._bring(value, number_of((wanted,)), number_of(have))[0]

    def _bring(self, value: Value, wanted: int, have: int) -> tuple[float, int]:
        """That, and what it has been brought to then."""
        key = (repr(value), wanted, have)
        if key not in self.brought:
            cost, places = self._brought(value, PLACES[wanted][0], PLACES[have])
            self.brought[key] = cost, number_of(places)
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

    def _outputs_cost(self, live: Live, state: State) -> float:
        lies = dict(zip(live, state, strict=True))
        return sum(self.bring(v, Replicate(), PLACES[lies.get(repr(v), NOWHERE)]) for v in self.graph.outputs)

    # --- why not ---

    def _no_way(self, op: Op, live: Live, states: Sequence[State]) -> str:
        """Which input keeps the op from being placed: where it lies, where it comes from, what is wanted, and
        what would be legal."""
        said = f"{op.kind} -> {op.outputs[0]!r} cannot be placed on {self.axis}={self.ranks}"
        for index, value in enumerate(op.inputs):
            lies = [PLACES[s[live.index(repr(value))]] for s in states] if repr(value) in live else [()]
            found = {places[0] if places else Replicate() for places in lies}
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


def _either(placements: Sequence[Placement] | set[Placement] | dict[Placement, None]) -> str:
    return " or ".join(sorted(map(str, placements)))
