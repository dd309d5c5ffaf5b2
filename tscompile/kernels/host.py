"""Which targets this machine runs. The engine asks the processor itself when it loads a plan
(csrc/host.cpp)."""

from __future__ import annotations

from pathlib import Path

from tscompile.errors import CompileError
from tscompile.kernels.target import TARGETS

CPUINFO = Path("/proc/cpuinfo")


def host_targets(cpuinfo: str | None = None) -> tuple[str, ...]:
    """Targets that this machine runs, best first. cpuinfo: the text of /proc/cpuinfo, if not this
    machine's."""
    if cpuinfo is None:
        cpuinfo = CPUINFO.read_text() if CPUINFO.exists() else ""
    lines = [line.partition(":")[2] for line in cpuinfo.splitlines() if line.startswith("flags")]
    has = set(lines[0].split()) if lines else set()
    return tuple(name for name, target in reversed(TARGETS.items()) if target.features <= has)


def best_target() -> str:
    """What `tscompile build` compiles for if no --target is given."""
    targets = host_targets()
    if not targets:
        raise CompileError(
            f"this machine runs none of {', '.join(TARGETS)} (they need AVX2 and FMA); "
            "say which to build for with --target"
        )
    return targets[0]
