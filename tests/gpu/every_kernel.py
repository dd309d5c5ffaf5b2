"""`make test-gpu`: every kernel that real models need compiles for every device target, and passes the lint.

A line a target: kernels, seconds, the largest of what they take. Exit status 1, and a line a problem, if any
is wrong.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sass
from kernels_of_models import kernels_of_models

from tscompile.kernels.build import cache_folder
from tscompile.kernels.gpu.build import Compiled, compile_all
from tscompile.kernels.gpu.target import GPU_TARGETS, GpuTarget


def check(target: GpuTarget) -> list[str]:
    """What is wrong with its kernels."""
    start = time.monotonic()
    kernels = {launch.kernel.symbol: launch.kernel for launch in kernels_of_models(target)}
    made, versions = compile_all(list(kernels.values()), target, cache=cache_folder(), progress=show)
    problems = [
        line for kernel in kernels.values() for line in sass.lint(kernel, made[kernel.symbol], target)
    ]
    print(
        f"{target.name}: {len(kernels)} kernels by {versions}, {time.monotonic() - start:.0f} s; {most(made)}"
    )
    return problems


def most(made: dict[str, Compiled]) -> str:
    shared = max(kernel.shared_bytes for kernel in made.values())
    registers = max(kernel.resources.registers for kernel in made.values())
    return f"at most {shared:,} bytes of shared memory, {registers} registers"


def show(done: int, total: int) -> None:
    if sys.stderr.isatty() or done % 20 == 0:
        print(f"  {done} of {total}", file=sys.stderr)


if __name__ == "__main__":
    found = [problem for target in GPU_TARGETS.values() for problem in check(target)]
    print("\n".join(found) if found else "no problem")
    sys.exit(bool(found))
