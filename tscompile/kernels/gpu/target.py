"""The device targets: what one kernel may use, and what the machine that it is tuned for has.

Limits of a multiprocessor are those of the CUDA C++ Programming Guide's table of technical specifications
for compute capabilities 9.0 and 10.0; speeds are in tscompile/topologies.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuTarget:
    """shared_bytes: of one thread block, with the opt-in attribute; sm_*: what blocks of one multiprocessor
    share out; latency_s: of a read that no cache holds, for how many bytes must be on their way."""

    name: str
    arch: int  # compute capability, 10 * major + minor
    num_sms: int
    products: frozenset[str]  # SASS of tl.dot on the tensor cores, for tiles of 64 rows and more
    shared_bytes: int = 227 << 10
    sm_shared_bytes: int = 228 << 10
    sm_registers: int = 65536
    sm_threads: int = 2048
    sm_blocks: int = 32
    block_threads: int = 1024
    latency_s: float = 0.8e-6


GPU_TARGETS = {
    target.name: target
    for target in (
        GpuTarget("sm_90a", 90, 132, frozenset({"HGMMA"})),  # H200 SXM
        GpuTarget("sm_100a", 100, 148, frozenset({"UTCHMMA"})),  # B200
    )
}
