"""localize: shapes of one rank."""

from __future__ import annotations

import golden
import pytest

from tscompile.mesh import Mesh
from tscompile.passes import localize, propagate, reshard
from tscompile.placement import Shard
from tscompile.printer import print_graph
from tscompile.recipe import ShardOf


def test_golden(request: pytest.FixtureRequest) -> None:
    build = golden.after("collectives", localize.run)
    golden.check("localize", build.graph, request)
    for weight in build.graph.weights:
        assert isinstance(weight.recipe, ShardOf) == isinstance(weight.placement[0], Shard)


def test_one_rank_is_left_alone() -> None:
    build = golden.after("canonicalize", propagate.run, Mesh())
    reshard.run(build)
    before = print_graph(build.graph)
    localize.run(build)
    assert print_graph(build.graph) == before
