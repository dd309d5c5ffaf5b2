"""Description, target and bucket of tokens -> the ways to compute it, the best first.

Pure and deterministic: it knows the target's limits and its topology's speeds, never this machine's. A small
cost model orders tiles: by the longer of products, at the tensor cores' peak for as many waves of tiles as
there are, and of reading, at the speed that the bytes on their way allow (Little's law), the memory's at
most. Which one is taken, offers.py says: a lockfile of what a device has measured comes before the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tscompile.errors import CompileError
from tscompile.kernels import desc
from tscompile.kernels.desc import KernelDesc, padded_head
from tscompile.kernels.gpu import attend, offers, routed
from tscompile.kernels.gpu.lockfile import Lockfile
from tscompile.kernels.gpu.offers import Choice, Offer
from tscompile.kernels.gpu.spec import Config, GpuStep, Rows, kernel_of, one_launch, pow2, warps_for
from tscompile.kernels.gpu.target import GpuTarget
from tscompile.layout import round_up
from tscompile.topology import topology_of

GEMV_ROWS = 2  # more rows go to the tensor cores


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


def _embed(made: desc.Embed, target: GpuTarget, rows: Rows) -> GpuStep:
    block = min(pow2(made.width), 1024)
    config = Config((("block", block),), warps_for(block, warp=target.warp))
    dtypes = {"table": made.dtype, "rank": "f32", "out": "f32"}
    return one_launch(kernel_of(made, dtypes, (made.ids,), config), rows.tokens, -(-made.width // block))


def _gather_rows(made: desc.GatherRows, target: GpuTarget, rows: Rows) -> GpuStep:
    block = min(pow2(made.width), 1024)
    config = Config((("block", block),), warps_for(block, warp=target.warp))
    kernel = kernel_of(made, {"x": made.dtype, "out": made.dtype}, ("logit_rows",), config)
    return one_launch(kernel, rows.seqs, -(-made.width // block))


def _rms_norm(made: desc.RmsNorm, target: GpuTarget, rows: Rows) -> GpuStep:
    block = pow2(made.width)
    dtypes = dict.fromkeys(("x", "delta", "weight", "sum"), "f32") | {"out": made.out_dtype}
    kernel = kernel_of(made, dtypes, (), Config((("block", block),), warps_for(block, warp=target.warp)))
    return one_launch(kernel, rows.of(made.rows) * made.heads)


def _qkv_write(made: desc.QkvWrite, target: GpuTarget, rows: Rows) -> GpuStep:
    attend.check_head(made.head_dim, target)
    heads, block = made.heads + 2 * made.kv_heads, pow2(padded_head(made.head_dim))
    each = min(4, pow2(heads))
    config = Config((("heads", each), ("block", block)), warps_for(each * block, 4, target.warp))
    dtypes = dict.fromkeys(("qkv", "q_norm", "k_norm", "table"), "f32")
    dtypes |= {"kv": made.dtype, "q": made.dtype}
    kernel = kernel_of(made, dtypes, ("positions", "slots"), config)
    return one_launch(kernel, rows.tokens, -(-heads // each))


def _elementwise(made: desc.Elementwise, target: GpuTarget, rows: Rows) -> GpuStep:
    block = min(pow2(made.row), 1024)
    config = Config((("block", block),), warps_for(block, warp=target.warp))
    dtypes = {f"a{i}": leaf.dtype for i, leaf in enumerate(made.leaves)}
    dtypes |= {f"y{i}": dtype for i, dtype in enumerate(made.out_dtypes)}
    return one_launch(kernel_of(made, dtypes, (), config), rows.of(made.rows), -(-made.row // block))


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
            config = Config(values, min(warps_for(num * block, warp=target.warp), 4))
            kernel = kernel_of(made, dtypes, batch, config, template="gemv")
            found.append(Offer(one_launch(kernel, -(-width // num))))
        return found
    for tile in _tiles(made, num_rows, target):
        names = {"rows": tile.rows, "columns": tile.columns, "block": tile.block, "swap": int(tile.swap)}
        kernel = kernel_of(made, dtypes, batch, Config(tuple(names.items()), tile.warps, tile.stages))
        step = one_launch(kernel, -(-num_rows // tile.rows), -(-width // tile.columns))
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
    desc.Linear: _linear,
    desc.Attention: attend.attention,
    desc.HeadLinear: attend.head_linear,
    desc.LatentWrite: attend.latent_write,
    desc.LatentAttention: attend.latent_attention,
    desc.Route: routed.route,
    desc.SortRoutes: routed.sort_routes,
    desc.Experts: routed.experts,
}
