"""bf16, batches and KV caches as numpy arrays, written from ARCHITECTURE.md: what the kernels' tests
compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BATCH_ARRAYS = (
    "token_ids",
    "positions",
    "slots",
    "query_start",
    "context_len",
    "page_table",
    "logit_rows",
)
STORED = {"f32": np.dtype(np.float32), "bf16": np.dtype(np.uint16)}


def to_bf16(x: Array) -> Array:
    """f32 -> the bits of the nearest bf16, ties to even; no NaN among them."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def stored(x: Array, dtype: str) -> Array:
    """As a buffer of `dtype` holds it."""
    return to_bf16(x) if dtype == "bf16" else np.ascontiguousarray(x, np.float32)


def values(x: Array, dtype: str) -> Array:
    """float64 of what a buffer of `dtype` holds."""
    return (from_bf16(x) if dtype == "bf16" else x).astype(np.float64)


def rounded(x: Array, dtype: str) -> Array:
    """f32 values that `dtype` can hold."""
    return from_bf16(to_bf16(x)) if dtype == "bf16" else np.ascontiguousarray(x, np.float32)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def padded_rows(x: Array) -> Array:
    """A weight in the layout rows: each padded with zeros to 64 bytes."""
    width = round_up(x.shape[-1], 64 // x.dtype.itemsize)
    return np.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, width - x.shape[-1])])


def tiles(weight: Array, dtype: str) -> Array:
    """weight[N, K] in the layout tiles, flat."""
    n, k = weight.shape
    whole = np.zeros((round_up(n, 16), round_up(k, 32)), weight.dtype)
    whole[:n, :k] = weight
    split = whole.reshape(
        len(whole) // 16, 16, whole.shape[1] // 32, 16, 2
    )  # tile, column, chunk, pair, parity
    return split.transpose((0, 2, 3, 1, 4) if dtype == "bf16" else (0, 2, 3, 4, 1)).reshape(-1)


@dataclass
class Request:
    """One sequence of a batch: `length` tokens in the cache afterwards, of which the last `new` are this
    step's."""

    length: int
    new: int


def batch_of(
    sequences: Sequence[Request], page_size: int, pages: Sequence[Sequence[int]]
) -> dict[str, Array]:
    """The batch arrays. pages[i]: the pages of sequence i, in order of context."""
    positions = [np.arange(s.length - s.new, s.length) for s in sequences]
    table = np.full(
        (len(sequences), max(len(p) for p in pages) + 1), 2**30, np.int32
    )  # unused entries would fault
    for row, own in zip(table, pages, strict=True):
        row[: len(own)] = own
    slots = [table[i][p // page_size] * page_size + p % page_size for i, p in enumerate(positions)]
    return {
        "positions": np.concatenate(positions),
        "slots": np.concatenate(slots),
        "query_start": np.cumsum([0, *(s.new for s in sequences)]),
        "context_len": np.array([s.length for s in sequences]),
        "page_table": table,
    }


class KvLayout:
    """One layer's cache as an array of one element type, and where an element lies."""

    def __init__(self, kv_heads: int, head_dim: int, page_size: int, dtype: str) -> None:
        self.kv_heads, self.head_dim, self.page_size, self.dtype = kv_heads, head_dim, page_size, dtype
        self.padded = round_up(head_dim, 32)
        self.half = self.padded * page_size
        d, slot = np.arange(self.padded)[:, None], np.arange(page_size)[None, :]
        if dtype == "bf16":  # K [D/2][page][2], V [page/2][D][2]
            self.k_index = (d // 2 * page_size + slot) * 2 + d % 2
            self.v_index = (slot // 2 * self.padded + d) * 2 + slot % 2
        else:  # K [D][page], V [page][D]
            self.k_index, self.v_index = d * page_size + slot, slot * self.padded + d

    def empty(self, num_pages: int, fill: int) -> Array:
        """[num_pages, kv_heads, K | V], all bytes `fill` (0xFF: NaN)."""
        dtype = STORED[self.dtype]
        raw = np.full(num_pages * self.kv_heads * 2 * self.half * dtype.itemsize, fill, np.uint8)
        return raw.view(dtype).reshape(num_pages, self.kv_heads, 2 * self.half)

    def write(self, cache: Array, slots: Array, k: Array, v: Array) -> None:
        """k, v: [tokens, kv_heads, head_dim], as stored."""
        for slot, k_row, v_row in zip(slots, k, v, strict=True):
            page = cache[slot // self.page_size]
            at = slot % self.page_size
            for head in range(self.kv_heads):
                padding = np.zeros(self.padded - self.head_dim, k.dtype)
                page[head][self.k_index[:, at]] = np.concatenate([k_row[head], padding])
                page[head][self.half + self.v_index[:, at]] = np.concatenate([v_row[head], padding])

    def read(self, cache: Array, slots: Array) -> tuple[Array, Array]:
        """k, v: [tokens, kv_heads, padded], as stored."""
        page, at = slots // self.page_size, slots % self.page_size
        k = cache[
            page[:, None, None], np.arange(self.kv_heads)[None, :, None], self.k_index[:, at].T[:, None, :]
        ]
        v_at = self.half + self.v_index[:, at].T[:, None, :]
        return k, cache[page[:, None, None], np.arange(self.kv_heads)[None, :, None], v_at]


class LatentLayout:
    """One layer's cache of latent rows as an array of one element type, and where an element lies."""

    def __init__(self, row: int, page_size: int, dtype: str) -> None:
        self.row, self.page_size, self.dtype = row, page_size, dtype
        self.padded = round_up(row, 32)
        d, slot = np.arange(self.padded)[:, None], np.arange(page_size)[None, :]
        paired = (slot // 2 * self.padded + d) * 2 + slot % 2  # bf16: [page/2][row][2]
        self.index = paired if dtype == "bf16" else slot * self.padded + d  # f32: [page][row]

    def empty(self, num_pages: int, fill: int) -> Array:
        """[num_pages, page], all bytes `fill` (0xFF: NaN)."""
        dtype = STORED[self.dtype]
        raw = np.full(num_pages * self.padded * self.page_size * dtype.itemsize, fill, np.uint8)
        return raw.view(dtype).reshape(num_pages, -1)

    def write(self, cache: Array, slots: Array, rows: Array) -> None:
        """rows: [tokens, row], or with its padding, as stored."""
        for slot, row in zip(slots, rows, strict=True):
            padding = np.zeros(self.padded - len(row), row.dtype)
            cache[slot // self.page_size][self.index[:, slot % self.page_size]] = np.concatenate(
                [row, padding]
            )

    def read(self, cache: Array, slots: Array) -> Array:
        """[tokens, padded], as stored."""
        return cache[(slots // self.page_size)[:, None], self.index[:, slots % self.page_size].T]
