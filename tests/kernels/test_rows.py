"""The kernels that go row by row: embed, rms_norm, gather_rows, rope, kv_write, qkv_write. Against float64;
bit for bit across targets and threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kernel_arrays as arrays
import numpy as np
import pytest
from kernel_arrays import Request
from kernel_harness import BASE, DESCS, VARIANTS, Buffer, Variant, call, desc

from tscompile.kernels import desc as d

STEP = [Request(70, 3), Request(1, 1), Request(40, 40), Request(64, 1)]
TABLE, OUT = ("table:weight", "out!"), ("x", "out!")
SHARD = ("table:weight", "rank:weight", "out!")
EMBEDS = [
    desc("embed", d.Embed(d.args_of(*TABLE), "token_ids", 100, "bf16", "rows")),
    desc("embed-tiles", d.Embed(d.args_of(*TABLE), "token_ids", 100, "bf16", "tiles")),
    desc("embed-f32", d.Embed(d.args_of(*TABLE), "positions", 37, "f32", "rows")),
    desc("embed-f32-tiles", d.Embed(d.args_of(*TABLE), "token_ids", 64, "f32", "tiles")),
    desc("embed-shard", d.Embed(d.args_of(*SHARD), "token_ids", 37, "bf16", "rows", 16)),
    desc("embed-shard-tiles", d.Embed(d.args_of(*SHARD), "token_ids", 40, "f32", "tiles", 16)),
]
NORMS = [
    desc("norm", d.RmsNorm(d.args_of("x", "weight:weight", "out!"), "T", 1, 96, 1e-6, "bf16")),
    desc(
        "norm-add",
        d.RmsNorm(d.args_of("delta", "x", "weight:weight", "sum!", "out!"), "T", 1, 72, 1e-5, "bf16"),
    ),
    desc("norm-twice", d.RmsNorm(d.args_of("x+delta", "weight:weight", "out!"), "L", 1, 31, 1e-5, "f32")),
    desc("norm-heads", d.RmsNorm(d.args_of("x", "weight:weight", "out!"), "T", 3, 24, 1e-6, "f32")),
]
GATHERS = [
    desc("gather", d.GatherRows(d.args_of(*OUT), 50, "f32")),
    desc("gather-bf16", d.GatherRows(d.args_of(*OUT), 72, "bf16")),
]
ROPES = [
    desc("rope", d.Rope(d.args_of("x", "table:weight", "out!"), 3, 80, 40, True, "bf16")),
    desc("rope-whole", d.Rope(d.args_of("x", "table:weight", "out!"), 2, 64, 64, False, "f32")),
]
KV_WRITES = [
    desc("kv-write", d.KvWrite(d.args_of("kv:kv", "k", "v"), 2, 80, "f32", "bf16", "bf16", 32)),
    desc("kv-write-f32", d.KvWrite(d.args_of("kv:kv", "k", "v"), 3, 24, "f32", "f32", "f32", 64)),
    desc("kv-write-same", d.KvWrite(d.args_of("kv:kv", "k+v"), 1, 32, "f32", "f32", "bf16", 64)),
]
FULL = ("qkv", "q_norm:weight", "table:weight", "k_norm:weight", "kv:kv", "q!")
QKV_WRITES = [
    desc("qkv-write", d.QkvWrite(d.args_of(*FULL), 4, 2, 64, 1e-6, 1e-5, 64, False, "bf16", 32)),
    desc(
        "qkv-write-partial",
        d.QkvWrite(d.args_of("qkv", "table:weight", "kv:kv", "q!"), 3, 1, 40, 0.0, 0.0, 20, True, "bf16", 64),
    ),
    desc("qkv-write-f32", d.QkvWrite(d.args_of(*FULL), 2, 2, 24, 1e-6, 1e-6, 24, False, "f32", 32)),
    desc(
        "qkv-write-plain",
        d.QkvWrite(d.args_of("qkv", "kv:kv", "q!"), 2, 1, 96, 0.0, 0.0, 0, False, "f32", 64),
    ),
]


def each(names: list[str]) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("name", names)


def on_every_variant(run: Callable[[Variant, int], list[np.ndarray]]) -> list[np.ndarray]:
    """What `run` gives, the same everywhere."""
    wanted = run(BASE, 1)
    for variant in VARIANTS:
        for threads in (1, 2, 3, 7, 64):
            found = run(variant, threads)
            assert [x.tobytes() for x in found] == [x.tobytes() for x in wanted], (
                f"{variant}, {threads} threads"
            )
    return wanted


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@each(EMBEDS)
def test_embed(name: str) -> None:
    made = DESCS[name]
    assert isinstance(made, d.Embed)
    ids = np.array([0, 63, 17, 5, 16, 63, 40])
    table = arrays.stored(normal(1, 64, made.width), made.dtype)
    wanted = arrays.values(table, made.dtype)[ids]
    if made.shard:  # the second of four ranks
        wanted[ids // made.shard != 1] = 0
        table = table[made.shard :][: made.shard]
    laid = arrays.tiles(table, made.dtype) if made.layout == "tiles" else arrays.padded_rows(table)
    rank = Buffer((1,), np.float32, np.ones(1))

    def run(variant: Variant, threads: int) -> list[np.ndarray]:
        out = Buffer((len(ids), made.width), np.float32)
        call(
            name,
            variant,
            {made.ids: ids},
            {"table": Buffer(laid.shape, laid.dtype, laid), "rank": rank, "out": out},
            threads,
        )
        return [out.array]

    (found,) = on_every_variant(run)
    assert (found == wanted).all()


@each(NORMS)
def test_rms_norm(name: str) -> None:
    made = DESCS[name]
    assert isinstance(made, d.RmsNorm)
    shape = (9, made.heads, made.width)
    x, weight = normal(1, *shape), normal(3, made.width)
    delta = x if name == "norm-twice" else normal(2, *shape)

    def run(variant: Variant, threads: int) -> list[np.ndarray]:
        out, total = Buffer(shape, arrays.STORED[made.out_dtype]), Buffer(shape, np.float32)
        padded = arrays.padded_rows(weight)
        arguments = {
            "x": Buffer(shape, np.float32, x),
            "delta": Buffer(shape, np.float32, delta),
            "weight": Buffer(padded.shape, np.float32, padded),
            "sum": total,
            "out": out,
        }
        call(name, variant, {"num_tokens": 9, "logit_rows": np.arange(9)}, arguments, threads)
        return [out.array, *([total.array] if made.has("sum") else [])]

    found = on_every_variant(run)
    y = x + delta if made.has("delta") else x
    assert len(found) == 1 or (found[1] == y).all()
    wide = y.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + made.eps) * weight
    tolerance = 2.0**-8 if made.out_dtype == "bf16" else 1e-6
    assert (
        np.abs(arrays.values(found[0], made.out_dtype) - wanted) <= tolerance * np.abs(wanted) + 1e-12
    ).all()


@each(GATHERS)
def test_gather_rows(name: str) -> None:
    made = DESCS[name]
    assert isinstance(made, d.GatherRows)
    x, rows = arrays.stored(normal(1, 12, made.width), made.dtype), np.array([0, 3, 4, 11])

    def run(variant: Variant, threads: int) -> list[np.ndarray]:
        out = Buffer((len(rows), made.width), x.dtype)
        arguments = {"x": Buffer(x.shape, x.dtype, x), "out": out}
        call(name, variant, {"num_tokens": 12, "logit_rows": rows}, arguments, threads)
        return [out.array]

    assert (on_every_variant(run)[0] == x[rows]).all()


def angles(rotary: int) -> np.ndarray:
    """A rope table [128, rotary]: cosines, then sines."""
    angle = np.arange(128)[:, None] * 10000.0 ** -(np.arange(rotary // 2) * 2 / rotary)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)


def rotated(x: np.ndarray, table: np.ndarray, positions: np.ndarray, interleaved: bool = False) -> np.ndarray:
    """float64: x[T, heads, D] with its first elements rotated in halves, or neighbours, given in halves."""
    half = table.shape[-1] // 2
    if interleaved:
        first = x[..., : 2 * half]
        x = np.concatenate([first[..., 0::2], first[..., 1::2], x[..., 2 * half :]], axis=-1)
    cosine, sine = (
        part[positions][:, None].astype(np.float64) for part in (table[:, :half], table[:, half:])
    )
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine, rest], axis=-1)


def near(found: np.ndarray, wanted: np.ndarray, dtype: str) -> bool:
    """Both of values of order 1."""
    slack = np.abs(wanted) * 2.0**-8 if dtype == "bf16" else 0
    return bool((np.abs(arrays.values(found, dtype) - wanted) <= slack + 2e-6).all())


@each(ROPES)
def test_rope(name: str) -> None:
    made = DESCS[name]
    assert isinstance(made, d.Rope)
    positions, table = np.array([0, 1, 127, 64, 5]), angles(made.rotary)
    x = normal(1, 5, made.heads, made.head_dim)
    padded = arrays.padded_rows(table)

    def run(variant: Variant, threads: int) -> list[np.ndarray]:
        out = Buffer(x.shape, arrays.STORED[made.out_dtype])
        arguments = {
            "x": Buffer(x.shape, x.dtype, x),
            "table": Buffer(padded.shape, np.float32, padded),
            "out": out,
        }
        call(name, variant, {"positions": positions}, arguments, threads)
        return [out.array]

    assert near(
        on_every_variant(run)[0],
        rotated(x.astype(np.float64), table, positions, made.interleaved),
        made.out_dtype,
    )


class Cache:
    """A poisoned cache for STEP's tokens."""

    def __init__(self, kv_heads: int, head_dim: int, page_size: int, dtype: str) -> None:
        self.layout = arrays.KvLayout(kv_heads, head_dim, page_size, dtype)
        counts = [-(-r.length // page_size) for r in STEP]
        pages = np.split(np.random.default_rng(5).permutation(sum(counts)), np.cumsum(counts)[:-1])
        self.batch = arrays.batch_of(STEP, page_size, [list(p) for p in pages])
        self.empty = self.layout.empty(sum(counts), 0xFF)

    def buffer(self) -> Buffer:
        return Buffer(self.empty.shape, self.empty.dtype, self.empty)

    def check(self, cache: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Holds k and v [T, kv_heads, head_dim] as stored, zeros in their padding, and nothing else."""
        layout, slots = self.layout, self.batch["slots"]
        for found, wanted in zip(layout.read(cache, slots), (k, v), strict=True):
            assert (found[..., : layout.head_dim] == wanted).all()
            assert not found[..., layout.head_dim :].any()
        erased = cache.copy()
        poison = np.full((*k.shape[:2], layout.padded), self.empty.reshape(-1)[0])
        whole = arrays.KvLayout(layout.kv_heads, layout.padded, layout.page_size, layout.dtype)
        whole.write(erased, slots, poison, poison)
        assert erased.tobytes() == self.empty.tobytes()


@each(KV_WRITES)
def test_kv_write(name: str) -> None:
    made = DESCS[name]
    assert isinstance(made, d.KvWrite)
    cache = Cache(made.kv_heads, made.head_dim, made.page_size, made.dtype)
    shape = (len(cache.batch["slots"]), made.kv_heads, made.head_dim)
    k = arrays.stored(normal(1, *shape), made.k_dtype)
    v = k if name == "kv-write-same" else arrays.stored(normal(2, *shape), made.v_dtype)

    def run(variant: Variant, threads: int) -> list[np.ndarray]:
        kv = cache.buffer()
        call(
            name,
            variant,
            cache.batch,
            {"kv": kv, "k": Buffer(shape, k.dtype, k), "v": Buffer(shape, v.dtype, v)},
            threads,
        )
        return [kv.array]

    (found,) = on_every_variant(run)
    cache.check(
        found,
        *(arrays.stored(arrays.values(x, t), made.dtype) for x, t in ((k, made.k_dtype), (v, made.v_dtype))),
    )


@each(QKV_WRITES)
def test_qkv_write(name: str) -> None:
    made = DESCS[name]
    assert isinstance(made, d.QkvWrite)
    cache = Cache(made.kv_heads, made.head_dim, made.page_size, made.dtype)
    tokens, positions = len(cache.batch["slots"]), cache.batch["positions"]
    heads = made.heads + 2 * made.kv_heads
    qkv, q_norm, k_norm = (
        normal(1, tokens, heads, made.head_dim),
        normal(2, made.head_dim),
        normal(3, made.head_dim),
    )
    table = angles(made.rotary) if made.rotary else np.zeros((1, 1), np.float32)

    def run(variant: Variant, threads: int) -> list[np.ndarray]:
        kv, q = cache.buffer(), Buffer((tokens, made.heads, made.head_dim), arrays.STORED[made.dtype])
        arguments = {"qkv": Buffer(qkv.shape, np.float32, qkv), "kv": kv, "q": q}
        for role, weight in (("q_norm", q_norm), ("k_norm", k_norm), ("table", table)):
            padded = arrays.padded_rows(weight)
            arguments[role] = Buffer(padded.shape, np.float32, padded)
        call(name, variant, cache.batch, arguments, threads)
        return [kv.array, q.array]

    kv, q = on_every_variant(run)
    wide = qkv.astype(np.float64)
    parts = np.split(wide, [made.heads, made.heads + made.kv_heads], axis=1)
    for i, (weight, eps) in enumerate(((q_norm, made.q_eps), (k_norm, made.k_eps))):
        if made.has("q_norm"):
            parts[i] = parts[i] / np.sqrt((parts[i] ** 2).mean(-1, keepdims=True) + eps) * weight
        if made.rotary:
            parts[i] = rotated(parts[i], table, positions, made.interleaved)
    assert near(q, parts[0], made.dtype)
    k, v = (x[..., : made.head_dim] for x in cache.layout.read(kv, cache.batch["slots"]))
    assert near(k, parts[1], made.dtype)
    assert (v == arrays.stored(parts[2].astype(np.float32), made.dtype)).all()
    cache.check(kv, k, v)
