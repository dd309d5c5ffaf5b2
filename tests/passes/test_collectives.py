"""collectives: what realises each pair of placements."""

from __future__ import annotations

import golden
import pytest
from routed import routed

from tscompile.errors import InternalError
from tscompile.ir import Op, Value
from tscompile.passes import collectives, propagate, reshard
from tscompile.price import Prices
from tscompile.verify import verify


def test_golden(request: pytest.FixtureRequest) -> None:
    build = golden.after("reshard", collectives.run)
    golden.check("collectives", build.graph, request)
    assert not any(op.kind == "redistribute" for op in build.graph.ops)


@pytest.mark.parametrize(
    ("source", "target", "kind"),
    [
        ("P(sum)", "R", "all_reduce"),
        ("P(max)", "R", "all_reduce"),
        ("P(sum)", "S(1)", "reduce_scatter"),
        ("S(1)", "R", "all_gather"),
        ("R", "S(1)", "slice"),
        ("S(1)", "S(2)", "all_to_all"),
        ("stage(0)", "stage(1)", "send"),
        ("S(0,T)", "S(0)", "ragged_all_to_all"),
        ("S(0)", "S(0,T)", "ragged_all_to_all"),
    ],
)
def test_every_pair(source: str, target: str, kind: str) -> None:
    assert realised(source, target) == kind


def test_a_pair_without_one() -> None:
    with pytest.raises(InternalError, match=r"no collective leads from R to P\(sum\), at %y"):
        realised("R", "P(sum)")


def realised(source: str, target: str) -> str:
    graph = golden.read("reshard")
    x, y = Value("x", (4, 4, 4), "f32"), Value("y", (4, 4, 4), "f32")
    graph.ops = [Op("redistribute", [x], [y], {"axis": "tp", "source": source, "target": target})]
    collectives.run(golden.build_of(graph))
    return graph.ops[0].kind


def test_counts_are_gathered_once_for_rows_that_go_and_come_back() -> None:
    """Each rank's rows of each expert: what both ways of one layer's rows are cut by."""
    build = golden.build_of(routed("mesh(ep=8)", 1))
    propagate.place(build, Prices.of("sm_90a", 8192))
    reshard.run(build)
    collectives.run(build)
    verify(build.graph)
    moves = [op for op in build.graph.ops if op.kind == "ragged_all_to_all"]
    assert [(op.inputs[0].name, op.attrs["target"]) for op in moves] == [
        (f"{name}.{layer}", target) for layer in range(2) for name, target in (("rows", ""), ("d", "T"))
    ]
    assert [op.inputs[1].name for op in moves] == [f"counts.{layer}.ep-terms" for layer in (0, 0, 1, 1)]
