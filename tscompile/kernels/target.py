"""Targets by name; and the CPU's: what each may use, and the sizes of cache that tiles are cut for.

Flags name just what the engine checks for before it takes a target (csrc/host.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass

from tscompile.errors import CompileError
from tscompile.kernels.gpu.target import GPU_TARGETS, GpuTarget


@dataclass(frozen=True)
class Target:
    """l2_bytes: what a kernel may count on, of the smallest such machine."""

    name: str
    flags: tuple[str, ...]
    lanes512: int  # 1: a vector is one AVX-512 register; 0: two of AVX2
    amx: bool
    l2_bytes: int
    features: frozenset[str]  # as /proc/cpuinfo writes them


_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_AMX = (*_AVX512, "-mamx-tile", "-mamx-bf16")


def _features(flags: tuple[str, ...]) -> frozenset[str]:
    return frozenset(flag[2:].replace("-", "_") for flag in flags)


TARGETS = {
    target.name: target
    for target in (
        Target("cpu-avx2", _AVX2, 0, False, 512 << 10, _features(_AVX2)),
        Target("cpu-avx512", _AVX512, 1, False, 1 << 20, _features(_AVX512)),
        Target("cpu-amx", _AMX, 1, True, 2 << 20, _features(_AMX)),
    )
}


def find_target(name: str) -> Target | GpuTarget:
    """The target of this name; CompileError with what is known."""
    known: dict[str, Target | GpuTarget] = {**TARGETS, **GPU_TARGETS}
    if name not in known:
        raise CompileError(f"unknown target {name!r}; known are {', '.join(known)}")
    return known[name]
