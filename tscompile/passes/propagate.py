"""propagate: every value gets a placement on every axis of the mesh.

Takes a graph whose boundaries say what modules take and give. Gives the same graph with `placement` set on
each value: of all ways in which each op's rule (factor form, from the registry) lets it lie over the ranks,
those that together cost least: computing, weights held, and the collectives between two placements that
differ. A dynamic program over the ops in order; its state is where the live values lie, so that modules'
boundaries keep it small. A weight that two ops want placed differently is there twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from tscompile.build import Build
from tscompile.errors import CompileError
from tscompile.ir import Graph, Op, Value, Weight, replicated
from tscompile.ops import lookup
from tscompile.placement import Partial, Placement, Replicate
from tscompile.price import Prices
from tscompile.sharding import Strategy, strategies

PRICES = Prices()
MAX_STATES = 256  # kept after each op, the cheapest

# id(live value) -> every placement that it has been brought to so far; sorted by value, so that equal states
# are equal
State: TypeAlias = tuple[tuple[int, tuple[Placement, ...]], ...]


@dataclass(frozen=True)
class Path:
    """A way to place the ops so far: what it costs, the last op's strategy, and the path before it."""

    cost: float
    strategy: Strategy | None = None
    before: Path | None = None


def run(build: Build) -> None:
    graph = build.graph
    for value in graph.values():
        value.placement = replicated(graph.mesh)
    for index, (axis, ranks) in enumerate(graph.mesh.axes):
        if ranks > 1:
            found = _Search(graph, axis, ranks).best()
            _assign(graph, index, found)
            build.notes += _replicated_weights(graph, axis, ranks, found)


@dataclass
class _Search:
    graph: Graph
    axis: str
    ranks: int
    last_use: dict[int, int] = field(default_factory=dict)

    def best(self) -> list[Strategy]:
        """One strategy an op, the cheapest together."""
        graph = self.graph
        self.last_use = {id(v): i for i, op in enumerate(graph.ops) for v in op.inputs}
        self.last_use.update({id(v): len(graph.ops) for v in graph.outputs})
        paths: dict[State, Path] = {(): Path(0.0)}
        for index, op in enumerate(graph.ops):
            paths = self._step(index, op, paths)
        ends = [dataclasses.replace(p, cost=p.cost + self._outputs_cost(state)) for state, p in paths.items()]
        path: Path | None = min(ends, key=lambda end: end.cost)
        found: list[Strategy] = []
        while path is not None and path.strategy is not None:
            found.append(path.strategy)
            path = path.before
        return found[::-1]

    def _step(self, index: int, op: Op, paths: dict[State, Path]) -> dict[State, Path]:
        options = [
            (s, PRICES.op(op, self.ranks if s.factor else 1)) for s in strategies(op, self.axis, self.ranks)
        ]
        after: dict[State, Path] = {}
        for state, path in paths.items():
            live = dict(state)
            for strategy, own in options:
                cost, reached = path.cost + own, dict(live)
                for value, wanted in zip(op.inputs, strategy.takes, strict=True):
                    cost += self._bring(value, wanted, reached)
                if cost == float("inf"):
                    continue
                for value, given in zip(op.outputs, strategy.gives, strict=True):
                    reached[id(value)] = (given,)
                key = tuple(sorted((v, p) for v, p in reached.items() if self.last_use.get(v, -1) > index))
                if key not in after or cost < after[key].cost:
                    after[key] = Path(cost, strategy, path)
        if not after:
            raise CompileError(
                f"{op.kind} -> {op.outputs[0]!r} cannot be placed on {self.axis}={self.ranks}: no way leads "
                "from where its inputs lie to what its rule allows: "
                f"{lookup(op.kind).factors(op.inputs, op.outputs, op.attrs).text}",
                op.source,
            )
        kept = sorted(after.items(), key=lambda item: item[1].cost)[:MAX_STATES]
        return dict(kept)

    def _bring(self, value: Value, wanted: Placement, live: dict[int, tuple[Placement, ...]]) -> float:
        """The cost of having `value` as `wanted`, noted in `live`. Weights are cut at build: what costs is to
        hold them."""
        have = live.get(id(value), ())
        if wanted in have:
            return 0.0
        if isinstance(value, Weight):
            live[id(value)] = tuple(sorted((*have, wanted), key=str))
            if isinstance(wanted, Partial):
                return float("inf")
            return PRICES.resident(value, 1 if wanted == Replicate() else self.ranks)
        # an input of the graph: every rank has the batch arrays; a KV cache lies as its first op wants it
        if not have:
            live[id(value)] = (wanted,)
            return 0.0 if value.state or wanted == Replicate() else float("inf")
        live[id(value)] = (have[0], *sorted((*have[1:], wanted), key=str))
        return float("inf") if value.state else PRICES.move(value, have[0], wanted, self.ranks)

    def _outputs_cost(self, state: State) -> float:
        live = dict(state)
        return sum(self._bring(v, Replicate(), live) for v in self.graph.outputs)


def _assign(graph: Graph, index: int, found: Sequence[Strategy]) -> None:
    """Writes the strategies into values' placements. A weight wanted in two ways becomes two."""
    twins: dict[tuple[int, Placement], Weight] = {}
    seen: set[int] = set()
    weights: list[Weight] = []
    for op, strategy in zip(graph.ops, found, strict=True):
        for place, (value, wanted) in enumerate(zip(op.inputs, strategy.takes, strict=True)):
            if isinstance(value, Weight):
                if (id(value), wanted) not in twins:
                    twin = value
                    if id(value) in seen:
                        name = f"{value.name}.twin{len(twins)}"
                        twin = Weight(
                            name, value.shape, value.dtype, False, value.placement, recipe=value.recipe
                        )
                    twin.placement = _with(value.placement, index, wanted)
                    twins[id(value), wanted] = twin
                    weights.append(twin)
                    seen.add(id(value))
                op.inputs[place] = twins[id(value), wanted]
            elif value.state:
                value.placement = _with(value.placement, index, wanted)
        for value, given in zip(op.outputs, strategy.gives, strict=True):
            value.placement = _with(value.placement, index, given)
    graph.weights = weights


def _with(placement: tuple[Placement, ...], index: int, new: Placement) -> tuple[Placement, ...]:
    return (*placement[:index], new, *placement[index + 1 :])


def _replicated_weights(graph: Graph, axis: str, ranks: int, found: Sequence[Strategy]) -> list[str]:
    """A note if matrices that are multiplied lie whole on every rank."""
    whole = [
        f"{value.name} {list(value.shape)}"
        for op, strategy in zip(graph.ops, found, strict=True)
        for value in op.inputs
        if isinstance(value, Weight) and not strategy.factor and PRICES.is_product(op)
    ]
    return (
        [f"{axis}={ranks}: every rank holds {', '.join(whole[:3])} whole ({len(whole)} weights)"]
        if whole
        else []
    )
