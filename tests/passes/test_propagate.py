"""propagate: placements by rule and price."""

from __future__ import annotations

from collections import Counter

import golden
import pytest

from tscompile.ir import Graph, Weight
from tscompile.mesh import Mesh
from tscompile.parser import parse
from tscompile.passes import propagate
from tscompile.placement import Replicate
from tscompile.price import Prices


@pytest.fixture(autouse=True)
def _prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden model is tiny: on links this fast, splitting it pays as it does for real models on real
    ones."""
    monkeypatch.setattr(
        propagate, "prices_of", lambda _: golden.prices(base_s=2e-7, bytes_per_s=2e10, tokens=8)
    )


def test_golden(request: pytest.FixtureRequest) -> None:
    golden.check("propagate", golden.after("canonicalize", propagate.run).graph, request)


def test_one_rank_replicates_everything() -> None:
    graph = golden.after("canonicalize", propagate.run, Mesh()).graph
    assert {value.placement for value in graph.values()} == {(Replicate(),)}


def placed(body: str, ranks: int) -> Graph:
    """A graph of one input, from text, placed over tp=`ranks`."""
    build = golden.build_of(parse(f"graph g mesh(tp={ranks}) {{ input %token_ids: i32[T]\n{body} }}"))
    propagate.run(build)
    return build.graph


def placements(graph: Graph) -> dict[str, str]:
    return {value.name: str(value.placement[0]) for value in graph.values()}


MLP = """
    weight @table: f32[32000, 1024] = checkpoint("table")
    weight @up: f32[4096, 1024] = checkpoint("up")
    weight @down: f32[1024, 4096] = checkpoint("down")
    %x: f32[T, 1024] = embedding(%token_ids, @table; vocab_axis="")
    %a: f32[T, 1024] = boundary(%x; module="mlp", placements="tp:R")
    %h: f32[T, 4096] = linear(%a, @up)
    %s: f32[T, 4096] = silu(%h)
    %y: f32[T, 1024] = linear(%s, @down)
    %b: f32[T, 1024] = boundary(%y; module="mlp", placements="tp:R")
    output %b"""


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_columns_then_rows(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLP as Megatron splits it: columns, rows, one sum; and the vocabulary of a large embedding."""
    monkeypatch.setattr(propagate, "prices_of", lambda _: Prices.of("cpu-avx2", 64))
    found = placements(placed(MLP, ranks))
    assert (found["up"], found["h"], found["s"], found["down"], found["y"]) == (
        "S(0)",
        "S(1)",
        "S(1)",
        "S(1)",
        "P(sum)",
    )
    assert found["table"] in ("S(0)", "S(1)")


def test_a_size_that_does_not_divide_is_left_whole() -> None:
    """Tokens may be shared out whatever the sizes are."""
    found = placements(
        placed(MLP.replace("4096", "4097").replace("1024", "1023").replace("32000", "32001"), 2)
    )
    assert {found[weight] for weight in ("table", "up", "down")} == {"R"}
    assert set(found.values()) == {"R", "S(0)"}


def test_a_tied_table_is_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propagate, "prices_of", lambda _: Prices.of("cpu-avx2", 64))
    graph = placed(
        """weight @table: f32[32000, 1024] = checkpoint("table")
        %x: f32[T, 1024] = embedding(%token_ids, @table; vocab_axis="")
        %y: f32[T, 32000] = linear(%x, @table)
        output %y""",
        4,
    )
    assert [str(w.placement[0]) for w in graph.weights] == ["S(0)"]
    assert Counter(type(v) for v in graph.values())[Weight] == 1


def test_an_authors_placement_is_kept() -> None:
    graph = placed(MLP.replace('placements="tp:R")\n    %h', 'placements="tp:S(1)")\n    %h'), 4)
    assert placements(graph)["a"] == "S(1)"
