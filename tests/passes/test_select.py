"""select: each group's kernel with all its constants, each weight's layout, and what it refuses."""

from __future__ import annotations

import json

import golden
import pytest

from tscompile.errors import CompileError, InternalError
from tscompile.ir import Graph, Sym, Weight
from tscompile.kernels.desc import Embed, Linear
from tscompile.kernels.groups import describe, layouts_of
from tscompile.kernels.host import best_target
from tscompile.kernels.steps import COLLECTIVE, coordinate_of, launch_fields, steps_of, tokens_of
from tscompile.parser import parse
from tscompile.passes import select
from tscompile.weights import evaluate


def test_golden(request: pytest.FixtureRequest) -> None:
    """A line a kernel: its description, and each target's tiling."""
    build = golden.build_of(golden.read("fuse-one-rank"), targets=("cpu-avx2", "cpu-avx512", "cpu-amx"))
    select.run(build)
    lines = []
    for at, kernel in enumerate(build.targets["cpu-avx2"].kernels):
        lines += [kernel.desc.text, f"  symbol {kernel.desc.symbol}"]
        lines += [f"  {name} {made.kernels[at].tiling}" for name, made in build.targets.items()]
    lines += [f"@{name} {layout}" for name, layout in build.targets["cpu-avx2"].layouts.items()]
    golden.check_lines("select", lines, request)


def test_golden_of_two_ranks(request: pytest.FixtureRequest) -> None:
    """A line a launch: its kernel, or what its collective moves. All ranks run them."""
    build = golden.build_of(golden.read("fuse"), targets=("cpu-avx2",))
    select.run(build)
    (made,) = build.targets["cpu-avx2"].buckets.values()
    lines = [
        json.dumps(launch_fields(step)) if step.group == COLLECTIVE else f"{step.name}: {kernel}"
        for step in made.steps
        for kernel in [made.symbols.get(step.name, "none")]
    ]
    golden.check_lines("select-two-ranks", lines, request)
    assert set(made.symbols) == {step.name for step in made.steps if step.group != COLLECTIVE}


def test_a_fused_collective_runs_as_two_launches() -> None:
    graph = golden.read("fuse")
    fused = [group for group in graph.groups() if group.group == "all_reduce_rms_norm"]
    assert len(fused) == 2
    for group in fused:
        collective, norm = steps_of(Graph("one", graph.mesh, ops=[group]))
        assert [op.kind for op in collective.body] == ["all_reduce"]
        assert [op.kind for op in norm.body] == ["add", "rms_norm", "cast"]
        assert collective.inputs == group.inputs[:1]
        assert norm.outputs == group.outputs
        assert collective.outputs[0] in norm.inputs
        assert (collective.group, norm.group) == (COLLECTIVE, "rms_norm")


ALL_TO_ALL = """graph g mesh(tp=4) {
  input %token_ids: i32[T]
  weight @e: f32[8, 8] = checkpoint("e")
  %x: f32[T, 8] = group.embed(%token_ids, @e) {
    %x: f32[T, 8] = embedding(%token_ids, @e; vocab_axis="")
  }
  %y: f32[T, 4, 8] = group.collective(%x) {
    %h: f32[T, 4, 2] = reshape(%x; shape=[-1, 4, 2])
    %y: f32[T, 4, 8] = all_gather(%h; axis="tp", dim=2, ranks=4)
  }
  %z: f32[T, 16, 2] = group.collective(%y) {
    %z: f32[T, 16, 2] = all_to_all(%y; axis="tp", source=1, dim=2, ranks=4)
  }
  %s: f32[T, 4, 2] = group.collective(%z) {
    %s: f32[T, 4, 2] = reduce_scatter(%z; axis="tp", op="max", dim=1, ranks=4)
  }
  output %s
}"""


def test_what_a_collective_moves() -> None:
    steps = [step for step in steps_of(parse(ALL_TO_ALL)) if step.group == COLLECTIVE]
    shared = {"axis": "tp", "dtype": "f32", "rows": "T"}
    assert [launch_fields(step) for step in steps] == [
        {**shared, "collective": "all_gather", "op": "y", "times": 4, "run": 2},
        {
            **shared,
            "collective": "all_to_all",
            "op": "z",
            "times": 1,
            "part": 4,
            "run": 2,
            "gathers": "first",
        },
        {**shared, "collective": "reduce_scatter", "op": "s", "times": 1, "run": 8, "reduce": "max"},
    ]
    assert [v.name for v in steps[0].inputs] == ["x"]  # the reshape moves nothing


TOKENS = """graph g mesh(dp=2, tp=2) {
  input %token_ids: i32[T]
  input %positions: i32[T]
  weight @e: f32[8, 24] = checkpoint("e")
  %ids: i32[T/tp] = group.collective(%token_ids) {
    %ids: i32[T/tp] = slice(%token_ids; axis="tp", dim=0, ranks=2)
  }
  %x: f32[T/tp, 24] = group.embed(%ids, @e) {
    %x: f32[T/tp, 24] = embedding(%ids, @e; vocab_axis="")
  }
  %a: f32[T, 4, 3] = group.collective(%x) {
    %h: f32[T/tp, 4, 6] = reshape(%x; shape=[-1, 4, 6])
    %a: f32[T, 4, 3] = all_to_all(%h; axis="tp", source=0, dim=2, ranks=2)
  }
  %b: f32[T/tp, 4, 6] = group.collective(%a) {
    %b: f32[T/tp, 4, 6] = all_to_all(%a; axis="tp", source=2, dim=0, ranks=2)
  }
  %c: f32[T, 4, 6] = group.collective(%b) {
    %c: f32[T, 4, 6] = all_gather(%b; axis="tp", dim=0, ranks=2)
  }
  %d: f32[T/dp, 4, 6] = group.collective(%c) {
    %d: f32[T/dp, 4, 6] = reduce_scatter(%c; axis="dp", op="sum", dim=0, ranks=2)
  }
  %e: f32[T/dp, 2, 6] = group.collective(%d) {
    %e: f32[T/dp, 2, 6] = slice(%d; axis="tp", dim=1, ranks=2)
  }
  output %e
}"""


def test_tokens_that_are_shared_out() -> None:
    """Ranks' parts are tokens; rows are those of a part; and a batch array is read as a part of it."""
    embed, *steps = steps_of(parse(TOKENS))
    assert (embed.group, [v.name for v in embed.inputs], tokens_of(embed)) == (
        "embed",
        ["token_ids", "e"],
        "tp",
    )
    made = describe(embed, {})
    assert isinstance(made, Embed)
    assert made.ids == "token_ids"
    tokens = {"dtype": "f32", "axis": "tp", "rows": "1", "times": 1, "parts": "tokens"}
    moved = {"collective": "all_to_all", "part": 4, "run": 3}
    assert [launch_fields(step) for step in steps] == [
        {**tokens, **moved, "op": "a", "gathers": "first"},
        {**tokens, **moved, "op": "b", "gathers": "second"},
        {**tokens, "collective": "all_gather", "op": "c", "run": 24},
        {**tokens, "collective": "reduce_scatter", "op": "d", "axis": "dp", "run": 24, "reduce": "sum"},
        {
            **{"collective": "slice", "op": "e", "dtype": "f32", "axis": "tp", "rows": "T/dp"},
            **{"times": 1, "run": 12},
        },
    ]


def test_a_vocabulary_that_is_sharded() -> None:
    """The kernel reads its rank's coordinate from a weight: all ranks run the same."""
    graph = golden.read("fuse")
    next(op for op in graph.groups()[0].body if op.kind == "embedding").attrs["vocab_axis"] = "tp"
    first, *others = steps_of(graph)
    coordinate = coordinate_of(first)
    assert coordinate is not None
    assert not any(coordinate_of(step) for step in others)
    assert [
        evaluate(coordinate, {}.__getitem__, graph.mesh, graph.mesh.coords(rank)).item() for rank in (0, 1)
    ] == [0, 1]
    made = describe(first, {})
    assert isinstance(made, Embed)
    assert [arg.roles for arg in made.args] == [("table",), ("rank",), ("out",)]
    assert made.shard == 48


def test_collectives_that_the_engine_does_not_have() -> None:
    graph = parse(ALL_TO_ALL)
    tokens, rounded = graph.groups()[1], graph.groups()[3]
    tokens.body[-1].inputs[0].shape = (Sym("T"), 4, Sym("T"))
    with pytest.raises(InternalError, match=r"all_gather of \['T', '4', 'T'\]"):
        launch_fields(tokens)
    rounded.inputs[0].dtype = "bf16"
    with pytest.raises(InternalError, match="reduce_scatter of bf16, wanted f32"):
        launch_fields(rounded)


def test_this_machines_best_by_default() -> None:
    build = golden.build_of(golden.read("fuse-one-rank"))
    select.run(build)
    assert list(build.targets) == [best_target()]
    with pytest.raises(CompileError, match="unknown target 'gpu'; known are cpu-avx2"):
        select.run(golden.build_of(golden.read("fuse-one-rank"), targets=("gpu",)))


def test_a_tied_table_lies_in_tiles_once() -> None:
    groups = golden.read("fuse-one-rank").groups()
    embed, head = groups[0], groups[-1]
    table = next(op for op in embed.body if op.kind == "embedding").inputs[1]
    assert isinstance(table, Weight)
    assert table in head.inputs
    assert layouts_of(groups)[table.name] == "tiles"
    made = describe(embed, layouts_of(groups))
    assert isinstance(made, Embed)
    assert made.layout == "tiles"

    own = Weight("head.weight", table.shape, table.dtype, recipe=table.recipe)
    for op in (head, *head.body):
        op.inputs = [own if value is table else value for value in op.inputs]
    layouts = layouts_of(groups)
    assert (layouts[table.name], layouts[own.name]) == ("rows", "tiles")


def test_layers_share_kernels() -> None:
    build = golden.build_of(golden.read("fuse-one-rank"))
    select.run(build)
    (made,) = build.targets.values()
    (bucket,) = made.buckets.values()
    assert {kernel.desc.symbol for kernel in made.kernels} == set(bucket.symbols.values())
    assert set(bucket.symbols) == {group.name for group in build.graph.groups()}


def test_a_linear_knows_its_epilogue() -> None:
    groups = golden.read("fuse-one-rank").groups()
    linears = [describe(group, {}) for group in groups if group.group == "linear"]
    assert all(isinstance(made, Linear) for made in linears)
    assert [(made.swiglu, made.gather, made.out_dtype) for made in linears if isinstance(made, Linear)] == [
        (0, False, "f32"),
        (0, False, "f32"),
        (40, False, "bf16"),
        (0, False, "f32"),
        (0, True, "f32"),
    ]


@pytest.mark.parametrize(
    ("kind", "break_it", "message"),
    [
        ("collective", lambda group: setattr(group, "group", "collective"), "no kernel for the group"),
        (
            "linear",
            lambda group: setattr(group, "group", "attention"),
            "0 ops attention in a group attention",
        ),
        ("rms_norm", lambda group: setattr(group, "body", group.body[1:]), "0 ops rms_norm"),
        ("qkv_write", lambda group: group.body[0].outputs.reverse(), "do not take the way"),
    ],
)
def test_refuses(kind: str, break_it: object, message: str) -> None:
    groups = golden.read("fuse-one-rank").groups()
    group = next(group for group in groups if group.group == kind) if kind != "collective" else groups[0]
    break_it(group)  # type: ignore[operator]
    with pytest.raises(InternalError, match=message):
        describe(group, {})
