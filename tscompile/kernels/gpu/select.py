"""Description, target and bucket of tokens -> the ways to compute it, the best first.

Pure and deterministic: it knows the target's limits and its topology's speeds, never this machine's. A small
cost model orders tiles: by the longer of products, at the tensor cores' peak for as many waves of tiles as
there are, and of reading, at the speed that the bytes on their way allow (Little's law), the memory's at
most. Which one is taken, offers.py says: a lockfile of what a device has measured comes before the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tscompile.errors import CompileError
from tscompile.kernels import desc
from tscompile.kernels.desc import Arg, KernelDesc, padded_head
from tscompile.kernels.gpu import offers
from tscompile.kernels.gpu.lockfile import Lockfile
from tscompile.kernels.gpu.offers import Choice, Offer
from tscompile.kernels.gpu.spec import BATCH, Config, GpuKernel, GpuLaunch, GpuStep, Param, Rows, Work
from tscompile.kernels.gpu.target import GpuTarget
from tscompile.layout import round_up
from tscompile.topology import topology_of

GEMV_ROWS = 2  # more rows go to the tensor cores
DECODE_TOKENS = 64  # in a larger step most tokens are of prompts: tiles of many rows, no splits
MAX_SPLITS = 16
MAX_DIM = 256  # of a head: q, k, v and their sums stay in registers and shared memory


def pow2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def choose(made: KernelDesc, target: GpuTarget, rows: Rows) -> GpuStep:
    """By the cost model alone. CompileError as decide() has."""
    return decide(made, target, rows, None).step


def decide(made: KernelDesc, target: GpuTarget, rows: Rows, lock: Lockfile | None) -> Choice:
    """CompileError as offered() has; if nothing fits; if the lockfile names what is not offered."""
    return offers.choose(offered(made, target, rows), made, target, rows, lock)


def offered(made: KernelDesc, target: GpuTarget, rows: Rows) -> list[Offer]:
    """The best first; some may not fit. CompileError for a kind, or a size, that no kernel of the target
    computes."""
    if type(made) not in _CHOOSERS:
        raise CompileError(
            f"{target.name} has no kernel of kind {made.kind} yet, which the model needs; it has "
            f"{', '.join(sorted(kind.kind for kind in _CHOOSERS))}. CPU targets have all"
        )
    dtype = getattr(made, "dtype", "bf16")
    if dtype != "bf16":
        raise CompileError(f"{target.name} has kernels for bf16, not for {dtype}: build with --dtype bf16")
    if getattr(made, "parts", 1) > 1:
        raise CompileError(f"{target.name} has no kernels for a context in parts yet: build without --cp")
    found = _CHOOSERS[type(made)](made, target, rows)
    return [Offer(found)] if isinstance(found, GpuStep) else found


def _kernel(
    made: KernelDesc,
    dtypes: Mapping[str, str],
    batch: tuple[str, ...],
    config: Config,
    *,
    template: str = "",
    work: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
) -> GpuKernel:
    """dtypes: of each argument, by role; work: what it takes besides, f32; without: what it does not take."""

    def param(arg: Arg) -> Param:
        return Param("arg", arg.roles[0], dtypes[arg.roles[0]])

    args = [param(arg) for arg in made.args if arg.roles[0] not in without]
    arrays = [Param("batch", name, "i32") for name in BATCH if name in ("sizes", *batch)]
    between = [Param("work", name, "f32") for name in work]
    return GpuKernel(made, template or made.kind, (*args, *arrays, *between), config)


def _one(kernel: GpuKernel, *grid: int) -> GpuStep:
    x, y, z = (*grid, 1, 1)[:3]
    return GpuStep((GpuLaunch(kernel, (x, y, z)),))


def _warps(elements: int, each: int = 8, warp: int = 32) -> int:
    """Such that a thread has about `each` of the elements. warp: its threads."""
    return min(max(pow2(elements // (warp * each)), 1), 512 // warp)


def _embed(made: desc.Embed, target: GpuTarget, rows: Rows) -> GpuStep:
    block = min(pow2(made.width), 1024)
    config = Config((("block", block),), _warps(block, warp=target.warp))
    dtypes = {"table": made.dtype, "rank": "f32", "out": "f32"}
    return _one(_kernel(made, dtypes, (made.ids,), config), rows.tokens, -(-made.width // block))


def _gather_rows(made: desc.GatherRows, target: GpuTarget, rows: Rows) -> GpuStep:
    block = min(pow2(made.width), 1024)
    config = Config((("block", block),), _warps(block, warp=target.warp))
    kernel = _kernel(made, {"x": made.dtype, "out": made.dtype}, ("logit_rows",), config)
    return _one(kernel, rows.seqs, -(-made.width // block))


def _rms_norm(made: desc.RmsNorm, target: GpuTarget, rows: Rows) -> GpuStep:
    block = pow2(made.width)
    dtypes = dict.fromkeys(("x", "delta", "weight", "sum"), "f32") | {"out": made.out_dtype}
    kernel = _kernel(made, dtypes, (), Config((("block", block),), _warps(block, warp=target.warp)))
    return _one(kernel, rows.of(made.rows) * made.heads)


def _qkv_write(made: desc.QkvWrite, target: GpuTarget, rows: Rows) -> GpuStep:
    _check_head(made.head_dim, target)
    heads, block = made.heads + 2 * made.kv_heads, pow2(padded_head(made.head_dim))
    each = min(4, pow2(heads))
    config = Config((("heads", each), ("block", block)), _warps(each * block, 4, target.warp))
    dtypes = dict.fromkeys(("qkv", "q_norm", "k_norm", "table"), "f32")
    dtypes |= {"kv": made.dtype, "q": made.dtype}
    kernel = _kernel(made, dtypes, ("positions", "slots"), config)
    return _one(kernel, rows.tokens, -(-heads // each))


def _elementwise(made: desc.Elementwise, target: GpuTarget, rows: Rows) -> GpuStep:
    block = min(pow2(made.row), 1024)
    config = Config((("block", block),), _warps(block, warp=target.warp))
    dtypes = {f"a{i}": leaf.dtype for i, leaf in enumerate(made.leaves)}
    dtypes |= {f"y{i}": dtype for i, dtype in enumerate(made.out_dtypes)}
    return _one(_kernel(made, dtypes, (), config), rows.of(made.rows), -(-made.row // block))


def _check_head(head_dim: int, target: GpuTarget) -> None:
    if head_dim > MAX_DIM:
        raise CompileError(f"{target.name} has kernels for heads of up to {MAX_DIM}, not of {head_dim}")


def _attention(made: desc.Attention, target: GpuTarget, rows: Rows) -> GpuStep:
    """Small steps, of decodes, cut each context until there is work for every multiprocessor; large ones
    take as many tokens as fill the tensor cores."""
    _check_head(made.head_dim, target)
    group, block = made.heads // made.kv_heads, max(pow2(padded_head(made.head_dim)), 32)
    decodes = rows.tokens <= DECODE_TOKENS
    least = pow2(max(group, 16))
    tile = least if decodes else max(least, 128 if block <= 128 else 64)
    span = next(n for n in (64, 32) if made.page_size % n == 0)
    tokens = tile // group
    tiles = rows.tokens if tokens == 1 else rows.tokens // tokens + rows.seqs
    splits = 1
    while decodes and splits < MAX_SPLITS and rows.tokens * made.kv_heads * splits < 2 * target.num_sms:
        splits *= 2
    names = {"rows": tile, "span": span, "block": block, "splits": splits}
    # beyond 64 KB of keys and values in flight a second block would not fit
    stages = 3 if 3 * 4 * span * block <= 96 << 10 else 2
    config = Config(tuple(names.items()), 8 if tile > 64 else 4, stages)
    dtypes = dict.fromkeys(("q", "kv"), made.dtype) | {"out": made.out_dtype}
    batch = ("query_start", "context_len", "page_table")
    grid = (tiles, made.kv_heads, splits)
    if splits == 1:
        return _one(_kernel(made, dtypes, batch, config), *grid)
    between = ("partial", "stats")
    first = _kernel(made, dtypes, batch, config, work=between, without=("out",))
    combine = _kernel(
        made,
        dtypes,
        (),
        Config((("block", block), ("splits", splits)), 1 if block <= 2 * target.warp else 2),
        template="attention_combine",
        work=between,
        without=("q", "kv"),
    )
    parts = rows.tokens * made.heads * splits
    work = (Work("partial", 4 * parts * made.head_dim), Work("stats", 4 * parts * 2))
    launches = (GpuLaunch(first, grid), GpuLaunch(combine, (rows.tokens * made.heads, 1, 1)))
    return GpuStep(launches, work)


def _linear(made: desc.Linear, target: GpuTarget, rows: Rows) -> list[Offer]:
    num_rows = rows.of(made.rows) * made.fold
    dtypes = {"x": made.dtype, "weight": made.dtype, "bias": "f32", "out": made.out_dtype}
    batch = ("logit_rows",) if made.gather else ()
    width = made.swiglu or made.n
    found = []
    if num_rows <= GEMV_ROWS:
        # a thread reads 16 bytes at once; few columns, so that every multiprocessor has some
        block = min(pow2(made.k), 1024)
        most = columns = (4 if made.swiglu else 8) // num_rows
        while columns > 1 and width < 2 * target.num_sms * columns:
            columns //= 2
        for num in sorted((1 << i for i in range(most.bit_length())), key=lambda num: (num != columns, num)):
            values = (("rows", num_rows), ("columns", num), ("block", block))
            config = Config(values, min(_warps(num * block, warp=target.warp), 4))
            kernel = _kernel(made, dtypes, batch, config, template="gemv")
            found.append(Offer(_one(kernel, -(-width // num))))
        return found
    for tile in _tiles(made, num_rows, target):
        names = {"rows": tile.rows, "columns": tile.columns, "block": tile.block, "swap": int(tile.swap)}
        kernel = _kernel(made, dtypes, batch, Config(tuple(names.items()), tile.warps, tile.stages))
        step = _one(kernel, -(-num_rows // tile.rows), -(-width // tile.columns))
        found.append(Offer(step, tile.shared_bytes(made, target)))
    return found


@dataclass(frozen=True)
class Tile:
    """Of a linear: rows x columns of the output, K in blocks, so many of which are on their way at once."""

    rows: int
    columns: int
    block: int
    stages: int
    warps: int
    swap: bool

    def shared_bytes(self, made: desc.Linear, target: GpuTarget) -> int:
        """Of blocks that are on their way; on AMD's GPUs one of them is in registers."""
        blocks = self.stages if target.backend == "cuda" else self.stages - 1
        return 2 * blocks * self.block * (self.rows + self.columns * (2 if made.swiglu else 1))

    def seconds(self, made: desc.Linear, num_rows: int, target: GpuTarget) -> float:
        """Predicted, for num_rows rows. Blocks of a multiprocessor: as many as their shared memory lets."""
        machine, parts = topology_of(target.name), 2 if made.swiglu else 1
        shared = self.shared_bytes(made, target)
        blocks = max(1, min(target.sm_shared_bytes // (shared + target.shared_reserved), 4))
        tiles = -(-num_rows // self.rows) * -(-(made.swiglu or made.n) // self.columns)
        waves = -(-tiles // (target.num_sms * blocks))
        k = round_up(made.k, self.block)
        flops = 2 * self.rows * self.columns * parts * k
        # a tensor core takes so many rows of its first operand, whatever they hold
        first = self.columns if self.swap else self.rows
        peak = machine.flops_per_s["bf16"] / target.num_sms * min(1, first / target.product_rows)
        computing = waves * blocks * flops / peak
        in_flight = min(tiles, target.num_sms * blocks) * shared
        speed = min(machine.read_bytes_per_s, in_flight / target.latency_s)
        weights = 2 * made.n * k
        again = -(-num_rows // self.rows) * weights / 4 + -(-made.n // self.columns) * 2 * num_rows * k / 4
        reading = max(weights / speed, again / machine.read_bytes_per_s)  # again: from L2, 4 times as quick
        return max(computing, reading) + waves * target.latency_s


def _tiles(made: desc.Linear, num_rows: int, target: GpuTarget) -> list[Tile]:
    """The best first: shapes by what the deepest that fits of each is predicted to take, and each of these
    with fewer and fewer blocks on their way. Small steps swap the operands: then the weight fills the tensor
    core's rows."""
    found = []
    block = 64 if made.k >= 64 else 32
    shapes = [(min(max(pow2(num_rows), 16), 128), columns, True) for columns in (64, 128)]
    if num_rows > 64:
        shapes += [(128, 128, False), (128, 64, False), (64, 128, False)]
    if num_rows > 128 and not made.swiglu:
        shapes.append((128, 256, False))
    for rows, columns, swap in shapes:
        warps = 8 if rows * columns * (2 if made.swiglu else 1) > 128 * 64 else 4
        tiles = [Tile(rows, columns, block, stages, warps, swap) for stages in (6, 5, 4, 3, 2)]
        fitting = [tile for tile in tiles if tile.shared_bytes(made, target) <= target.tile_bytes]
        seconds = fitting[0].seconds(made, num_rows, target) if fitting else math.inf
        found.append((seconds, tiles))
    return [tile for _, tiles in sorted(found, key=lambda one: one[0]) for tile in tiles]


_CHOOSERS: dict[type[KernelDesc], Callable[..., GpuStep | list[Offer]]] = {
    desc.Embed: _embed,
    desc.GatherRows: _gather_rows,
    desc.RmsNorm: _rms_norm,
    desc.QkvWrite: _qkv_write,
    desc.Elementwise: _elementwise,
    desc.Attention: _attention,
    desc.Linear: _linear,
}
