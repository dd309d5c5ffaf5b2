"""propagate: every value gets a placement on every axis of the mesh.

Takes a graph whose boundaries say what modules take and give. Gives the same graph with `placement` set on
each value: of all ways in which each op's rule (factor form, from the registry) lets it lie over the ranks,
those that together cost least for a step of the size asked for: computing, weights held, and the collectives
between two placements that differ (tscompile/search.py). Axis by axis, in the mesh's order; of what one axis
has cut (but tokens, and what ids look up) the next may cut each part further. A weight that two ops want
placed differently is there twice.

With weights and KV caches where that leaves them, all else is placed anew for the largest step and for a step
of one token; where these differ, buckets of tokens are halved until it is known which sizes are placed alike.
So a large step may scatter a sum that a small one reduces whole.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from tscompile.build import Build, Options
from tscompile.ir import Graph, Op, Weight, replicated
from tscompile.mesh import by_stage
from tscompile.placement import Placement, Replicate, Stage
from tscompile.price import Prices
from tscompile.reasons import reasons
from tscompile.recipe import checkpoint_names
from tscompile.search import Known, Search, settled
from tscompile.sharding import Strategy


def run(build: Build) -> None:
    if build.mesh.num_ranks > 1:
        searches = place(build, prices_of(build.options))
        build.notes += [note for search in searches for note in whole_weights(search)]
        place_buckets(build)
    else:
        for value in build.graph.values():
            value.placement = replicated(build.mesh)


def prices_of(options: Options) -> Prices:
    """Of the first target, for a step of the tokens that the placement is meant for."""
    from tscompile.kernels.host import best_target

    target = options.targets[0] if options.targets else best_target()
    return Prices.of(target, options.tokens or options.max_tokens, options.max_seqs)


def place(build: Build, prices: Prices, known: Known | None = None) -> list[Search]:
    """Sets every placement. The searches, of one axis after the other. known: as they share it with others
    at the same prices."""
    graph, searches = build.graph, list[Search]()
    for value in graph.values():
        value.placement = value.placement or replicated(graph.mesh)
    for index, (axis, ranks) in enumerate(graph.mesh.axes):
        if ranks > 1 and not by_stage(axis):
            search = Search(graph, axis, ranks, prices, settled(graph, index), known=known)
            assign(graph, index, search.best())
            searches.append(search)
    return searches


def place_buckets(build: Build) -> None:
    """Sets build.smaller, and places build.graph, which says where weights and KV caches lie, for the largest
    step."""
    most = build.options.max_tokens
    sizes = [*itertools.takewhile(lambda size: size < most, (2**i for i in itertools.count())), most]
    known: dict[int, Graph] = {}

    def at(tokens: int) -> Graph:
        if tokens not in known:
            known[tokens] = build.graph.copy()
            replace(known[tokens], _prices_at(build.options, tokens))
        return known[tokens]

    def last(low: int, high: int) -> list[int]:
        """Of sizes[low:high], each after which another placement begins."""
        if alike(at(sizes[low]), at(sizes[high])):
            return []
        middle = (low + high) // 2
        return last(low, middle) + last(middle, high) if middle > low else [sizes[low]]

    build.smaller = {tokens: at(tokens) for tokens in last(0, len(sizes) - 1)}
    build.graph = at(most)
    for tokens, graph in build.buckets.items():
        pinned = tokens != (build.options.tokens or most)
        found = reasons(graph, _prices_at(build.options, tokens), pinned=pinned)
        build.placed["buckets"].append({"max_tokens": tokens, "ops": found})


def _prices_at(options: Options, tokens: int) -> Prices:
    return prices_of(dataclasses.replace(options, tokens=tokens))


def replace(graph: Graph, prices: Prices, known: Known | None = None) -> list[Search]:
    """Places a placed graph anew, but for its weights and KV caches. The searches, as `place`'s."""
    searches: list[Search] = []
    searched = [(i, axis, n) for i, (axis, n) in enumerate(graph.mesh.axes) if n > 1 and not by_stage(axis)]
    for value in graph.values():
        if not isinstance(value, Weight) and not value.state:
            for index, *_ in searched:
                value.placement = _with(value.placement, index, Replicate())
    for index, axis, ranks in searched:
        search = Search(graph, axis, ranks, prices, settled(graph, index), pinned=True, known=known)
        assign(graph, index, search.best())
        searches.append(search)
    return searches


def alike(one: Graph, other: Graph) -> bool:
    """Whether two copies of a graph are placed alike."""
    pairs = zip(one.values(), other.values(), strict=True)
    return all(a.placement == b.placement for a, b in pairs)


def assign(graph: Graph, index: int, found: Sequence[Strategy]) -> None:
    """Writes the strategies into values' placements. A weight wanted in two ways becomes two; so does one
    that is computed, and lies otherwise than before, as it may in steps of another size."""
    twins: dict[tuple[int, Placement], Weight] = {}
    seen: set[int] = set()
    weights: list[Weight] = []
    for op, strategy in zip(graph.ops, found, strict=True):
        for place, (value, wanted) in enumerate(zip(op.inputs, strategy.takes, strict=True)):
            if isinstance(value, Weight):
                if (id(value), wanted) not in twins:
                    twin = value
                    computed = not (any(checkpoint_names(value.recipe)) or isinstance(wanted, Stage))
                    if id(value) in seen or (computed and value.placement[index] != wanted):
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


def whole_weights(search: Search, count: Callable[[Op], int] = lambda _: 1) -> list[str]:
    """A note if matrices that are multiplied lie whole on every rank. count: how many ops one stands for."""
    whole = [
        (f"{value.name} {list(value.shape)}", count(op))
        for op, strategy in zip(search.graph.ops, search.found, strict=True)
        for value in op.inputs
        if isinstance(value, Weight) and len(value.shape) > 1
        if not strategy.factor and search.prices.is_product(op)
    ]
    if not whole:
        return []
    names, number = ", ".join(name for name, _ in whole[:3]), sum(count for _, count in whole)
    return [f"{search.axis}={search.ranks}: every rank holds {names} whole ({number} weights)"]
