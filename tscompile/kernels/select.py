"""How a kernel computes: a tile configuration for a description and a target, from a small cost model.
 Pure and deterministic: it knows the target's registers and caches, never this machine's. No configuration
changes a result's bits."""

from __future__ import annotations

from dataclasses import dataclass

from tscompile.errors import CompileError
from tscompile.kernels.desc import (
    Attention,
    Experts,
    HeadLinear,
    KernelDesc,
    LatentAttention,
    Linear,
    padded_head,
)
from tscompile.kernels.target import Target
from tscompile.layout import round_up

# Register tiles (rows, columns of 16) in the order of trial: accumulators for even and odd elements, the
# right operand, a broadcast. AVX2 has 16 registers, two a vector; AVX-512 has 32. Few rows take more
# columns: independent chains, and streams of weights.
VARIANTS_AVX2 = ((3, 1), (2, 1), (1, 2), (1, 1))
VARIANTS_AVX512 = ((12, 1), (8, 1), (6, 2), (6, 1), (4, 2), (4, 1), (2, 4), (2, 1), (1, 4), (1, 1))
# Of a kernel's rows of x, on the stack. The accumulators take a few hundred KB more.
SCRATCH_BYTES = 2 << 20
AMX_ROWS = 8  # fewer rows do not fill a tile: the vectors are faster


@dataclass(frozen=True)
class LinearTiling:
    """rows of x held at once (f32, or AMX tiles); tiles of 16 columns accumulated at once; chunks of 32
    elements of K multiplied before the next tile; variants of the register tile; amx_rows: as many and more
    go through AMX."""

    rows: int
    tiles: int
    chunks: int
    variants: tuple[tuple[int, int], ...]
    amx: bool
    amx_rows: int = AMX_ROWS


@dataclass(frozen=True)
class AttentionTiling:
    """rows: (token, head) pairs that read a page of K and V together."""

    rows: int
    variants: tuple[tuple[int, int], ...]
    amx: bool
    amx_rows: int = AMX_ROWS


@dataclass(frozen=True)
class RowTiling:
    """Kernels that go row by row have nothing to choose."""


Tiling = LinearTiling | AttentionTiling | RowTiling


def choose(desc: KernelDesc, target: Target) -> Tiling:
    """The configuration of `desc` on `target`."""
    variants = VARIANTS_AVX512 if target.lanes512 else VARIANTS_AVX2
    if isinstance(desc, (Linear, HeadLinear, Experts)):
        amx = target.amx and desc.dtype == "bf16"
        return _linear(desc.k, target.l2_bytes, variants, amx)
    if isinstance(desc, Attention):
        amx = target.amx and desc.dtype == "bf16"
        return AttentionTiling(_attention_rows(desc), variants, amx)
    if isinstance(desc, LatentAttention):
        amx = target.amx and desc.dtype == "bf16"
        return AttentionTiling(_latent_rows(desc, target.l2_bytes), variants, amx)
    return RowTiling()


def _linear(k: int, l2_bytes: int, variants: tuple[tuple[int, int], ...], amx: bool) -> LinearTiling:
    """x's rows take half of L2 and stay there while the weights stream past, so that each weight is read
    once for all of them.

    AMX needs four operand tiles for 64 cycles of products: with the two weight tiles' 16 chunks (32 KB) in
    L1, x comes from L2 in half that time. The vectors need a tenth of it, and take deeper runs, which store
    accumulators less often."""
    step, most, element = (32, 256, 2) if amx else (max(r for r, _ in variants), 96, 4)
    row_bytes = element * (round_up(k, 32) + 16)
    rows = min(max(l2_bytes // 2 // row_bytes // step * step, step), most, SCRATCH_BYTES // row_bytes)
    if amx and rows < 16:
        return _linear(k, l2_bytes, variants, amx=False)
    if not rows:
        raise CompileError(f"a linear of {k} elements a row: kernels take at most {SCRATCH_BYTES // 4 - 32}")
    return LinearTiling(rows // 16 * 16 if amx else rows, 8, 16 if amx else 32, variants, amx)


def _attention_rows(desc: Attention) -> int:
    """Few enough that q, p and the accumulator (f32) stay in L2 beside a page of K and V; a multiple of 16
    for tiles."""
    row_bytes = 4 * (2 * padded_head(desc.head_dim) + desc.page_size)
    return min(max((96 << 10) // row_bytes // 16 * 16, 16), 64)


def _latent_rows(desc: LatentAttention, l2_bytes: int) -> int:
    """As many as fit half of L2: a page is brought into the order of keys once for all of them, and its cost,
    about that of 2 rows' products (of 20 on tiles), must not count."""
    row_bytes = 4 * (padded_head(desc.row) + desc.rank + desc.page_size)
    return min(max(l2_bytes // 2 // row_bytes // 16 * 16, 16), 128)
