"""select: each group's kernel with all its constants, each weight's layout, and what it refuses."""

from __future__ import annotations

import golden
import pytest

from tscompile.errors import CompileError, InternalError
from tscompile.ir import Weight
from tscompile.kernels.desc import Embed, Linear
from tscompile.kernels.groups import describe, layouts_of
from tscompile.kernels.host import best_target
from tscompile.passes import select


def test_golden(request: pytest.FixtureRequest) -> None:
    """A line a kernel: its description, and each target's tiling."""
    build = golden.build_of(golden.read("fuse-one-rank"), targets=("cpu-avx2", "cpu-avx512", "cpu-amx"))
    select.run(build)
    lines = []
    for at, kernel in enumerate(build.targets["cpu-avx2"].kernels):
        lines += [kernel.desc.text, f"  symbol {kernel.desc.symbol}"]
        lines += [f"  {name} {made.kernels[at].tiling}" for name, made in build.targets.items()]
    lines += [f"@{name} {layout}" for name, layout in build.targets["cpu-avx2"].layouts.items()]
    path, text = golden.FOLDER / "select.txt", "\n".join(lines) + "\n"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert text == path.read_text(), (
        f"{path.name} differs; if the change is meant, run pytest --update-golden"
    )


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
    assert {kernel.desc.symbol for kernel in made.kernels} == set(made.symbols.values())
    assert set(made.symbols) == {group.name for group in build.graph.groups()}


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
