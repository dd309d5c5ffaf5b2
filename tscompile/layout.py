"""Weight layouts: how a weight's tensor lies in the plan (ARCHITECTURE.md, "Weight layouts").

- rows, for any [..., K]: row-major, each row padded with zeros to a multiple of 64 bytes.
- tiles, for a linear's [N, K], or a stack [..., N, K] of such: tiles of 16 output columns x 32 elements of
  K, for bf16 in the order of an AMX B tile; N is padded with zeros to a multiple of 16, K to 32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tscompile.errors import InternalError
from tscompile.ir import DTYPES

ALIGN = 64  # bytes: a cache line, an AVX-512 register, a row of an AMX tile
TILE_N, TILE_K = 16, 32  # output columns and elements of K of one tile
STORED = {"f32": "F32", "bf16": "BF16"}  # our dtype -> safetensors' word


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def stored_shape(layout: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor of `shape` has in the plan: a multiple of 64 bytes. InternalError if the
    layout is not known or does not take such a tensor."""
    return _lookup(layout).shape(dtype, shape)


def stored_bytes(layout: str, dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(stored_shape(layout, dtype, shape)) * DTYPES[dtype]


def lay_out(layout: str, tensor: Tensor) -> Tensor:
    """f32 or bf16 tensor -> a contiguous one of stored_shape, padding zero."""
    dtype = _name(tensor.dtype)
    laid = _lookup(layout).forward(tensor).contiguous()
    wanted = stored_shape(layout, dtype, tuple(tensor.shape))
    if tuple(laid.shape) != wanted:
        raise InternalError(
            f"the layout {layout} of {list(tensor.shape)} gave {list(laid.shape)}, wanted {list(wanted)}"
        )
    return laid


def lay_back(layout: str, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `lay_out`: the tensor of `shape`, padding dropped."""
    return _lookup(layout).backward(stored, shape).contiguous()


def _name(dtype: torch.dtype) -> str:
    names = {torch.float32: "f32", torch.bfloat16: "bf16"}
    if dtype not in names:
        raise InternalError(f"a plan stores f32 and bf16, not {dtype}")
    return names[dtype]


def _pad(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """[..., N, K] -> [..., rows, columns], zeros below and to the right."""
    return torch.nn.functional.pad(tensor, (0, columns - tensor.shape[-1], 0, rows - tensor.shape[-2]))


def _rows_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not shape:
        raise InternalError("the layout rows takes a tensor of at least one dim")
    return (*shape[:-1], round_up(shape[-1], ALIGN // DTYPES[dtype]))


def _rows_forward(tensor: Tensor) -> Tensor:
    width = _rows_shape(_name(tensor.dtype), tuple(tensor.shape))[-1]
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))


def _rows_backward(stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    return stored[..., : shape[-1]]


def _tiles_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) < 2:
        raise InternalError(f"the layout tiles takes a weight [..., N, K], not {list(shape)}")
    *stack, n, k = shape
    tiles = (*stack, round_up(n, TILE_N) // TILE_N, round_up(k, TILE_K) // TILE_K, TILE_K // 2)
    # bf16: a 64-byte row is 16 columns x (even k, odd k), what TDPBF16PS reads. f32: the even k's 16
    # columns, then the odd's.
    return (*tiles, TILE_N, 2) if dtype == "bf16" else (*tiles, 2, TILE_N)


def _tiles_forward(tensor: Tensor) -> Tensor:
    rows, columns = round_up(tensor.shape[-2], TILE_N), round_up(tensor.shape[-1], TILE_K)
    split = (*tensor.shape[:-2], rows // TILE_N, TILE_N, columns // TILE_K, TILE_K // 2, 2)
    tiles = (
        _pad(tensor, rows, columns).reshape(split).transpose(-4, -3).transpose(-3, -2)
    )  # column to the end
    return tiles if tensor.dtype == torch.bfloat16 else tiles.transpose(-2, -1)


def _tiles_backward(stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    tiles = stored if stored.dtype == torch.bfloat16 else stored.transpose(-2, -1)
    whole = tiles.transpose(-3, -2).transpose(-4, -3)
    rows, columns = stored.shape[-5] * TILE_N, stored.shape[-4] * TILE_K
    return whole.reshape(*stored.shape[:-5], rows, columns)[..., : shape[-2], : shape[-1]]


class _Layout(NamedTuple):
    shape: Callable[[str, tuple[int, ...]], tuple[int, ...]]
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, tuple[int, ...]], Tensor]


LAYOUTS = {
    "rows": _Layout(_rows_shape, _rows_forward, _rows_backward),
    "tiles": _Layout(_tiles_shape, _tiles_forward, _tiles_backward),
}


def _lookup(layout: str) -> _Layout:
    if layout not in LAYOUTS:
        raise InternalError(f"no layout {layout!r}; known are {', '.join(LAYOUTS)}")
    return LAYOUTS[layout]
