"""Kernels compiled for device targets on a machine without one: what their cubins say of themselves, the same
bytes anywhere, and what is refused. `make test-gpu` (every_kernel.py) does the shapes of real models."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import sass
from kernels_of_models import Latent, Routed, Shape, descriptions, launches, linear

from tscompile.errors import CompileError, InternalError
from tscompile.kernels import desc
from tscompile.kernels.build import cache_folder
from tscompile.kernels.desc import args_of
from tscompile.kernels.gpu import build
from tscompile.kernels.gpu.build import compile_all, compilers
from tscompile.kernels.gpu.cubin import parameters, resources
from tscompile.kernels.gpu.select import choose
from tscompile.kernels.gpu.spec import GpuKernel, Rows
from tscompile.kernels.gpu.target import GPU_TARGETS, GpuTarget

SMALL = Shape(256, 4, 2, 64, 512, 512, True)
OTHERS = (Routed(256, 128, 128, 8, "sigmoid", 2.5, 4, 2), Latent(16))
TARGETS = list(GPU_TARGETS.values())


def kernels(buckets: tuple[int, ...], target: GpuTarget) -> list[GpuKernel]:
    """One of each template, at the buckets that differ."""
    found: dict[str, GpuKernel] = {}
    for launch in launches(SMALL, target, buckets):
        kernel = launch.kernel
        swiglu = isinstance(kernel.desc, desc.Linear) and kernel.desc.swiglu
        found.setdefault(f"{kernel.template} {bool(swiglu)} {kernel.config.num_warps}", kernel)
    others = OTHERS if target.backend == "cuda" else OTHERS[:1]
    for launch in (launch for shape in others for launch in launches(shape, target, buckets[:2])):
        found.setdefault(f"{launch.kernel.template} {launch.kernel.desc.symbol}", launch.kernel)
    return list(found.values())


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_templates_compile_clean(target: GpuTarget) -> None:
    """Parameters as packed, by cuobjdump; attributes in range; tensor cores, wide loads, no spills;
    programmatic dependent launch with weights read before the wait."""
    chosen = kernels((1, 8, 128), target)
    assert {kernel.template for kernel in chosen} >= {"gemv", "linear", "attention", "attention_combine"}
    if target.arch != 90:  # here those that differ most; all of both in `make test-gpu`
        chosen = [kernel for kernel in chosen if kernel.template in sass.PRODUCTS]
    made, versions = compile_all(chosen, target, cache=cache_folder())
    assert versions == compilers(target)
    problems = [line for kernel in chosen for line in sass.lint(kernel, made[kernel.symbol], target)]
    assert not problems, "\n".join(problems)


def test_no_latent_attention_on_gpus_of_amd() -> None:
    made = list(descriptions(OTHERS[1]))[2]
    with pytest.raises(CompileError, match="gfx950 has no kernel for latent attention yet: build for sm_90a"):
        choose(made, GPU_TARGETS["gfx950"], Rows(8, 8))


def test_the_lint_can_fail() -> None:
    """Each rule, on a cubin that is not what it is said to be."""
    target = GPU_TARGETS["sm_90a"]
    norm, product = (
        choose(made, target, Rows(8, 8)).launches[0].kernel
        for made in (
            desc.RmsNorm(args_of("x", "weight:weight", "out!"), "T", 1, 256, 1e-5, "bf16"),
            linear(256, 256),
        )
    )
    made, _ = compile_all([norm, product], target, cache=cache_folder())
    more = replace(norm, params=(*norm.params, norm.params[0]))
    assert any("the plan packs" in line for line in sass.lint(more, made[norm.symbol], target))
    assert any("not on the tensor cores" in line for line in sass.lint(product, made[norm.symbol], target))
    said = made[norm.symbol].resources._replace(spills=8, warnings=("warning : C7508",))
    spilled = replace(made[norm.symbol], resources=said, shared_bytes=1 << 20)
    lines = "\n".join(sass.lint(norm, spilled, target))
    for word in ("spills", "C7508", "shared memory"):
        assert word in lines
    stripped = [name for name in sass.instructions(made[norm.symbol].binary) if name != sass.WAIT]
    assert list(sass.dependent_launch(norm, made[norm.symbol], target, stripped)) == ["no griddepcontrol"]
    assert list(
        sass.dependent_launch(norm, made[norm.symbol], target, ["STG.E", sass.WAIT, sass.LET_NEXT_BEGIN])
    )


def test_same_bytes_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the assembler that gave one of two, at random, with address randomisation."""
    target = GPU_TARGETS["sm_100a"]
    (kernel,) = (launch.kernel for launch in choose(linear(256, 256), target, Rows(8, 8)).launches)
    found = []
    for name in ("a", "b/deeper"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # of no concern to the workers
        monkeypatch.chdir(folder)
        made, _ = compile_all([kernel], target, cache=folder)
        found.append(made[kernel.symbol])
    if any(made.randomised for made in found):
        pytest.skip("this system does not let a process turn address randomisation off")
    assert found[0].binary == found[1].binary


def test_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = GPU_TARGETS["sm_90a"]
    kernel = choose(desc.GatherRows(args_of("x", "out!"), 64, "bf16"), target, Rows(8, 8)).launches[0].kernel
    seen: list[tuple[int, int]] = []
    first, _ = compile_all([kernel, kernel], target, cache=tmp_path, progress=lambda *at: seen.append(at))
    assert seen == [(1, 1)]

    def start(_: object) -> None:
        raise RuntimeError("a worker was started")

    monkeypatch.setattr(build._Workers, "_start", start)
    again, _ = compile_all([kernel], target, cache=tmp_path)
    assert again == first
    good = build.emit(kernel)
    monkeypatch.setattr(build, "emit", lambda *_, **__: good + "# changed")
    with pytest.raises(RuntimeError, match="a worker was started"):
        compile_all([kernel], target, cache=tmp_path)


def test_a_kernel_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = GPU_TARGETS["sm_90a"]
    kernel = choose(desc.GatherRows(args_of("x", "out!"), 64, "bf16"), target, Rows(8, 8)).launches[0].kernel
    good = build.emit(kernel)
    monkeypatch.setattr(build, "emit", lambda *_, **__: good.replace("column < WIDTH", "column < HEIGHT"))
    with pytest.raises(InternalError, match=rf"(?s){kernel.symbol} for sm_90a: .*HEIGHT"):
        compile_all([kernel], target, cache=tmp_path)
    assert not list(tmp_path.glob("cubins/*"))
    monkeypatch.setattr(build, "emit", lambda *_, **__: "import os; os._exit(3)")
    with pytest.raises(InternalError, match="the worker that compiled it ended with status 3"):
        compile_all([kernel], target, cache=tmp_path)


def test_without_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        CompileError, match=r"needs the Python package triton.*pip install 'tscompile\[build\]'"
    ):
        compile_all([], GPU_TARGETS["sm_90a"], cache=tmp_path)


def test_with_a_triton_that_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = GPU_TARGETS["sm_90a"]
    kernel = choose(desc.GatherRows(args_of("x", "out!"), 64, "bf16"), target, Rows(8, 8)).launches[0].kernel
    good = build.emit(kernel)
    monkeypatch.setattr(build, "emit", lambda *_, **__: good.replace("gdc_wait\n", "gdc_wait_for_ever\n"))
    with pytest.raises(
        CompileError, match=r"(?s)cannot be used \(ImportError: .*gdc_wait_for_ever.*pip install 'tscompile"
    ):
        compile_all([kernel], target, cache=tmp_path)
    spec = importlib.util.spec_from_file_location("triton", tmp_path / "triton/__init__.py")
    assert spec is not None
    spec.submodule_search_locations = [str(tmp_path / "triton")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(
        CompileError,
        match=r"for sm_90a needs ptxas, which .* triton brings, and .*/backends/nvidia/bin/ptxas does not "
        r"run \(No such file or directory\): pip install --force-reinstall triton",
    ):
        compilers(target)


def test_what_no_kernel_does() -> None:
    target, rows = GPU_TARGETS["sm_100a"], Rows(8, 8)
    with pytest.raises(CompileError, match="sm_100a has no kernel of kind dispatch yet"):
        choose(desc.Dispatch(args_of("x", "order", "out!"), 2, 64, "bf16"), target, rows)
    f32 = desc.Embed(args_of("table:weight", "out!"), "token_ids", 64, "f32", "rows")
    with pytest.raises(CompileError, match="kernels for bf16, not for f32: build with --dtype bf16"):
        choose(f32, target, rows)
    wide = desc.Attention(args_of("q", "kv:kv", "out!"), 2, 1, 512, "bf16", 64, 1.0, 0, "bf16")
    with pytest.raises(CompileError, match="heads of up to 256, not of 512"):
        choose(wide, target, rows)
    long = desc.LatentAttention(args_of("q", "kv:kv", "out!"), 2, 1088, 1024, "bf16", 64, 1.0, "bf16")
    with pytest.raises(CompileError, match=r"latents of up to 512 \+ 256, not of 1024 \+ 64"):
        choose(long, target, rows)
    parts = desc.Attention(args_of("q", "kv:kv", "part", "out!"), 2, 1, 64, "bf16", 64, 1.0, 0, "f32", 2)
    with pytest.raises(CompileError, match="build without --cp"):
        choose(parts, target, rows)


def test_reading_cubins() -> None:
    with pytest.raises(InternalError, match="no ELF64"):
        parameters(b"nothing", "kernel")
    with pytest.raises(InternalError, match="ptxas says nothing like"):
        resources("")
