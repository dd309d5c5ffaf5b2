"""What the machine code of a kernel must and must not hold, by cuobjdump, which Triton's wheel brings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gcn
import triton

from tscompile.kernels.gpu.build import Compiled
from tscompile.kernels.gpu.spec import GpuKernel
from tscompile.kernels.gpu.target import GpuTarget

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_ROWS = 64  # of its first operand, that an instruction of a warp group takes
WAIT, LET_NEXT_BEGIN = "ACQBULK", "PREEXIT"  # griddepcontrol
LINEAR, GEMV, ATTENTION = "linear", "gemv", "attention"
TILED = (LINEAR, "experts", "head_linear")  # templates whose operands are copied in tiles
PRODUCTS = (*TILED, ATTENTION, "latent_attention")  # and all whose products are on the tensor cores


def dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def parameters(cubin: bytes) -> list[tuple[int, int]]:
    """(offset, bytes) of each parameter, as cuobjdump reads the file."""
    words = re.findall(
        r"Ordinal : 0x([0-9a-f]+)\s+Offset\s*: 0x([0-9a-f]+)\s+Size\s*: 0x([0-9a-f]+)", dump(cubin, "-elf")
    )
    found = {int(ordinal, 16): (int(offset, 16), int(size, 16)) for ordinal, offset, size in words}
    return [found[ordinal] for ordinal in sorted(found)]


def instructions(cubin: bytes) -> list[str]:
    """Mnemonics, with their modifiers, in order of address."""
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", dump(cubin, "-sass"), re.MULTILINE)
    return [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in lines]


def lint(kernel: GpuKernel, made: Compiled, target: GpuTarget) -> list[str]:
    """What is wrong, a line each."""
    if target.backend == "hip":
        return gcn.lint(kernel, made, target)
    code = instructions(made.binary)
    rules: tuple[Callable[..., Iterator[str]], ...] = (attributes, memory, products, dependent_launch)
    return [
        f"{kernel.symbol} for {target.name}: {problem}"
        for rule in rules
        for problem in rule(kernel, made, target, code)
    ]


def attributes(kernel: GpuKernel, made: Compiled, target: GpuTarget, code: list[str]) -> Iterator[str]:
    if parameters(made.binary) != kernel.table:
        yield f"takes parameters {parameters(made.binary)}, the plan packs {kernel.table}"
    if not 32 <= 32 * made.num_warps <= target.block_threads:
        yield f"{made.num_warps} warps"
    if made.num_ctas != 1:
        yield f"clusters of {made.num_ctas}, which no launch here asks for"
    if made.shared_bytes > target.shared_bytes:
        yield f"{made.shared_bytes} bytes of shared memory of {target.shared_bytes}"
    if 32 * made.num_warps * made.resources.registers > target.sm_registers:
        yield f"{made.resources.registers} registers for each of {32 * made.num_warps} threads"
    yield from made.resources.warnings


def memory(kernel: GpuKernel, made: Compiled, target: GpuTarget, code: list[str]) -> Iterator[str]:
    if made.resources.spills or made.resources.stack:
        yield f"{made.resources.spills} bytes of spills, {made.resources.stack} of stack"
    if local := sorted({name for name in code if name.startswith(("LDL", "STL"))}):
        yield f"local memory: {', '.join(local)}"
    wide = [name for name in code if re.match(r"(LDG|LDGSTS)\..*128|UTMALDG|UBLKCP", name)]
    if not wide:
        yield "no load of 128 bits"
    narrow = [name for name in code if name.startswith("LDGSTS") and "128" not in name]
    if kernel.template in TILED and narrow:
        yield f"operands are copied by {sorted(set(narrow))}"


def products(kernel: GpuKernel, made: Compiled, target: GpuTarget, code: list[str]) -> Iterator[str]:
    if kernel.template not in PRODUCTS:
        return
    config = dict(kernel.config.values)
    first = config["columns"] if config.get("swap") else config["rows"]
    wanted = target.products if first >= TENSOR_ROWS else {*target.products, "HMMA"}
    if not any(name.split(".")[0] in wanted for name in code):
        yield f"no {' or '.join(sorted(wanted))}: its products are not on the tensor cores"


def dependent_launch(kernel: GpuKernel, made: Compiled, target: GpuTarget, code: list[str]) -> Iterator[str]:
    names = [name.split(".")[0] for name in code]
    if WAIT not in names or LET_NEXT_BEGIN not in names:
        yield "no griddepcontrol"
        return
    before = names[: names.index(WAIT)]
    if written := {"STG", "RED", "ATOMG", "EXIT", "UTMASTG"} & set(before):
        yield f"{', '.join(sorted(written))} before griddepcontrol.wait"
    if kernel.template in (LINEAR, GEMV, "rms_norm", "head_linear") and not {"LDG", "CCTL"} & set(before):
        yield "no weight is read or brought into L2 before griddepcontrol.wait"
