"""reshard: redistributes where placements differ, boundaries gone."""

from __future__ import annotations

import golden
import pytest

from tscompile.mesh import Mesh
from tscompile.passes import propagate, reshard


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
