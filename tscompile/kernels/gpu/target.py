"""The device targets: what one kernel may use, and what the machine that it is tuned for has.

Limits of a multiprocessor are those of the CUDA C++ Programming Guide's table of technical specifications
for compute capabilities 9.0 and 10.0; of AMD's, whose compute units and wavefronts are called
multiprocessors and warps here too, those of ROCm's "AMD GPU specifications" (256 compute units, LDS 160 KiB,
wavefronts of 64, 512 KiB of vector registers) and of LLVM's AMDGPU backend (8 waves of each of 4 SIMDs, 16
work groups of several waves, registers in eights). Speeds are in tscompile/topologies.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuTarget:
    """backend, arch, warp: what Triton calls the target. product_rows: of its first operand, that a tensor
    core takes at once; dependent_launch: whether a kernel may begin before the one before it is done.
    shared_bytes: of one thread block, with the opt-in attribute; shared_reserved: what the system takes
    besides. sm_*: what blocks of one multiprocessor share out; register_unit: of which a warp's are a
    multiple. latency_s: of a read that no cache holds, for how many bytes must be on their way."""

    name: str
    arch: int | str  # compute capability, 10 * major + minor; of AMD's GPUs, their name
    num_sms: int
    products: frozenset[str]  # instructions of tl.dot on the tensor cores, for tiles of product_rows and more
    backend: str = "cuda"
    warp: int = 32
    assembler: str = "ptxas"  # that Triton brings; empty: LLVM and its linker, within Triton
    dependent_launch: bool = True
    product_rows: int = 64
    shared_bytes: int = 227 << 10
    sm_shared_bytes: int = 228 << 10
    shared_reserved: int = 1024
    sm_registers: int = 65536
    register_unit: int = 256
    sm_threads: int = 2048
    sm_blocks: int = 32
    block_threads: int = 1024
    tile_bytes: int = 160 << 10  # of shared memory, for a tile's operands: the epilogue needs some too
    latency_s: float = 0.8e-6


GPU_TARGETS = {
    target.name: target
    for target in (
        GpuTarget("sm_90a", 90, 132, frozenset({"HGMMA"})),  # H200 SXM
        GpuTarget("sm_100a", 100, 148, frozenset({"UTCHMMA"}), assembler="ptxas-blackwell"),  # B200
        GpuTarget(  # MI350X, MI355X
            "gfx950",
            "gfx950",
            256,
            frozenset({"v_mfma_f32_16x16x32_bf16", "v_mfma_f32_32x32x16_bf16"}),
            backend="hip",
            warp=64,
            assembler="",
            dependent_launch=False,
            product_rows=16,
            shared_bytes=160 << 10,
            sm_shared_bytes=160 << 10,
            shared_reserved=0,
            sm_registers=131072,
            register_unit=512,
            sm_blocks=16,
            tile_bytes=128 << 10,
        ),
    )
}
