"""stages: ops cut into consecutive stages where one value alone crosses, the slowest as quick as can be."""

from __future__ import annotations

import itertools
import random

import golden
import pytest
import torch
from layered import layered

from tscompile.errors import CompileError, InternalError
from tscompile.interpret import Interpreter, Sequences
from tscompile.ir import Graph, stage_of
from tscompile.mesh import Mesh
from tscompile.parser import parse
from tscompile.passes import collectives, propagate, reshard, stages
from tscompile.price import Prices

TWO = Mesh((("pp", 2), ("tp", 2)))


@pytest.fixture(autouse=True)
def _prices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        propagate, "prices_of", lambda _: golden.prices(base_s=2e-7, bytes_per_s=2e10, tokens=8)
    )


def test_golden(request: pytest.FixtureRequest) -> None:
    golden.check("stages", golden.after("canonicalize", stages.run, TWO).graph, request)


def test_nothing_is_done_without_stages() -> None:
    graph = golden.after("canonicalize", stages.run, Mesh((("tp", 2),))).graph
    assert not any(stage_of(value) is not None for value in graph.values())


def placed(layers: int, mesh: str, tokens: int = 64) -> tuple[Graph, list[dict[str, object]]]:
    graph = layered(layers, mesh, hidden=512, heads=8, kv_heads=4, head_dim=64)
    return graph, stages.cut(graph, Prices.of("cpu-avx2", tokens))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_op_takes_what_its_stage_has(ranks: int) -> None:
    """Layers in order, none of a stage's caches or weights on another, and one value crosses each cut."""
    graph, rows = placed(9, f"mesh(pp={ranks})")
    made = {id(v): stage_of(op.outputs[0]) for op in graph.ops for v in op.outputs}
    found = [stage_of(op.outputs[0]) for op in graph.ops]
    assert found == sorted(found, key=str)
    assert set(found) == set(range(ranks))
    crossing = set()
    for op in graph.ops:
        stage = stage_of(op.outputs[0])
        for value in op.inputs:
            if id(value) in made:
                if made[id(value)] != stage:
                    crossing.add((value.name, made[id(value)], stage))
            else:  # a batch array is on every rank, all else on its own
                assert stage_of(value) == (None if value in graph.inputs and not value.state else stage)
    assert [(first, last) for _, first, last in sorted(crossing, key=lambda c: c[1])] == [
        (i, i + 1) for i in range(ranks - 1)
    ]
    assert [row["stage"] for row in rows] == list(range(ranks))


def test_what_several_stages_read_is_there_once_for_each() -> None:
    graph, _ = placed(4, "mesh(pp=2)")
    ropes = [w for w in graph.weights if w.name.startswith("rope")]
    assert [stage_of(w) for w in ropes] == [0, 1]
    assert ropes[0].recipe == ropes[1].recipe


def test_stages_are_balanced() -> None:
    """The head reads as much as some layers: the last stage has fewer of them."""
    graph, rows = placed(8, "mesh(pp=4)")
    layers = [sum(stage_of(state) == stage for state in graph.states) for stage in range(4)]
    assert sum(layers) == 8
    assert layers[3] < layers[0]
    slowest = max(float(str(row["us"])) for row in rows)
    assert slowest < 1.6 * sum(float(str(row["us"])) for row in rows) / 4


@pytest.mark.parametrize("seed", range(20))
def test_partition_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    count, parts = rng.randint(3, 9), rng.randint(1, 3)
    items = [rng.choice([1, 2, 3, 5, 8]) for _ in range(count)]
    sends = [rng.choice([0, 1, 2]) for _ in range(count)]

    def cost(first: int, stop: int) -> float:
        return sum(items[first:stop]) + sends[stop - 1]

    def costs(starts: tuple[int, ...]) -> list[float]:
        return [cost(i, j) for i, j in itertools.pairwise([*starts, count])]

    every = [(0, *rest) for rest in itertools.combinations(range(1, count), parts - 1)]
    best = min((max(costs(s)), sum(c * c for c in costs(s))) for s in every)
    starts = stages.partition(count, parts, lambda i: [cost(i, j) for j in range(i + 1, count + 1)])
    found = costs(tuple(starts))
    assert (max(found), sum(c * c for c in found)) == best


def test_more_stages_than_places_to_cut() -> None:
    with pytest.raises(CompileError) as error:
        placed(1, "mesh(pp=8)")
    assert str(error.value) == (
        "pp=8: layered can be cut into 7 stages at most, as it has 6 places between its ops where one value "
        "alone crosses: pp can be 1 to 7"
    )


def test_what_crosses_is_small() -> None:
    """Sums before a send, parts gathered after it; and the logits go to the first stage."""
    build = golden.after("canonicalize", stages.run, TWO)
    for step in (propagate, reshard, collectives):
        step.run(build)
    sends = [op for op in build.graph.ops if op.kind == "send"]
    assert [(op.attrs["src"], op.attrs["dst"]) for op in sends] == [(0, 1), (1, 0)]
    assert not any(str(p).startswith("P") for op in sends for p in op.inputs[0].placement)
    assert build.graph.outputs[0] is sends[-1].outputs[0] or stage_of(build.graph.outputs[0]) == 0


def test_a_value_of_another_stage_cannot_be_read() -> None:
    text = """graph g mesh(pp=2) { input %token_ids: i32[T]
        weight @t: f32[8, 8] pp:stage(0) = checkpoint("t")
        weight @w: f32[8, 8] pp:stage(1) = checkpoint("w")
        %x: f32[T, 8] pp:stage(0) = embedding(%token_ids, @t; vocab_axis="")
        %y: f32[T, 8] pp:stage(1) = linear(%x, @w)
        output %y }"""
    batch = Sequences(32, 64).batch({"a": [1]})
    graph = parse(text)
    many = Interpreter(graph, lambda _: torch.ones(8, 8), 64, graph.mesh)
    with pytest.raises(InternalError, match=r"rank 1 of mesh\(pp=2\) reads %x, which it does not have"):
        many.run(batch)
    build = golden.build_of(parse(text))
    for step in (reshard, collectives):
        step.run(build)
    ((found,), nothing) = Interpreter(build.graph, lambda _: torch.ones(8, 8), 64, build.mesh).run(batch)
    assert found.tolist() == [[8.0] * 8]
    assert nothing == []


def test_parts_are_sent_before_they_are_gathered() -> None:
    text = """graph g mesh(pp=2, tp=2) { input %token_ids: i32[T]
        weight @t: f32[8, 8] pp:stage(0) tp:S(1) = checkpoint("t")
        weight @w: f32[8, 8] pp:stage(1) = checkpoint("w")
        %x: f32[T, 8] pp:stage(0) tp:S(1) = embedding(%token_ids, @t; vocab_axis="")
        %y: f32[T, 8] pp:stage(1) = linear(%x, @w)
        output %y }"""
    build = golden.build_of(parse(text))
    reshard.run(build)
    moves = [op.attrs for op in build.graph.ops if op.kind == "redistribute"]
    assert [f"{m['axis']}:{m['source']}->{m['target']}" for m in moves] == [
        "pp:stage(0)->stage(1)",
        "tp:S(1)->R",
        "pp:stage(1)->stage(0)",
    ]
