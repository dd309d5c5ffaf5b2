"""Compiles kernels for every target and calls them on numpy arrays, as the engine would.
 A variant is a target, run natively where the host can, and, for cpu-avx512 and cpu-amx always, by the
emulated intrinsics of emulation/emulate.h. All kernels of a variant are one translation unit, which takes a
fraction of the time."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import kernel_arrays as arrays
import numpy as np
import simde_py

from tscompile.kernels import build as kernels
from tscompile.kernels.desc import KernelDesc
from tscompile.kernels.emit import emit, headers
from tscompile.kernels.host import host_targets
from tscompile.kernels.select import choose
from tscompile.kernels.target import TARGETS

HERE = Path(__file__).resolve().parent
WARNINGS = ("-Wall", "-Wextra", "-Werror")
# gcc 12's AVX-512 intrinsics begin with registers that they leave undefined
NATIVE = (*WARNINGS, "-Wno-uninitialized", "-Wno-maybe-uninitialized")
EMULATED = ("-DTS_EMULATE", "-O1", "-fno-inline", "-w")
RUNNER = """
TS_KERNEL run_kernel(ts_kernel kernel, const ts_args *args, int threads) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // denormals are zero, both ways, as in every worker
  for (int thread = 0; thread < threads; ++thread) kernel(args, thread, threads);
  _mm_setcsr(before);
}
TS_KERNEL run_exp(const float *x, float *y, int64_t n) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  for (int64_t i = 0; i < n; i += 16) store(y + i, exp(load(x + i)));
  _mm_setcsr(before);
}
"""


@dataclass(frozen=True)
class Variant:
    target: str
    emulated: bool = False

    def __str__(self) -> str:
        return f"{self.target}{'-emulated' if self.emulated else ''}"


BASE = Variant("cpu-avx2")  # what the others must equal, bit for bit
NATIVES = tuple(Variant(name) for name in TARGETS if name in host_targets())
VARIANTS = (*NATIVES, Variant("cpu-avx512", True), Variant("cpu-amx", True))
DESCS: dict[str, KernelDesc] = {}  # by the tests' names for them


def desc(name: str, made: KernelDesc) -> str:
    """Registers a kernel that a test module calls; all are compiled together. Returns the name."""
    assert name not in DESCS
    DESCS[name] = made
    return name


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("num_tokens", "num_seqs", "num_logits", "page_table_stride")),
        *((name, ctypes.c_void_p) for name in arrays.BATCH_ARRAYS),
    ]


class _Args(ctypes.Structure):
    _fields_ = [("batch", ctypes.POINTER(_Batch)), ("ptr", ctypes.POINTER(ctypes.c_void_p))]


def merged(target: str, descs: Iterable[KernelDesc]) -> str:
    """One translation unit: the includes once, each kernel in a namespace of its own."""
    distinct = {made.symbol: made for made in descs}
    parts = []
    for symbol, made in sorted(distinct.items()):
        lines = emit(made, choose(made, TARGETS[target]), TARGETS[target]).splitlines()
        kept = [line for line in lines if not line.startswith(("#include", "#define TS_AVX512"))]
        parts.append("\n".join([f"namespace in_{symbol} {{", *kept, "}"]))
    includes = [f'#include "{name}"' for name in ("launch_abi.h", "head.h", "latent.h")]
    return "\n".join([f"#define TS_AVX512 {TARGETS[target].lanes512}", *includes, RUNNER, *parts])


def compile_variant(variant: Variant, descs: Iterable[KernelDesc]) -> ctypes.CDLL:
    """Compiled once a content, in the kernels' cache."""
    compiler, target = kernels.find_compiler(), TARGETS[variant.target]
    flags = list(TARGETS[BASE.target].flags if variant.emulated else target.flags)
    flags += EMULATED if variant.emulated else NATIVE
    files = {**headers(), "kernels.cpp": merged(variant.target, descs)}
    files["emulate.h"] = (HERE / "emulation" / "emulate.h").read_text()
    key = hashlib.sha256(repr((compiler.version, kernels.COMPILE, flags, sorted(files.items()))).encode())
    folder = kernels.cache_folder() / "tests" / key.hexdigest()
    library = folder / "kernels.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
        options = [flag for flag in kernels.COMPILE if flag != "-w"]
        include = f"-I{Path(simde_py.__file__).parent / 'simde'}"
        made = f"made-{os.getpid()}.so"
        done = compiler.run([*options, *flags, include, "-shared", "kernels.cpp", "-o", made], folder)
        assert done.returncode == 0, done.stderr[:4000]
        (folder / made).rename(library)
    return ctypes.CDLL(str(library))


@cache
def libraries() -> dict[Variant, ctypes.CDLL]:
    if any(variant.target == "cpu-amx" and not variant.emulated for variant in VARIANTS):
        # ARCH_REQ_XCOMP_PERM of the tiles' data: once a process
        assert ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(
            zip(VARIANTS, pool.map(lambda v: compile_variant(v, DESCS.values()), VARIANTS), strict=True)
        )


class Buffer:
    """An aligned array between two guards. Filled with NaN's bytes unless given."""

    GUARD = 256

    def __init__(self, shape: Sequence[int], dtype: Any, data: Any = None) -> None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.raw = np.full(size + 2 * self.GUARD + 64, 0xFF, np.uint8)
        start = -self.raw.ctypes.data % 64 + self.GUARD
        self.guards = (self.raw[:start], self.raw[start + size :])
        self.array = self.raw[start : start + size].view(dtype).reshape(shape)
        if data is not None:
            self.array[...] = data

    def check(self) -> None:
        assert all((guard == 0xFF).all() for guard in self.guards), "a kernel wrote beside its buffer"


def arguments_of(
    made: KernelDesc, batch: Mapping[str, Any], arguments: Mapping[str, Buffer]
) -> tuple[_Args, Any]:
    """ts_args of a call, and what must stay alive while it runs."""
    buffers = [next(arguments[role] for role in arg.roles) for arg in made.args]
    kept = {key: np.ascontiguousarray(batch[key], np.int32) for key in arrays.BATCH_ARRAYS if key in batch}
    table = kept.get("page_table")
    c_batch = _Batch(
        num_tokens=batch.get("num_tokens", len(kept.get("positions", kept.get("token_ids", [0])))),
        num_seqs=len(kept["context_len"]) if "context_len" in kept else 1,
        num_logits=len(kept["logit_rows"]) if "logit_rows" in kept else 0,
        page_table_stride=table.shape[1] if table is not None else 0,
        **{key: array.ctypes.data for key, array in kept.items()},
    )
    pointers = (ctypes.c_void_p * len(buffers))(*[buffer.array.ctypes.data for buffer in buffers])
    return _Args(ctypes.pointer(c_batch), pointers), (kept, c_batch, pointers, buffers)


def call(
    name: str,
    variant: Variant,
    batch: Mapping[str, Any],
    arguments: Mapping[str, Buffer],
    threads: int = 1,
) -> None:
    """Runs a kernel on arguments by role. Every argument stays within its bounds; those not written stay as
    they were."""
    made, library = DESCS[name], libraries()[variant]
    args, kept = arguments_of(made, batch, arguments)
    buffers = kept[-1]
    before = [buffer.array.copy() for buffer in buffers]
    kernel = ctypes.cast(getattr(library, made.symbol), ctypes.c_void_p)
    library.run_kernel(kernel, ctypes.byref(args), threads)
    for arg, buffer, old in zip(made.args, buffers, before, strict=True):
        buffer.check()
        if not arg.written:
            assert buffer.array.tobytes() == old.tobytes(), f"the kernel wrote {arg.roles}"
