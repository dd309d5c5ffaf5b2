"""canonicalize: rows gathered before the head, merged projections taken apart, and what that does for
placements."""

from __future__ import annotations

from collections import Counter

import golden
import pytest

from tscompile.build import Build
from tscompile.ir import Weight
from tscompile.parser import parse
from tscompile.passes import canonicalize, collectives, propagate, reshard
from tscompile.printer import print_recipe
from tscompile.verify import verify


def test_golden(request: pytest.FixtureRequest) -> None:
    golden.check("canonicalize", golden.after("precision", canonicalize.run).graph, request)


MERGED = """graph g mesh(tp=4) {
    input %token_ids: i32[T]
    input %logit_rows: i32[L]
    weight @table: f32[64, 256] = checkpoint("table")
    weight @gate_up: f32[1536, 256] = checkpoint("gate_up")
    weight @bias: f32[1536] = checkpoint("bias")
    weight @down: f32[256, 768] = checkpoint("down")
    weight @head: f32[512, 256] = checkpoint("head")
    %x: f32[T, 256] = embedding(%token_ids, @table; vocab_axis="")
    %a: f32[T, 256] = boundary(%x; module="mlp", placements="tp:R")
    %both: f32[T, 1536] = linear(%a, @gate_up)
    %biased: f32[T, 1536] = add(%both, @bias)
    %gate: f32[T, 768], %up: f32[T, 768] = split(%biased; sizes=[768, 768])
    %s: f32[T, 768] = silu(%gate)
    %m: f32[T, 768] = mul(%s, %up)
    %y: f32[T, 256] = linear(%m, @down)
    %b: f32[T, 256] = boundary(%y; module="mlp", placements="tp:R")
    %all: f32[T, 512] = linear(%b, @head)
    %logits: f32[L, 512] = gather_rows(%all, %logit_rows)
    output %logits }"""


def canonical(text: str = MERGED) -> Build:
    build = golden.build_of(parse(text))
    canonicalize.run(build)
    verify(build.graph)
    return build


def test_merged_projections_are_slices() -> None:
    build = canonical()
    found = {w.name: print_recipe(w.recipe) for w in build.graph.weights}
    assert [found[name] for name in ("gate_up.0", "gate_up.768", "bias.0", "bias.768")] == [
        'slice(checkpoint("gate_up"); dim=0, start=0, stop=768)',
        'slice(checkpoint("gate_up"); dim=0, start=768, stop=1536)',
        'slice(checkpoint("bias"); dim=0, start=0, stop=768)',
        'slice(checkpoint("bias"); dim=0, start=768, stop=1536)',
    ]
    assert "gate_up" not in found
    assert [(r.pattern, r.where, r.matched) for r in build.receipts] == [
        ("gather_early", "y", True),  # no residual stream here: above the MLP's last linear too
        ("split_weights", "gate", True),
    ]


def test_what_is_merged_is_placed_as_what_is_apart() -> None:
    """Columns, then rows, and one sum: nothing is gathered to be split."""
    build = canonical()
    propagate.place(build, golden.prices(1e-8, 1e12))
    reshard.run(build)
    collectives.run(build)
    kinds = Counter(op.kind for op in build.graph.ops)
    assert (kinds["all_reduce"], kinds["all_gather"]) == (1, 2), "of the table's columns, and of the logits"
    halves = [w for w in build.graph.weights if w.name.startswith("gate_up")]
    assert {str(w.placement[0]) for w in halves} == {"S(0)"}


def test_the_head_has_the_rows_that_are_wanted() -> None:
    graph = canonical().graph
    head = next(op for op in graph.ops if op.outputs == graph.outputs)
    assert head.kind == "linear"
    assert isinstance(head.inputs[1], Weight)
    assert [str(dim) for dim in head.inputs[0].shape] == ["L", "256"]


def test_what_has_other_readers_stays() -> None:
    build = canonical(MERGED.replace("output %logits", "output %logits, %biased"))
    (split,) = (r for r in build.receipts if r.pattern == "split_weights")
    assert (split.matched, split.reason) == (False, "%biased has other readers")
    build = canonical(MERGED.replace("output %logits", "output %logits, %all"))
    (gather,) = (r for r in build.receipts if r.pattern == "gather_early")
    assert (gather.matched, gather.reason) == (
        False,
        "%all comes from no large op that works row by row",
    )
