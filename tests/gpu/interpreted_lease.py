"""A dry run of tests/gpu/lease.py without a GPU: the fake driver in place of NVIDIA's, whose kernels are
Triton's interpreter where they belong to a case, and nothing where they are timed or the small model's.

    TRITON_INTERPRET=1 python tests/gpu/interpreted_lease.py

Exit status 1, and a line a problem, unless the report has all that a real one has, and every case is right.
"""

from __future__ import annotations

import ctypes as c
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import lease
from fake_driver import FakeDriver, library_path
from triton_arrays import CASES
from triton_case import TORCH, compiled

from tscompile.kernels import desc
from tscompile.kernels.gpu.lockfile import Lockfile
from tscompile.kernels.gpu.offers import Choice
from tscompile.kernels.gpu.select import decide
from tscompile.kernels.gpu.spec import POINTER_BYTES


def dry_run(folder: Path) -> list[str]:
    """What is wrong with the report."""
    lease.prepare(folder, 1, lease.TIMED[:1])
    kernels = {kernel.symbol: kernel for kernel in lease.kernels_of_cases(1)}

    def run(symbol: str, grid: tuple[int, int, int], addresses: list[int]) -> None:
        if symbol not in kernels:
            return
        params = kernels[symbol].params
        arrays = [
            torch.frombuffer((c.c_uint8 * POINTER_BYTES).from_address(at), dtype=TORCH[param.dtype])
            for param, at in zip(params, addresses, strict=False)
        ]
        compiled(kernels[symbol])[grid](*arrays)

    fake = FakeDriver("", run)
    out = folder / "report.json"
    status = lease.run(folder, out, str(library_path()), quick=True)
    fake.check()
    report = json.loads(out.read_text())
    wrong = [f"{case['kind']}: {case['error']}" for case in report["cases"] if "error" in case]
    if {case["kind"] for case in report["cases"]} != set(CASES) or report["refused"]:
        wrong.append("not every kind has a case, or a kernel was refused")
    if status != 1 or report["engine"]["max_difference"] < 1:
        wrong.append("the model's kernels did nothing, and the report says that all is well")
    keys = {"device", "arch", "target", "compiler", "num_loaded", "cases", "engine", "linears", "seconds"}
    if missing := keys - set(report):
        wrong.append(f"the report lacks {sorted(missing)}")
    if len(report["linears"]) != 4 * len(lease.SHAPES):
        wrong.append(f"{len(report['linears'])} linear layers were timed, wanted 4 a model")
    lock = Lockfile.read(folder / "kernels.lock")
    asked = [choose_by(lock, made) for shape in lease.SHAPES.values() for made in lease.linears_of(shape)]
    if len(lock.used) != len(lock.entries) or not all("says the lockfile" in choice.why for choice in asked):
        wrong.append("the lockfile is not what a build of these models asks for")
    return wrong


def choose_by(lock: Lockfile, made: desc.Linear) -> Choice:
    return decide(made, lease.TARGET, lease.rows_of(lease.TIMED[0]), lock)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="tscompile-") as folder:
        problems = dry_run(Path(folder))
    print("\n".join(problems) if problems else "a dry run of lease.py: no problem")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
