"""search: the cheapest placement, repeated layers solved once, and what the size of a step changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import count, pairwise

import golden
import pytest
from layered import layered
from routed import routed

from tscompile.errors import InternalError
from tscompile.ir import Graph
from tscompile.mesh import token_starts
from tscompile.passes import collectives, localize, propagate, reshard
from tscompile.price import Prices
from tscompile.search import Search
from tscompile.segments import Segments
from tscompile.topology import Algorithm, Link, known_targets, topology_of
from tscompile.verify import verify


def placed(graph: Graph, prices: Prices) -> Counter[str]:
    """The collectives of the graph, placed at these prices, counted by kind."""
    build = golden.build_of(graph)
    propagate.place(build, prices)
    for step in (reshard, collectives, localize):
        step.run(build)
        verify(build.graph)
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "ragged_all_to_all")
    return Counter(op.kind for op in build.graph.ops if op.kind in kinds)


def test_layers_that_are_alike_are_solved_once() -> None:
    prices = Prices.of("sm_100a", 64)
    few, many = (Search(layered(n, "mesh(tp=8)"), "tp", 8, prices) for n in (6, 60))
    short, long = few.best(), many.best()
    assert few.solved == many.solved
    layer = (len(long) - len(short)) // 54
    assert long[: 3 * layer] == short[: 3 * layer]
    assert long[-layer:] == short[-layer:]


def test_solving_once_finds_what_solving_each_does(monkeypatch: pytest.MonkeyPatch) -> None:
    prices, graph = Prices.of("sm_90a", 8192), layered(8, "mesh(tp=4)")
    once = Search(graph, "tp", 4, prices)
    found = once.best()
    fresh = count()
    monkeypatch.setattr(Segments, "signature", lambda *_: next(fresh))
    each = Search(graph, "tp", 4, prices)
    assert each.best() == found
    assert each.cost == pytest.approx(once.cost, rel=1e-9)
    assert each.solved > once.solved


def test_two_sums_a_layer_as_megatron_has() -> None:
    """2 all_reduces a layer (Megatron-LM, section 3), and the logits gathered. The embedding's table is small
    beside what summing its rows would cost: every rank has it."""
    assert placed(layered(8, "mesh(tp=8)"), Prices.of("sm_100a", 16)) == {"all_reduce": 16, "all_gather": 1}


def test_many_tokens_are_scattered_where_that_moves_less() -> None:
    """A ring's sum moves 2 x 4 bytes an element; scattering the sum and gathering it as bf16, 4 + 2."""
    prices = Prices.of("sm_100a", 16)
    ring = Link(4e11, (Algorithm("ring", 6e-6, 6e-7),))
    prices = replace(prices, topology=replace(prices.topology, host=ring))
    assert "reduce_scatter" not in placed(layered(8, "mesh(tp=8)"), prices)
    many = replace(prices, sizes=tuple((dict(prices.sizes) | {"T": 8192}).items()))
    found = placed(layered(8, "mesh(tp=8)"), many)
    assert found["reduce_scatter"] >= 8
    assert found["all_reduce"] <= 1, "but for the last layer, whose sum the head takes whole"


@pytest.mark.parametrize(("ranks", "k", "moves"), [(8, 1, 2), (8, 2, 2), (8, 8, 0), (4, 1, 2), (2, 8, 0)])
def test_rows_move_where_tokens_have_few_experts(ranks: int, k: int, moves: int) -> None:
    """A rank sends k rows for each nth of the tokens and takes as many back; else it takes a row of every
    token, and scatters the sum of what it gives. Not in small steps, where only latency counts."""
    graph = routed(f"mesh(ep={ranks})", k)
    assert placed(graph, Prices.of("sm_90a", 8192))["ragged_all_to_all"] == moves * 2
    if moves:
        counts = [v for v in graph.values() if v.name.startswith("counts.0")]
        shapes = {v.name: str(v.shape[0]) for v in graph.values() if v.name.startswith(("rows.0", "d.0"))}
        assert [v.shape for v in counts] == [(128,), (128 * ranks,), (128 // ranks,)]
        assert list(shapes.values()) == [
            f"{rows}{over}"
            for rows, over in zip(["R" if k == 1 else f"R*{k}"] * 4, ["/ep", "", "", "/ep"], strict=True)
        ]
    assert not placed(routed(f"mesh(ep={ranks})", k), Prices.of("sm_90a", 8))["ragged_all_to_all"]


def test_rows_move_in_large_steps_alone() -> None:
    """Over the same experts; which of them are a rank's own is a weight that is there twice."""
    build = golden.build_of(routed("mesh(ep=8)", 2), targets=("sm_90a",), max_tokens=8192)
    propagate.run(build)
    small, large = build.buckets.values()
    found = [{v.name: str(v.placement[0]) for v in graph.values()} for graph in (small, large)]
    assert [names["order.0"] for names in found] == ["S(0)", "S(0,T)"]
    assert [names["up.0"] for names in found] == ["S(0)", "S(0)"]
    assert [[w for w in names if w.startswith("numbers.0")] for names in found] == [
        ["numbers.0.ep-S0"],
        ["numbers.0"],
    ]


def test_sequences_stay_with_their_cache() -> None:
    graph = layered(2, "mesh(dp=4, tp=2)")
    placed(graph, Prices.of("sm_100a", 64))
    assert [str(p) for p in graph.states[0].placement] == ["O", "S(0)"]
    dims = {str(v.shape[0]) for v in graph.values() if v.name.startswith(("q", "t."))}
    assert "T/dp" in dims


@pytest.mark.parametrize("tokens", [1, 5, 8, 13])
def test_who_has_which_tokens(tokens: int) -> None:
    starts = token_starts("tp", 4, tokens, [], [])
    sizes = [b - a for a, b in pairwise(starts)]
    assert (starts[0], starts[-1], max(sizes)) == (0, tokens, -(-tokens // 4))
    assert sizes == sorted(sizes, reverse=True)


def test_who_has_which_sequences() -> None:
    assert token_starts("dp", 4, 9, [0, 2, 3, 9], [0, 2, 2]) == [0, 2, 2, 9, 9]
    with pytest.raises(InternalError, match="wanted these sorted"):
        token_starts("dp", 2, 9, [0, 2, 9], [1, 0])


@pytest.mark.parametrize("target", sorted(known_targets()))
def test_collectives_cost_more_the_more_they_move(target: str) -> None:
    machine = topology_of(target)
    for link in (machine.host, machine.network):
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
            costs = [link.best(kind, num_bytes, 8)[0] for num_bytes in (0, 2**10, 2**20, 2**30)]
            assert 0 < costs[0] < costs[1] < costs[2] < costs[3] < float("inf")
        assert link.best("all_reduce", 2**30, 8)[0] > link.best("reduce_scatter", 2**30, 8)[0]


@pytest.mark.parametrize(
    ("tokens", "up", "down"), [(16, "S(0) S(0)", "S(1) S(1)"), (8192, "R S(0)", "R S(1)")]
)
def test_an_mlp_over_two_axes(tokens: int, up: str, down: str) -> None:
    """dp and tp share its weights out between them, while reading these costs most; then tokens over dp, and
    the weights over tp alone."""
    graph = layered(3, "mesh(dp=2, tp=4)")
    placed(graph, Prices.of("sm_90a", tokens))
    found = {weight.name: " ".join(map(str, weight.placement)) for weight in graph.weights}
    assert (found["g.1"], found["u.1"], found["d.1"]) == (up, up, down)
