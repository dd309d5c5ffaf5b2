"""context: with cp, attention in parts of the context."""

from __future__ import annotations

import golden
import pytest

from tscompile.build import ModelInfo
from tscompile.errors import CompileError
from tscompile.ir import Graph
from tscompile.mesh import Mesh
from tscompile.passes import context, propagate, reshard
from tscompile.placement import Owned, Replicate, Shard

CP = Mesh((("cp", 2),))


def test_golden(request: pytest.FixtureRequest) -> None:
    golden.check("context", golden.after("canonicalize", context.run, CP).graph, request)


def test_other_meshes_stay_as_they_are(request: pytest.FixtureRequest) -> None:
    golden.check("canonicalize", golden.after("canonicalize", context.run).graph, request)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        propagate, "prices_of", lambda _: golden.prices(base_s=2e-7, bytes_per_s=2e10, tokens=8)
    )


def placed(mesh: Mesh) -> Graph:
    graph = golden.read("canonicalize")
    graph.mesh = mesh
    for value in graph.values():
        value.placement = ()
    build = golden.build_of(graph)
    for step in (context, propagate, reshard):
        step.run(build)
    return build.graph


@pytest.mark.usefixtures("_quick")
def test_parts_lie_with_the_cache() -> None:
    """A rank has its tokens of every cache and the number of its part; what it attended to moves once a
    layer."""
    graph = placed(CP)
    assert {state.placement for state in graph.states} == {(Owned(),)}
    assert {w.placement for w in graph.weights if w.name.startswith("context_parts")} == {(Shard(0),)}
    made = {id(v): op for op in graph.ops for v in op.outputs}
    moves = [made[id(op.inputs[0])] for op in graph.ops if op.kind == "merge_parts"]
    assert [op.kind for op in moves] == ["redistribute"] * len(graph.states)
    assert [made[id(op.inputs[0])].kind for op in moves] == ["attention"] * len(moves)


@pytest.mark.usefixtures("_quick")
def test_heads_and_contexts() -> None:
    """Over tp and cp: each rank's heads over its part of the context."""
    graph = placed(Mesh((("tp", 2), ("cp", 2))))
    assert {state.placement for state in graph.states} == {(Shard(0), Owned())}
    assert {w.placement for w in graph.weights if w.name.startswith("context_parts")} == {
        (Replicate(), Shard(0))
    }


def test_a_page_that_is_too_large() -> None:
    build = golden.build_of(golden.read("canonicalize"), cp=8, page_size=1024)
    build.mesh = build.options.mesh
    with pytest.raises(CompileError) as error:
        context.run(build)
    assert str(error.value) == (
        "cp=8 with a page size of 1024: a page of 8192 tokens would lie on 8 ranks, wanted at most 4096: a "
        "page size of at most 512"
    )


def test_contexts_too_short_for_the_ranks_are_said() -> None:
    build = golden.build_of(golden.read("canonicalize"), cp=4)
    build.mesh = build.options.mesh
    build.model = ModelInfo("m", "M", 96, 128, (), None, "f32")
    context.run(build)
    assert build.notes == [
        "cp=4: a context of at most 128 tokens fills 2 of the 4 ranks' parts of a page, 64 tokens each; the "
        "others' caches stay empty"
    ]
