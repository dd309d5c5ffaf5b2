"""Kernels -> cubins, or AMD's code objects, compiled in worker processes and cached by content.

A worker (tscompile/kernels/gpu/worker.py) has Triton loaded, and its own environment: no variable that
changes what Triton makes reaches it. As many work as there are cores and memory for.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tscompile.errors import CompileError, InternalError
from tscompile.kernels.build import publish
from tscompile.kernels.gpu import cubin, hsaco
from tscompile.kernels.gpu.cubin import Resources
from tscompile.kernels.gpu.emit import emit
from tscompile.kernels.gpu.spec import GpuKernel
from tscompile.kernels.gpu.target import GpuTarget
from tscompile.layout import ALIGN

WORKER = Path(__file__).resolve().parent / "worker.py"
WORKER_BYTES = 1 << 30  # a worker and its ptxas at most: 0.35 GiB was the largest seen
TENSOR_COLUMNS = 512  # of tensor memory, of a multiprocessor of sm_100a
KEPT = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
MISSING = (
    "compiling for {target} needs the Python package triton, which torch brings on Linux: "
    "pip install 'tscompile[build]'. No GPU and no CUDA toolkit is needed"
)
UNUSABLE = (
    "compiling for {target} needs the Python package triton, and this one cannot be used ({why}): "
    "pip install 'tscompile[build]' brings the one that the kernels are written for"
)
Progress = Callable[[int, int], None]  # kernels done, of how many


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code: a cubin, or a code object of an AMD GPU, whose text is `isa`. num_warps,
    shared_bytes, num_ctas: how it is launched; params: (offset, bytes) of each parameter, as it says itself.
    randomised: whether another build may give other bytes (tscompile/kernels/gpu/worker.py)."""

    binary: bytes
    params: list[tuple[int, int]]
    num_warps: int
    num_ctas: int
    shared_bytes: int
    tensor_columns: int  # of tensor memory, on sm_100a
    resources: Resources
    randomised: bool
    isa: str = ""

    @classmethod
    def of(cls, kernel: GpuKernel, answer: Mapping[str, Any], target: GpuTarget) -> Compiled:
        """Checked against what the plan will say of the kernel. InternalError if it differs."""
        binary, where = base64.b64decode(answer["binary"]), f"{kernel.symbol} for {target.name}"
        if isinstance(target.arch, str):
            said = hsaco.kernel_of(binary, kernel.symbol, target.arch)
            found, taken = hsaco.parameters(said), hsaco.resources(said)
        else:
            found, taken = cubin.parameters(binary, kernel.symbol), cubin.resources(answer["ptxas"])
        if found != kernel.table:
            raise InternalError(f"{where} takes parameters at {found}, the plan packs {kernel.table}")
        if answer["global_scratch_size"] or answer["profile_scratch_size"]:
            raise InternalError(f"{where} wants scratch memory, which no launch gives it")
        if answer["shared"] > target.shared_bytes:
            raise InternalError(
                f"{where} takes {answer['shared']} bytes of shared memory, there are {target.shared_bytes}"
            )
        if (answer["tmem_size"] or 0) > TENSOR_COLUMNS:  # Triton compiles such a kernel to nothing
            raise InternalError(
                f"{where} takes {answer['tmem_size']} columns of tensor memory, there are {TENSOR_COLUMNS}"
            )
        return cls(
            binary,
            found,
            answer["num_warps"],
            answer["num_ctas"],
            answer["shared"],
            answer["tmem_size"] or 0,
            taken,
            answer["randomised"],
            answer.get("isa", ""),
        )


def compile_all(
    kernels: Sequence[GpuKernel],
    target: GpuTarget,
    *,
    cache: Path,
    progress: Progress = lambda done, total: None,
) -> tuple[dict[str, Compiled], str]:
    """Each kernel's symbol -> what was made of it, and the compilers' versions.

    CompileError if there is no Triton that works, or the cache cannot be written; InternalError, with the
    compiler's words, if a kernel does not compile."""
    distinct, version = {kernel.symbol: kernel for kernel in kernels}, compilers(target)
    sources = {
        symbol: emit(kernel, dependent_launch=target.dependent_launch) for symbol, kernel in distinct.items()
    }
    with _Workers(target, min(num_workers(), len(distinct))) as workers:
        folder = cache / "cubins"
        done = 0

        def one(kernel: GpuKernel) -> Compiled:
            job = {
                "source": sources[kernel.symbol],
                "symbol": kernel.symbol,
                "types": [param.type for param in kernel.params],
                "num_warps": kernel.config.num_warps,
                "num_stages": kernel.config.num_stages,
                "target": (target.backend, target.arch, target.warp),
            }
            text = json.dumps([version, WORKER.read_text(), job], sort_keys=True)
            path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
            if not path.is_file():
                answer = workers.ask(job)
                if "unusable" in answer:
                    raise CompileError(UNUSABLE.format(target=target.name, why=answer["unusable"]))
                if "error" in answer:
                    raise InternalError(f"{kernel.symbol} for {target.name}: {answer['error']}")
                Compiled.of(kernel, answer, target)
                publish(json.dumps(answer, sort_keys=True).encode(), path)
            return Compiled.of(kernel, json.loads(path.read_text()), target)

        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = {}
            with ThreadPoolExecutor(workers.num) as pool:
                for kernel, made in zip(distinct.values(), pool.map(one, distinct.values()), strict=True):
                    found[kernel.symbol] = made
                    done += 1
                    progress(done, len(distinct))
        except OSError as error:
            raise CompileError(
                f"cannot write the kernel cache in {cache}: {error.strerror or error}. "
                "XDG_CACHE_HOME names another place for it"
            ) from error
    return found, version


def library_of(compiled: Mapping[str, Compiled], target: GpuTarget) -> tuple[bytes, dict[str, Any]]:
    """What the plan holds of kernels: their machine code, one after the other, each at a multiple of 64; and
    the program's "kernels", by symbol (ARCHITECTURE.md, "GPU targets")."""
    library, table = b"", {}
    for symbol, made in sorted(compiled.items()):
        table[symbol] = {
            "offset": len(library),
            "bytes": len(made.binary),
            "threads": target.warp * made.num_warps,
            "shared_bytes": made.shared_bytes,
            "registers": made.resources.registers,
            "params": made.params,
        }
        library += made.binary + b"\0" * (-len(made.binary) % ALIGN)
    return library, table


def compilers(target: GpuTarget) -> str:
    """Versions of Triton and, if it is a program of its own, of the assembler that it brings for the target,
    for the plan and for cache keys. CompileError if there is no Triton, or none of its assembler."""
    found = importlib.util.find_spec("triton")
    if found is None or not found.submodule_search_locations:
        raise CompileError(MISSING.format(target=target.name))
    version = f"triton {importlib.metadata.version('triton')}"
    if not target.assembler:
        return version
    assembler = Path(found.submodule_search_locations[0]) / "backends/nvidia/bin" / target.assembler
    try:
        said = subprocess.run([assembler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "strerror", None) or error
        raise CompileError(
            f"compiling for {target.name} needs {assembler.name}, which the Python package triton brings, "
            f"and {assembler} does not run ({why}): pip install --force-reinstall triton"
        ) from None
    return f"{version}, ptxas {said.strip().split(' V')[-1].split()[0]}"


def num_workers() -> int:
    """One a core, and no more than there is memory for."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), available // WORKER_BYTES))


class _Workers:
    """Worker processes, each for one job at a time, started when they are first asked."""

    def __init__(self, target: GpuTarget, num: int) -> None:
        self.target, self.num = target, max(1, num)
        self.started: list[subprocess.Popen[str]] = []
        self.idle: SimpleQueue[subprocess.Popen[str] | None] = SimpleQueue()
        for _ in range(self.num):
            self.idle.put(None)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            process.kill()
            process.communicate()

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one job. InternalError if the worker dies of it."""
        process = self.idle.get() or self._start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise InternalError(
                    f"{job['symbol']} for {self.target.name}: the worker that compiled it ended with status "
                    f"{process.wait()}"
                )
            answer: dict[str, Any] = json.loads(line)
            return answer
        finally:
            self.idle.put(process if process.poll() is None else None)

    def _start(self) -> subprocess.Popen[str]:
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            env=environment | {"LC_ALL": "C", "TRITON_DISABLE_LINE_INFO": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.started.append(process)
        return process
