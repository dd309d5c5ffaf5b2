"""reshard: redistributes where placements differ, boundaries gone."""

from __future__ import annotations

import itertools

import golden
import pytest

from tscompile.ir import Graph, Sym, Value
from tscompile.mesh import Mesh
from tscompile.passes import propagate, reshard
from tscompile.placement import Partial, Replicate, Shard, parse_placement


def test_golden(request: pytest.FixtureRequest) -> None:
    build = golden.after("propagate", reshard.run)
    golden.check("reshard", build.graph, request)
    kinds = {op.kind for op in build.graph.ops}
    assert "redistribute" in kinds
    assert "boundary" not in kinds


def test_one_rank_gets_none() -> None:
    build = golden.after("canonicalize", propagate.run, Mesh())
    before = [op.kind for op in build.graph.ops if op.kind != "boundary"]
    reshard.run(build)
    assert [op.kind for op in build.graph.ops] == before


def test_one_redistribute_a_value_and_placement() -> None:
    moves = [op for op in golden.after("propagate", reshard.run).graph.ops if op.kind == "redistribute"]
    keys = [(op.inputs[0].name, op.attrs["target"]) for op in moves]
    assert len(keys) == len(set(keys))


def moves(here: str, wanted: str) -> list[str]:
    """The redistributes between two placements of a value [T, 16] on mesh(dp=2, ep=2, tp=2)."""
    placements = [tuple(map(parse_placement, text.split())) for text in (here, wanted)]
    mesh = Mesh((("dp", 2), ("ep", 2), ("tp", 2)))
    value = Value("x", (Sym("T"), 16), "f32", False, placements[0])
    resharder = reshard._Resharder(Graph("g", mesh))
    assert resharder.bring(value, placements[1], None).placement == placements[1]
    return [f"{op.attrs['axis']}:{op.attrs['source']}->{op.attrs['target']}" for op in resharder.ops]


@pytest.mark.parametrize(
    ("here", "wanted", "expected"),
    [
        # the later axis holds parts of the earlier one's parts: it gathers first, and cuts last
        ("S(1) R S(1)", "R R R", ["tp:S(1)->R", "dp:S(1)->R"]),
        ("R R R", "S(1) S(1) S(1)", ["dp:R->S(1)", "ep:R->S(1)", "tp:R->S(1)"]),
        ("S(1) R S(1)", "R R S(1)", ["tp:S(1)->R", "dp:S(1)->R", "tp:R->S(1)"]),
        ("R R S(1)", "R S(1) S(1)", ["tp:S(1)->R", "ep:R->S(1)", "tp:R->S(1)"]),
        ("R S(1) P(sum)", "R S(1) S(1)", ["tp:P(sum)->S(1)"]),
        # each in the other's way
        ("S(1) R S(0)", "S(0) R S(1)", ["tp:S(0)->R", "dp:S(1)->S(0)", "tp:R->S(1)"]),
    ],
)
def test_one_dim_over_several_axes(here: str, wanted: str, expected: list[str]) -> None:
    assert moves(here, wanted) == expected


def test_every_placement_leads_to_every_other() -> None:
    """Over three axes, dims shared by several among them."""
    graph = Graph("g", Mesh((("dp", 2), ("ep", 2), ("tp", 2))))
    wanted = [Replicate(), Shard(0), Shard(1)]
    for here in itertools.product([*wanted, Partial()], repeat=3):
        for there in itertools.product(wanted, repeat=3):
            resharder = reshard._Resharder(graph)
            value = Value("x", (8, 8), "f32", False, here)
            assert resharder.bring(value, there, None).placement == there
            assert len(resharder.ops) <= 6
