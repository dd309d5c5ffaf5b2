"""propagate: every value gets a placement on every axis of the mesh.

Takes a graph whose boundaries say what modules take and give. Gives the same graph with `placement` set on
each value: of all ways in which each op's rule (factor form, from the registry) lets it lie over the ranks,
those that together cost least for a step of the size asked for: computing, weights held, and the collectives
between two placements that differ (tscompile/search.py). Axis by axis, in the mesh's order; of what one axis
has cut (but tokens, and what ids look up) the next may cut each part further. A weight that two ops want
placed differently is there twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from tscompile.build import Build, Options
from tscompile.ir import Graph, Weight, replicated
from tscompile.mesh import by_stage
from tscompile.placement import Placement
from tscompile.price import Prices
from tscompile.reasons import reasons
from tscompile.search import Search, settled
from tscompile.sharding import Strategy


def run(build: Build) -> None:
    if build.mesh.num_ranks > 1:
        prices = prices_of(build.options)
        place(build, prices)
        build.placed |= {"tokens": dict(prices.sizes)["T"], "ops": reasons(build.graph, prices)}
    else:
        for value in build.graph.values():
            value.placement = replicated(build.mesh)


def prices_of(options: Options) -> Prices:
    """Of the first target, for a step of the tokens that the placement is meant for."""
    from tscompile.kernels.host import best_target

    target = options.targets[0] if options.targets else best_target()
    return Prices.of(target, options.tokens or options.max_tokens, options.max_seqs)


def place(build: Build, prices: Prices) -> float:
    """Sets every placement. The predicted seconds of a step, as the last axis was priced."""
    graph, cost = build.graph, 0.0
    for value in graph.values():
        value.placement = value.placement or replicated(graph.mesh)
    for index, (axis, ranks) in enumerate(graph.mesh.axes):
        if ranks > 1 and not by_stage(axis):
            search = Search(graph, axis, ranks, prices, settled(graph, index))
            found, cost = search.best(), search.cost
            assign(graph, index, found)
            build.notes += _replicated_weights(graph, axis, ranks, found, prices)
    return cost


def assign(graph: Graph, index: int, found: Sequence[Strategy]) -> None:
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
                        where = "".join(letter for letter in str(wanted) if letter.isalnum())
                        name = f"{value.name}.{graph.mesh.names[index]}-{where}"
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


def _replicated_weights(
    graph: Graph, axis: str, ranks: int, found: Sequence[Strategy], prices: Prices
) -> list[str]:
    """A note if matrices that are multiplied lie whole on every rank."""
    whole = [
        f"{value.name} {list(value.shape)}"
        for op, strategy in zip(graph.ops, found, strict=True)
        for value in op.inputs
        if isinstance(value, Weight) and not strategy.factor and prices.is_product(op)
    ]
    return (
        [f"{axis}={ranks}: every rank holds {', '.join(whole[:3])} whole ({len(whole)} weights)"]
        if whole
        else []
    )
