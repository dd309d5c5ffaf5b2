"""precision: casts before what is stored, one a value; vectors and tables stay f32."""

from __future__ import annotations

import golden
import pytest

from tscompile.ops import lookup
from tscompile.parser import parse
from tscompile.passes import precision


def test_golden(request: pytest.FixtureRequest) -> None:
    build = golden.after("capture", precision.run, dtype="bf16")
    golden.check("precision", build.graph, request)


def test_every_stored_operand_is_of_the_plans_dtype() -> None:
    graph = golden.after("capture", precision.run, dtype="bf16").graph
    stored = [
        value
        for op in graph.ops
        for index, value in enumerate(op.inputs)
        if lookup(op.kind).slot(index).dtype in ("storage", "state")
    ]
    assert stored
    assert {value.dtype for value in stored} == {"bf16"}
    casts = [op.inputs[0].name for op in graph.ops if op.kind == "cast"]
    assert len(casts) == len(set(casts))
    assert {w.dtype for w in graph.weights if len(w.shape) == 1 or w.name == "rope_table"} == {"f32"}


def test_f32_changes_nothing() -> None:
    before = golden.read("capture")
    after = golden.after("capture", precision.run, dtype="f32").graph
    assert [op.kind for op in after.ops] == [op.kind for op in before.ops]
    assert {value.dtype for value in after.values()} == {"f32", "i32"}


def test_a_weight_that_is_read_both_ways_is_there_twice() -> None:
    graph = parse(
        """graph g mesh(tp=1) {
          input %token_ids: i32[T]
          weight @w: f32[8, 8] = checkpoint("w")
          %x: f32[T, 8] = embedding(%token_ids, @w; vocab_axis="")
          %w2: f32[8, 8] = scale(@w; value=2.0)
          %y: f32[T, 8] = linear(%x, %w2)
          output %y
        }"""
    )
    build = golden.build_of(graph, dtype="bf16")
    precision.run(build)
    assert {(w.name, w.dtype) for w in build.graph.weights} == {("w", "f32"), ("w.bf16", "bf16")}
