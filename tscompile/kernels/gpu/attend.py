"""Attention over paged caches, and what latent attention needs around it -> the launches that compute it."""

from __future__ import annotations

from tscompile.errors import CompileError
from tscompile.kernels import desc
from tscompile.kernels.desc import padded_head
from tscompile.kernels.gpu.spec import (
    Config,
    GpuLaunch,
    GpuStep,
    Rows,
    Work,
    kernel_of,
    one_launch,
    pow2,
    warps_for,
)
from tscompile.kernels.gpu.target import GpuTarget

DECODE_TOKENS = 64  # in a larger step most tokens are of prompts: tiles of many rows, no splits
MAX_SPLITS = 16
MAX_LATENT_SPLITS = 64  # one tile of latents fills a multiprocessor, so that many have to share a context
MAX_DIM = 256  # of a head: q, k, v and their sums stay in registers and shared memory
MAX_RANK = 512  # of latents, likewise
LATENT_ROWS = 64  # (token, head) pairs of a tile
LATENT_COLUMNS = 128  # of its sums that are rescaled at once: what fills the lanes of tensor memory
COMBINED = 128  # columns that one program puts together
ATTENTION_BATCH = ("query_start", "context_len", "page_table")


def check_head(head_dim: int, target: GpuTarget) -> None:
    if head_dim > MAX_DIM:
        raise CompileError(f"{target.name} has kernels for heads of up to {MAX_DIM}, not of {head_dim}")


def attention(made: desc.Attention, target: GpuTarget, rows: Rows) -> GpuStep:
    """Small steps, of decodes, cut each context until there is work for every multiprocessor; large ones
    take as many tokens as fill the tensor cores."""
    check_head(made.head_dim, target)
    group, block = made.heads // made.kv_heads, max(pow2(padded_head(made.head_dim)), 32)
    decodes = rows.tokens <= DECODE_TOKENS
    least = pow2(max(group, 16))
    tile = least if decodes else max(least, 128 if block <= 128 else 64)
    span = _span(made.page_size, 64)
    splits = 1
    while decodes and splits < MAX_SPLITS and rows.tokens * made.kv_heads * splits < 2 * target.num_sms:
        splits *= 2
    names = {"rows": tile, "span": span, "block": block, "splits": splits}
    # beyond 64 KB of keys and values in flight a second block would not fit
    stages = 3 if 3 * 4 * span * block <= 96 << 10 else 2
    config = Config(tuple(names.items()), 8 if tile > 64 else 4, stages)
    grid = (_tiles(rows, tile // group), made.kv_heads, splits)
    return _in_splits(made, target, rows, config, grid)


def latent_attention(made: desc.LatentAttention, target: GpuTarget, rows: Rows) -> GpuStep:
    """A tile is 64 rows, of as many tokens as its heads leave room for: that fills the tensor cores in every
    step, of many heads with one token, of few with several. Two warp groups share its sums, f32[rank, 64].
    Shared memory holds the queries and a tile or two of keys, which are the values."""
    if target.backend != "cuda":
        raise CompileError(
            f"{target.name} has no kernel for latent attention yet: build for sm_90a or sm_100a"
        )
    if made.rank > MAX_RANK or made.row - made.rank > MAX_DIM:
        raise CompileError(
            f"{target.name} has kernels for latents of up to {MAX_RANK} + {MAX_DIM}, not of {made.rank} + "
            f"{made.row - made.rank}"
        )
    # there Triton keeps tiles of two steps in two layouts each, which shared memory does not hold
    in_tensor_memory = "UTCHMMA" in target.products
    heads = min(made.heads, LATENT_ROWS)
    blocks = -(-made.heads // heads)
    names = {
        "rows": LATENT_ROWS,
        "span": _span(made.page_size, 64 if in_tensor_memory else 32),
        "block": min(max(pow2(made.rank), 64), LATENT_COLUMNS),
        "tail": max(pow2(made.row - made.rank), 16),
        "splits": 1,
    }
    decodes = rows.tokens <= DECODE_TOKENS
    while decodes and names["splits"] < MAX_LATENT_SPLITS:
        if 2 * rows.tokens * blocks * names["splits"] > target.num_sms:
            break
        names["splits"] *= 2
    config = Config(tuple(names.items()), 8, 1 if in_tensor_memory else 2)
    grid = (_tiles(rows, LATENT_ROWS // heads), blocks, names["splits"])
    return _in_splits(made, target, rows, config, grid)


def _span(page_size: int, most: int) -> int:
    """Keys at once, of one page."""
    return next(n for n in (64, 32) if n <= most and page_size % n == 0)


def _tiles(rows: Rows, tokens: int) -> int:
    """Tiles of so many tokens of one sequence, at most."""
    return rows.tokens if tokens == 1 else rows.tokens // tokens + rows.seqs


def _in_splits(
    made: desc.Attention | desc.LatentAttention,
    target: GpuTarget,
    rows: Rows,
    config: Config,
    grid: tuple[int, int, int],
) -> GpuStep:
    """The kernel and, with splits, what puts their parts of a head's values together."""
    values = made.rank if isinstance(made, desc.LatentAttention) else made.head_dim
    dtypes = dict.fromkeys(("q", "kv"), made.dtype) | {"out": made.out_dtype}
    splits = config["splits"]
    if splits == 1:
        return one_launch(kernel_of(made, dtypes, ATTENTION_BATCH, config), *grid)
    parts = rows.tokens * made.heads * splits
    work = (Work("partial", 4 * parts * values), Work("stats", 4 * parts * 2))
    first = kernel_of(made, dtypes, ATTENTION_BATCH, config, work=work, without=("out",))
    block = min(max(pow2(values), 32), COMBINED)
    combine = kernel_of(
        made,
        dtypes,
        (),
        Config((("block", block), ("splits", splits)), warps_for(block * splits, 32, target.warp)),
        template="attention_combine",
        work=work,
        without=("q", "kv"),
    )
    launches = (
        GpuLaunch(first, grid),
        GpuLaunch(combine, (rows.tokens * made.heads, -(-values // block), 1)),
    )
    return GpuStep(launches, work)


def head_linear(made: desc.HeadLinear, target: GpuTarget, rows: Rows) -> GpuStep:
    """As a linear's tiles, a head's weights the first operand in small steps. K is small: all of a tile's
    weights are on their way before the wait."""
    small = rows.tokens <= 64
    tile = min(max(pow2(rows.tokens), 16), 64) if small else 128
    columns = min(max(pow2(made.n), 64), 64 if small else 128)
    block = 64 if made.k >= 64 else 32
    names = {"rows": tile, "columns": columns, "block": block, "swap": int(small)}
    if made.rotary:
        names["tail"] = max(pow2(made.rotary), 16)
    dtypes = {"x": made.x_dtype, "weight": made.dtype, "table": "f32", "out": made.out_dtype}
    config = Config(tuple(names.items()), 4 if tile * columns <= 128 * 64 else 8, 2 if made.k <= 128 else 3)
    kernel = kernel_of(made, dtypes, ("positions",) if made.rotary else (), config)
    columns_and_tail = -(-made.n // columns) + (made.rotary > 0)
    return one_launch(kernel, -(-rows.tokens // tile), columns_and_tail, made.heads)


def latent_write(made: desc.LatentWrite, target: GpuTarget, rows: Rows) -> GpuStep:
    first = made.row - made.rotary
    behind = padded_head(made.row) - first
    block = max(pow2(first), 32)
    config = Config(
        (("block", block), ("tail", pow2(behind) if behind else 0)), warps_for(block, 4, target.warp)
    )
    dtypes = {"kv": made.dtype, "row": made.row_dtype, "norm": "f32", "table": "f32"}
    batch = ("positions", "slots") if made.rotary else ("slots",)
    return one_launch(kernel_of(made, dtypes, batch, config), rows.tokens)
