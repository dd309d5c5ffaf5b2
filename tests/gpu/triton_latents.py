"""Cases of latent attention: head_linear, latent_write, latent_attention (triton_arrays.py)."""

from __future__ import annotations

import kernel_arrays as arrays
import numpy as np
from triton_case import TOLERANCE, Array, Case, Guarded, Rng, bucket, in_rows, normal, paged, poisoned, sizes

from tscompile.kernels import desc
from tscompile.kernels.desc import args_of

ROUNDED = 2.0**-6  # of products of what the interpreter truncates to bf16, where the device rounds


def rotated(x: Array, angles: Array, interleaved: bool) -> Array:
    """x[T, heads, rotary] by each token's angles [T, rotary / 2]."""
    cos, sin, y = np.cos(angles)[:, None], np.sin(angles)[:, None], x.astype(np.float64)
    half = x.shape[-1] // 2
    parts = (np.s_[..., 0::2], np.s_[..., 1::2]) if interleaved else (np.s_[..., :half], np.s_[..., half:])
    a, b = (y[part].copy() for part in parts)
    y[parts[0]], y[parts[1]] = a * cos - b * sin, b * cos + a * sin
    return y


def angle_table(rng: Rng, length: int, rotary: int) -> tuple[Array, Guarded]:
    """Angles of each position, and the table that a kernel reads."""
    angles = rng.standard_normal((length, rotary // 2)).astype(np.float32)
    table = in_rows(np.concatenate([np.cos(angles), np.sin(angles)], -1), "f32")
    return angles.astype(np.float64), Guarded("f32", table.size, table)


def head_linear(rng: Rng) -> Case:
    rows, num = bucket(rng)
    heads, k, n = int(rng.integers(1, 5)), int(rng.choice([8, 40, 64, 128])), int(rng.choice([16, 64, 130]))
    rotary, interleaved = int(rng.choice([0, 8, 12, 16])), bool(rng.integers(2))
    x_dtype, out_dtype = (
        "f32" if rotary else str(rng.choice(["bf16", "f32"])),
        str(rng.choice(["bf16", "f32"])),
    )
    words = ["x", "weight:weight", *(["table:weight"] if rotary else []), "out!"]
    made = desc.HeadLinear(args_of(*words), heads, k, n, rotary, interleaved, x_dtype, "bf16", out_dtype)
    x, weight = (
        normal(rng, rows.tokens, heads, k + rotary, dtype=x_dtype),
        normal(rng, heads, n, k, dtype="bf16"),
    )
    x[:, :, :k] = arrays.rounded(x[:, :, :k], "bf16")  # whose cast is exact: the interpreter's truncates
    positions = rng.integers(0, 50, num)
    total = np.einsum("thk,hnk->thn", x[:num, :, :k].astype(np.float64), weight)
    padded = in_rows(weight, "bf16")
    args = {"x": Guarded(x_dtype, x.size, x), "weight": Guarded("bf16", padded.size, padded)}
    if rotary:
        angles, args["table"] = angle_table(rng, 50, rotary)
        tail = rotated(x[:num, :, k:], angles[positions], interleaved)
        total = np.concatenate([total, tail], -1)
    args["out"] = Guarded(out_dtype, rows.tokens * heads * (n + rotary))
    batch = {"sizes": sizes(num), "positions": positions}
    return Case(made, rows, batch, args, {"out": poisoned(total, rows.tokens)}, loose=4.0)


class Latents:
    """One layer's cache of latents, [num_pages][page_size][padded], all NaN but what is written."""

    def __init__(self, row: int, page_size: int, num_pages: int) -> None:
        self.row = row
        self.array = np.full((num_pages * page_size, arrays.round_up(row, 32)), np.nan, np.float32)

    def write(self, slot: int, row: Array) -> None:
        self.array[slot] = 0
        self.array[slot, : self.row] = row


def latent_write(rng: Rng) -> Case:
    rows, num = bucket(rng)
    rank, rotary, interleaved = (
        int(rng.choice([16, 40, 64])),
        int(rng.choice([0, 12, 16])),
        bool(rng.integers(2)),
    )
    page_size, row_dtype = int(rng.choice([32, 64])), "f32" if rotary else str(rng.choice(["bf16", "f32"]))
    words = ["kv:kv", "row", *(["norm:weight", "table:weight"] if rotary else [])]
    eps = 1e-5 if rotary else 0.0
    row = rank + rotary
    made = desc.LatentWrite(args_of(*words), row, eps, rotary, interleaved, row_dtype, "bf16", page_size)
    found, batch, num_pages = paged(rng, rows, num, page_size)
    x, norm = normal(rng, rows.tokens, row, dtype=row_dtype), normal(rng, rank)
    wanted = x[:num].astype(np.float64)
    args = {"row": Guarded(row_dtype, x.size, x), "norm": Guarded("f32", rank, norm)}
    if rotary:
        y = wanted[:, :rank]
        wanted[:, :rank] = y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * norm
        angles, args["table"] = angle_table(rng, max(s.length for s in found), rotary)
        wanted[:, rank:] = rotated(x[:num, None, rank:], angles[batch["positions"]], interleaved)[:, 0]
    cache = Latents(row, page_size, num_pages)
    for token, slot in enumerate(batch["slots"]):
        cache.write(slot, wanted[token])
    args["kv"] = Guarded("bf16", cache.array.size)
    return Case(made, rows, batch, args, {"kv": cache.array}, loose=2.0)


def latent_attention(rng: Rng) -> Case:
    rows, num = bucket(rng)
    heads, rank, tail = (
        int(rng.choice([1, 3, 16, 70])),
        int(rng.choice([32, 40, 64])),
        int(rng.choice([0, 12, 16])),
    )
    page_size, dtype, row = int(rng.choice([32, 64, 96])), str(rng.choice(["bf16", "f32"])), rank + tail
    scale = row**-0.5
    made = desc.LatentAttention(
        args_of("q", "kv:kv", "out!"), heads, row, rank, "bf16", page_size, scale, dtype
    )
    found, batch, num_pages = paged(rng, rows, num, page_size)
    cache, q = Latents(row, page_size, num_pages), normal(rng, rows.tokens, heads, row, dtype="bf16")
    wanted = np.empty((num, heads, rank))
    for i, sequence in enumerate(found):
        keys = normal(rng, sequence.length, row, dtype="bf16")
        for position, key in enumerate(keys):
            page = batch["page_table"][i][position // page_size]
            cache.write(page * page_size + position % page_size, key)
        begin = batch["query_start"][i]
        for token in range(sequence.new):
            seen = keys[: sequence.length - sequence.new + token + 1].astype(np.float64)
            scores = q[begin + token] @ seen.T * scale
            p = np.exp(scores - scores.max(-1, keepdims=True))
            wanted[begin + token] = p @ seen[:, :rank] / p.sum(-1, keepdims=True)
    args = {"q": Guarded("bf16", q.size, q), "kv": Guarded("bf16", cache.array.size, cache.array)}
    args["out"] = Guarded(dtype, rows.tokens * heads * rank)
    # p is rounded to bf16, by truncation here, before it meets the values
    loose = 3.0 if dtype == "bf16" else ROUNDED / TOLERANCE["f32"]
    return Case(made, rows, batch, args, {"out": poisoned(wanted, rows.tokens)}, loose=loose)


CASES = (head_linear, latent_write, latent_attention)
