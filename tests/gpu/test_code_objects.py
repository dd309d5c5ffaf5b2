"""Kernels for AMD's GPUs, compiled without one: what their code objects say of themselves, by LLVM's own
words where there are some, the same bytes anywhere, and plans that hold them."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import engine as api
import gcn
import plans
import pytest
import yaml
from checkpoints import Spec
from kernels_of_models import linear

from tscompile.errors import InternalError
from tscompile.explain import explain, explain_text
from tscompile.kernels import desc
from tscompile.kernels.build import cache_folder
from tscompile.kernels.desc import args_of
from tscompile.kernels.gpu import hsaco
from tscompile.kernels.gpu.build import Compiled, compile_all
from tscompile.kernels.gpu.emit import emit
from tscompile.kernels.gpu.select import Rows, choose
from tscompile.kernels.gpu.spec import POINTER_BYTES, GpuKernel
from tscompile.kernels.gpu.target import GPU_TARGETS
from tscompile.reader import Plan

TARGET = GPU_TARGETS["gfx950"]
SPEC = Spec("qwen3", {"vocab_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
LIMITS = {"max_tokens": 4, "max_seqs": 2, "page_size": 32}


def product() -> GpuKernel:
    return choose(linear(256, 256), TARGET, Rows(8, 8)).launches[0].kernel


@pytest.fixture(scope="module")
def made() -> Compiled:
    return compile_all([product()], TARGET, cache=cache_folder())[0][product().symbol]


def test_the_note_is_what_llvm_says(made: Compiled) -> None:
    """The code object's MessagePack holds what the assembly's YAML does, both by LLVM; and the descriptor
    that the GPU reads agrees."""
    text = made.isa.split(".amdgpu_metadata")[1].split("---")[1].split("...")[0]
    (written,) = yaml.safe_load(text)["amdhsa.kernels"]
    read = hsaco.kernel_of(made.binary, product().symbol, "gfx950")
    assert read == written
    assert hsaco.parameters(read) == made.params == product().table
    assert read[".wavefront_size"] == TARGET.warp
    assert gcn.descriptor(made.binary)[1:] == (0, POINTER_BYTES * len(product().table))


def test_messagepack() -> None:
    """Each form, by the table of formats of its specification."""
    forms: list[tuple[bytes, Any]] = [
        (b"\x07", 7),
        (b"\xff", -1),
        (b"\xc0", None),
        (b"\xc2", False),
        (b"\xc3", True),
        (b"\xcc\xc8", 200),
        (b"\xcd\x01\x00", 256),
        (b"\xce\x00\x01\x00\x00", 65536),
        (b"\xcf" + struct.pack(">Q", 2**40), 2**40),
        (b"\xd0\x80", -128),
        (b"\xd1\xff\x00", -256),
        (b"\xd2" + struct.pack(">i", -(2**20)), -(2**20)),
        (b"\xd3" + struct.pack(">q", -(2**40)), -(2**40)),
        (b"\xca" + struct.pack(">f", 1.5), 1.5),
        (b"\xcb" + struct.pack(">d", 1.1), 1.1),
        (b"\xa2ab", "ab"),
        (b"\xd9\x03abc", "abc"),
        (b"\xda\x00\x01a", "a"),
        (b"\xdb\x00\x00\x00\x01a", "a"),
        (b"\x92\x01\xa1x", [1, "x"]),
        (b"\xdc\x00\x01\x05", [5]),
        (b"\xdd\x00\x00\x00\x01\x05", [5]),
        (b"\x81\xa1k\x93\x01\x02\x03", {"k": [1, 2, 3]}),
        (b"\xde\x00\x01\xa1k\x05", {"k": 5}),
        (b"\xdf\x00\x00\x00\x01\xa1k\x05", {"k": 5}),
    ]
    for data, value in forms:
        assert hsaco.unpack(b"?" + data + b"?", 1) == (value, len(data) + 1)
    with pytest.raises(InternalError, match="MessagePack type 0xc4"):
        hsaco.unpack(b"\xc4\x01a")


def test_what_is_no_code_object_of_the_target(made: Compiled) -> None:
    other = bytearray(made.binary)
    other[48] = 0x4C  # gfx942
    with pytest.raises(InternalError, match=r"machine \(224, 76\), wanted \(224, 79\), which is gfx950"):
        hsaco.kernel_of(bytes(other), product().symbol, "gfx950")
    with pytest.raises(InternalError, match="no kernel other"):
        hsaco.kernel_of(made.binary, "other", "gfx950")
    with pytest.raises(InternalError, match="without AMDGPU metadata"):
        hsaco.kernel_of(made.binary.replace(b"AMDGPU\0", b"amdgpu\0"), product().symbol, "gfx950")


def test_the_lint_can_fail(made: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule, on a code object that is not what it is said to be."""
    kernel = product()
    assert not gcn.lint(kernel, made, TARGET)
    with monkeypatch.context() as patch:
        patch.setattr(GpuKernel, "table", property(lambda _: [(0, 8)]))
        lines = gcn.lint(kernel, made, TARGET)
    assert any("the plan packs [(0, 8)]" in line for line in lines)
    assert any("the plan packs 8" in line for line in lines)
    wrong = replace(
        made,
        num_warps=32,
        shared_bytes=161 << 10,
        resources=made.resources._replace(registers=513, stack=4),
        isa="\tscratch_load_dword v0\n\tv_mfma_f32_4x4x4_16b_f16\n",
    )
    lines = "\n".join(list(gcn.attributes(kernel, wrong, TARGET, [])))
    for word in ("2048 threads", "of LDS of 163840", "513 registers", "of scratch, 0 of spills"):
        assert word in lines
    code = gcn.instructions(wrong.isa)
    assert list(gcn.memory(kernel, wrong, TARGET, code)) == [
        "scratch memory: scratch_load_dword",
        "no load of 128 bits",
    ]
    assert "not on the matrix cores" in next(gcn.products(kernel, wrong, TARGET, code))


def test_no_dependent_launch() -> None:
    """A kernel begins when the one before it is done: nothing waits, and nothing of CUDA is in it."""
    source = emit(product(), dependent_launch=False)
    assert "gdc" not in source
    assert "cuda" not in source
    assert "asm" not in source
    assert "gdc_wait()" in emit(product())


def test_same_bytes_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Compiled) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("AMDGCN_USE_BUFFER_OPS", "0")  # of no concern to the workers
    monkeypatch.chdir(tmp_path)
    again, _ = compile_all([product()], TARGET, cache=tmp_path)
    assert again[product().symbol].binary == made.binary


def test_a_plan_of_code_objects(tmp_path: Path) -> None:
    """Every launch packs what its code object takes; the engine says what it runs instead."""
    checkpoints.make(SPEC, tmp_path / "checkpoint")
    path = plans.build(tmp_path / "checkpoint", tmp_path / "plan.tsp", "bf16", ("gfx950",), **LIMITS)
    plan = Plan(path)
    program, library = plan.json("tsp/program/gfx950"), bytes(plan.bytes("tsp/kernels/gfx950"))
    launches = [launch for bucket in program["buckets"] for launch in bucket["launches"]]
    assert {launch["kernel"] for launch in launches} == set(program["kernels"])
    for launch in launches:
        kernel = program["kernels"][launch["kernel"]]
        said = hsaco.kernel_of(library[kernel["offset"] :][: kernel["bytes"]], launch["kernel"], "gfx950")
        packed = [(POINTER_BYTES * i, POINTER_BYTES) for i in range(len(launch["args"]))]
        assert [tuple(param) for param in kernel["params"]] == packed == hsaco.parameters(said)
        assert kernel["threads"] % 64 == 0
        assert kernel["threads"] <= said[".max_flat_workgroup_size"]
        assert kernel["shared_bytes"] <= TARGET.shared_bytes
        assert kernel["registers"] == said[".vgpr_count"]
    assert "kernels of gfx950: bounds" in explain_text(explain(path))
    with pytest.raises(
        api.EngineError,
        match=r"the plan has kernels for gfx950, this host runs .*cpu-avx2.*: build the plan for one of them",
    ) as refused:
        api.Engine(path)
    assert refused.value.status == api.NO_TARGET


def test_a_norm_has_no_products(made: Compiled) -> None:
    norm = desc.RmsNorm(args_of("x", "weight:weight", "out!"), "T", 1, 256, 1e-5, "bf16")
    kernel = choose(norm, TARGET, Rows(8, 8)).launches[0].kernel
    found = compile_all([kernel], TARGET, cache=cache_folder())[0][kernel.symbol]
    assert not gcn.lint(kernel, found, TARGET)
    as_product = replace(product(), template="linear")
    assert list(gcn.products(as_product, found, TARGET, gcn.instructions(found.isa)))
