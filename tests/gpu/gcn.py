"""What the machine code of a kernel for an AMD GPU must and must not hold: of the text that Triton's LLVM
assembles, and of the code object's kernel descriptor, which the GPU reads (LLVM, "User Guide for AMDGPU
Backend"); the note, which a runtime reads, must say the same."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

from tscompile.kernels.gpu import hsaco
from tscompile.kernels.gpu.build import Compiled
from tscompile.kernels.gpu.cubin import sections
from tscompile.kernels.gpu.spec import GpuKernel
from tscompile.kernels.gpu.target import GpuTarget

PRODUCTS = (
    "linear",
    "experts",
    "head_linear",
    "attention",
)  # on the matrix cores
SIMDS = 4  # of a compute unit; a block's waves are dealt out to them
SIMD_REGISTERS = 512  # vector registers of a lane, for all waves of a SIMD
WIDE = r"(global|buffer)_load_(lds_)?dwordx4"


def instructions(isa: str) -> list[str]:
    """Mnemonics, in order."""
    code = isa.partition(".section")[0]
    return re.findall(r"^\t([a-z]\w+)(?=\s|$)", code, re.MULTILINE)


def descriptor(binary: bytes) -> tuple[int, int, int]:
    """Of the only kernel: bytes of static LDS, of scratch, and of the kernarg segment."""
    (rodata,) = (data for name, data in sections(binary) if name == ".rodata")
    assert len(rodata) == 64
    shared, scratch, kernarg = struct.unpack_from("<III", rodata)
    return shared, scratch, kernarg


def lint(kernel: GpuKernel, made: Compiled, target: GpuTarget) -> list[str]:
    """What is wrong, a line each."""
    rules: tuple[Callable[..., Iterator[str]], ...] = (attributes, memory, products)
    code = instructions(made.isa)
    return [
        f"{kernel.symbol} for {target.name}: {problem}"
        for rule in rules
        for problem in rule(kernel, made, target, code)
    ]


def attributes(kernel: GpuKernel, made: Compiled, target: GpuTarget, code: list[str]) -> Iterator[str]:
    assert isinstance(target.arch, str)
    said, threads = hsaco.kernel_of(made.binary, kernel.symbol, target.arch), target.warp * made.num_warps
    if hsaco.parameters(said) != kernel.table or {arg[".value_kind"] for arg in said[".args"]} != {
        "global_buffer"
    }:
        yield f"takes {said['.args']}, the plan packs {kernel.table}"
    shared, scratch, kernarg = descriptor(made.binary)
    if not kernarg == said[".kernarg_segment_size"] == sum(kernel.table[-1]):
        yield f"{kernarg} bytes of arguments, the plan packs {sum(kernel.table[-1])}"
    if said[".wavefront_size"] != target.warp:
        yield f"wavefronts of {said['.wavefront_size']}"
    if not target.warp <= threads <= min(target.block_threads, said[".max_flat_workgroup_size"]):
        yield f"{threads} threads, compiled for {said['.max_flat_workgroup_size']}"
    if shared + made.shared_bytes > target.shared_bytes or shared != said[".group_segment_fixed_size"]:
        yield f"{shared} and {made.shared_bytes} bytes of LDS of {target.shared_bytes}"
    registers = -(-made.resources.registers // 8) * 8 * -(-made.num_warps // SIMDS)
    if registers > SIMD_REGISTERS:
        yield f"{made.resources.registers} registers for each of {made.num_warps} waves"
    if scratch or made.resources.stack or made.resources.spills:
        yield f"{scratch} bytes of scratch, {made.resources.spills} of spills"


def memory(kernel: GpuKernel, made: Compiled, target: GpuTarget, code: list[str]) -> Iterator[str]:
    if used := sorted({name for name in code if name.startswith("scratch_")}):
        yield f"scratch memory: {', '.join(used)}"
    # a wavefront's block may be too small for 16 bytes a lane: bf16, splits or scores in f32
    config = dict(kernel.config.values)
    block = 4 * config["groups"] * config["members"] if "groups" in config else 2 * config["block"]
    block = 4 * config["block"] * config["splits"] if "splits" in config else block
    small = made.num_warps == 1 and block < 16 * target.warp
    if not any(re.fullmatch(WIDE if not small else WIDE.replace("4", "[24]"), name) for name in code):
        yield "no load of 128 bits"


def products(kernel: GpuKernel, made: Compiled, target: GpuTarget, code: list[str]) -> Iterator[str]:
    if kernel.template in PRODUCTS and not target.products & set(code):
        yield f"no {' or '.join(sorted(target.products))}: its products are not on the matrix cores"
