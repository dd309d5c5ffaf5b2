"""fuse: groups and receipts. What it does to models that its patterns do not expect is in
tests/models/test_variants.py."""

from __future__ import annotations

from collections import Counter

import golden
import pytest

from tscompile.build import Build
from tscompile.ir import GROUP_KINDS
from tscompile.mesh import Mesh
from tscompile.parser import parse
from tscompile.passes import canonicalize, collectives, fuse, localize, precision, propagate, reshard
from tscompile.recipe import Concat, Interleave
from tscompile.verify import verify


def one_rank(dtype: str = "bf16") -> Build:
    build = golden.after("capture", precision.run, Mesh(), dtype=dtype)
    build.mesh = Mesh()
    for step in (canonicalize, propagate, reshard, collectives, localize, fuse):
        step.run(build)
        verify(build.graph)
    return build


def test_golden(request: pytest.FixtureRequest) -> None:
    golden.check("fuse", golden.after("localize", fuse.run).graph, request)


def test_golden_of_one_rank(request: pytest.FixtureRequest) -> None:
    golden.check("fuse-one-rank", one_rank().graph, request)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_a_layer_is_seven_groups(dtype: str) -> None:
    build = one_rank(dtype)
    counts = Counter(group.group for group in build.graph.groups())
    assert counts == {"embed": 1, "rms_norm": 3, "linear": 5, "qkv_write": 1, "attention": 1}
    recipes = {w.name: w.recipe for w in build.graph.weights}
    assert isinstance(recipes["layers.0.self_attn.qkv.weight"], Concat)
    gate_up = recipes["layers.0.mlp.gate_up.weight"]
    assert isinstance(gate_up, Interleave)
    assert gate_up.tile == 16
    shape = next(w.shape for w in build.graph.weights if w.name == "layers.0.mlp.gate_up.weight")
    assert shape == (96, 32)  # 40 rows each, rounded up to 48


def test_receipts() -> None:
    receipts = [(r.pattern, r.where, r.matched) for r in one_rank().receipts]
    assert receipts == [
        ("gather_early", "logits", True),
        ("gate_up_swiglu", "layers.0.mlp.mul", True),
        ("qkv", "layers.0.self_attn.attention.out", True),
        ("qk_norm_rope_kv_write", "layers.0.self_attn.attention.kv", True),
        ("residual_rms_norm", "layers.0.input_layernorm.normed", False),
        ("residual_rms_norm", "layers.0.post_attention_layernorm.normed", True),
        ("residual_rms_norm", "norm.normed", True),
    ]
    (refused,) = (r for r in one_rank().receipts if not r.matched)
    assert refused.reason == "beside it, at %embed_tokens.out, is embedding, wanted add"
    assert refused.source == "models/qwen3.py:69"


def test_an_all_reduce_goes_into_the_norm_after_it() -> None:
    """The receipts of two ranks; a residual stream that other ops read too stays a value."""
    build = golden.after("localize", fuse.run)
    tried = [r for r in build.receipts if "rms_norm" in r.pattern]
    assert [(r.pattern, r.where, r.matched) for r in tried] == [
        ("all_reduce_residual_rms_norm", "layers.0.input_layernorm.normed", False),
        ("all_reduce_residual_rms_norm", "layers.0.post_attention_layernorm.normed", True),
        ("all_reduce_residual_rms_norm", "norm.normed", True),
        ("residual_rms_norm", "layers.0.input_layernorm.normed", False),
    ]
    assert tried[0].reason == "beside it, at %embed_tokens.out, is embedding, wanted all_reduce"
    first, last = (group for group in build.graph.groups() if group.group == "all_reduce_rms_norm")
    assert [op.kind for op in first.body] == ["all_reduce", "add", "rms_norm", "cast"]
    assert [v.name for v in first.outputs] == ["layers.0.add", "layers.0.mlp.takes.bf16"]
    assert [v.name for v in last.outputs] == ["norm.normed.bf16"]


REDUCED = """graph g mesh(tp=2) {
  input %token_ids: i32[T]
  weight @e: f32[8, 8] = checkpoint("e")
  weight @w: f32[8] = checkpoint("w")
  %x: f32[T, 8] tp:P(sum) = embedding(%token_ids, @e; vocab_axis="")
  %r: f32[T, 8] = all_reduce(%x; axis="tp", op="sum")
  BODY
  output %y
}"""


@pytest.mark.parametrize(
    ("body", "groups"),
    [
        ("%y: f32[T, 8] = rms_norm(%r, @w; eps=1e-06)", ["embed", "all_reduce_rms_norm"]),
        (
            "%h: f32[T, 2, 4] = reshape(%r; shape=[-1, 2, 4]) "
            "%f: f32[T, 8] = reshape(%h; shape=[-1, 8]) %y: f32[T, 8] = rms_norm(%f, @w; eps=1e-06)",
            ["embed", "all_reduce_rms_norm"],
        ),
        # the other addend comes from the sum: a group of all would wait for itself
        (
            "%a: f32[T, 8] = relu(%r) %b: f32[T, 8] = add(%a, %r) "
            "%y: f32[T, 8] = rms_norm(%b, @w; eps=1e-06)",
            ["embed", "collective", "elementwise", "rms_norm"],
        ),
        (
            '%z: f32[T, 8] = all_reduce(%x; axis="tp", op="sum") %b: f32[T, 8] = add(%r, %z) '
            "%y: f32[T, 8] = rms_norm(%b, @w; eps=1e-06)",
            ["embed", "collective", "all_reduce_rms_norm"],
        ),
    ],
)
def test_what_becomes_of_an_all_reduce(body: str, groups: list[str]) -> None:
    build = golden.build_of(parse(REDUCED.replace("BODY", body)))
    fuse.run(build)
    verify(build.graph)
    assert [group.group for group in build.graph.groups()] == groups


def test_only_wanted_rows_reach_the_head() -> None:
    head = one_rank().graph.groups()[-1]
    assert [op.kind for op in head.body] == ["gather_rows", "linear"]
    assert [str(dim) for dim in head.outputs[0].shape] == ["L", "48"]


def test_launch_args_leave_out_batch_arrays_and_given_states() -> None:
    for group in one_rank().graph.groups():
        names = [value.name for value in group.launch_args()]
        assert not {"positions", "slots", "logit_rows"} & set(names)
        if group.group == "qkv_write":
            assert names[-2:] == ["kv.0", group.outputs[0].name]
        assert group.group in GROUP_KINDS


ELEMENTWISE = """graph g mesh(tp=1) {
  input %token_ids: i32[T]
  input %logit_rows: i32[L]
  weight @e: f32[8, 8] = checkpoint("e")
  weight @w: f32[8] = checkpoint("w")
  %x: f32[T, 8] = embedding(%token_ids, @e; vocab_axis="")
  %a: f32[T, 8] = relu(%x)
  %b: f32[T, 8] = mul(%a, @w)
  %c: f32[T, 2, 4] = reshape(%b; shape=[-1, 2, 4])
  %d: f32[T, 2, 4] = neg(%c)
  %p: f32[T, 2, 1], %q: f32[T, 2, 3] = split(%d; sizes=[1, 3])
  %r: f32[T, 2, 4] = concat(%q, %p)
  %s: f32[T, 2, 4] = add(%r, %d)
  %t: f32[T, 8] = reshape(%s; shape=[-1, 8])
  %y: f32[L, 8] = gather_rows(%t, %logit_rows)
  output %y
}"""


def test_elementwise_groups_are_trees() -> None:
    """One output each, all of as many elements a row; a value that two groups read is computed once."""
    build = golden.build_of(parse(ELEMENTWISE))
    fuse.run(build)
    verify(build.graph)
    found = [(group.group, [op.kind for op in group.body]) for group in build.graph.groups()]
    assert found == [
        ("embed", ["embedding"]),
        ("elementwise", ["relu", "mul", "reshape", "neg"]),
        ("elementwise", ["split"]),
        ("elementwise", ["split"]),
        ("elementwise", ["concat", "add"]),
        ("gather_rows", ["reshape", "gather_rows"]),
    ]
    assert all(len(group.outputs) == 1 for group in build.graph.groups())
