"""Routed experts -> the launches that compute them."""

from __future__ import annotations

from dataclasses import dataclass

from tscompile.kernels import desc
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

GEMV_TOKENS = 2  # in larger steps experts have rows enough for the tensor cores to pay
GEMV_ROUTES = 32  # that a program which combines has side by side


def route(made: desc.Route, target: GpuTarget, rows: Rows) -> GpuStep:
    members = pow2(made.experts // made.groups)
    values = (("groups", pow2(made.groups)), ("members", members), ("top", pow2(made.k)))
    dtypes = dict.fromkeys(("logits", "bias", "weights"), "f32") | {"ids": "i32"}
    config = Config(values, warps_for(pow2(made.groups) * members, 16, target.warp))
    return one_launch(kernel_of(made, dtypes, (), config), rows.tokens)


def sort_routes(made: desc.SortRoutes, target: GpuTarget, rows: Rows) -> GpuStep:
    block = min(max(pow2(rows.tokens * made.k), 128), 1024)
    dtypes = dict.fromkeys(("ids", "order", "counts"), "i32") | {"numbers": "f32"}
    config = Config((("block", block),), warps_for(block, warp=target.warp))
    return one_launch(kernel_of(made, dtypes, (), config), made.experts + 1)


def experts(made: desc.Experts, target: GpuTarget, rows: Rows) -> GpuStep:
    """A step of one or two tokens streams each route's weights; of more, each expert's rows are cut into
    tiles, about as large as the rows that an expert has of evenly spread routes."""
    routes = rows.tokens * made.top
    fits = not made.combine or pow2(routes) <= GEMV_ROUTES
    if rows.tokens <= GEMV_TOKENS and fits:
        return _gemv(made, target, rows)
    dtypes = _dtypes(made)
    tile = _tile(made, target, -(-routes // min(made.experts, routes)))
    active = min(made.experts, routes)
    grid = ((routes + active * (tile.rows - 1)) // tile.rows, -(-(made.swiglu or made.n) // tile.columns), 1)
    if not made.combine:
        return one_launch(kernel_of(made, dtypes, (), tile.config(made)), *grid)
    work = (Work("rows", 4 * routes * made.n), Work("place", 4 * routes, "i32"))
    without = ("out", "weights")
    first = kernel_of(made, dtypes, (), tile.config(made), work=work, without=without)
    block = min(pow2(made.n), 512)
    config = Config(
        (("top", pow2(made.top)), ("block", block)), warps_for(pow2(made.top) * block, 32, target.warp)
    )
    left_out = ("x", "counts", "weight")
    combine = kernel_of(made, dtypes, (), config, template="experts_combine", work=work, without=left_out)
    launches = (GpuLaunch(first, grid), GpuLaunch(combine, (rows.tokens, -(-made.n // block), 1)))
    return GpuStep(launches, work)


def _dtypes(made: desc.Experts) -> dict[str, str]:
    numbers = dict.fromkeys(("counts", "order"), "i32")
    return {"x": made.dtype, "weight": made.dtype, "weights": "f32", "out": made.out_dtype, **numbers}


def _gemv(made: desc.Experts, target: GpuTarget, rows: Rows) -> GpuStep:
    """A thread reads 16 bytes at once, so that it has few columns, and every multiprocessor some."""
    routes = pow2(rows.tokens * made.top) if made.combine else 1
    columns = max(1, (GEMV_ROUTES if made.combine else 4 if made.swiglu else 8) // routes)
    width, others = made.swiglu or made.n, rows.tokens if made.combine else rows.tokens * made.top
    while columns > 1 and width * others < 2 * target.num_sms * columns:
        columns //= 2
    block = min(pow2(made.k), 1024, 8192 // (columns * routes))
    values = (("columns", columns), ("routes", routes), ("block", block), ("lanes", pow2(made.experts)))
    config = Config(values, min(warps_for(columns * routes * block, warp=target.warp), 4))
    kernel = kernel_of(made, _dtypes(made), (), config, template="experts_gemv")
    return one_launch(kernel, -(-width // columns), others)


@dataclass(frozen=True)
class _Tile:
    rows: int
    columns: int
    block: int
    stages: int
    swap: bool

    def config(self, made: desc.Experts) -> Config:
        values = {
            "rows": self.rows,
            "columns": self.columns,
            "block": self.block,
            "swap": int(self.swap),
            "lanes": pow2(made.experts),
        }
        sums = self.rows * self.columns * (2 if made.swiglu else 1)
        return Config(tuple(values.items()), 8 if sums > 128 * 64 else 4, self.stages)


def _tile(made: desc.Experts, target: GpuTarget, each: int) -> _Tile:
    """For experts of about `each` rows. Few rows swap the operands: then the weight fills the tensor core's
    rows."""
    rows, block = min(max(pow2(each), 16), 128), 64 if made.k >= 64 else 32
    parts = 2 if made.swiglu else 1
    columns = 128 if rows >= 64 else 64
    stage = 2 * block * (rows + columns * parts)
    return _Tile(rows, columns, block, max(2, min(5, target.tile_bytes // stage)), rows < 128)
