"""Kernels of device targets, in Triton's interpreter: random shapes and batches, poisoned outputs, and
float64 references written from ARCHITECTURE.md alone.

Run by test_triton_arithmetic.py as a process of its own, as Triton reads TRITON_INTERPRET once:
    TRITON_INTERPRET=1 python triton_arrays.py SEED CASES  ->  a line of JSON a case
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "kernels")]

import kernel_arrays as arrays  # noqa: E402
import triton_experts  # noqa: E402
import triton_latents  # noqa: E402
from triton_case import (  # noqa: E402
    TOLERANCE,
    Cache,
    Case,
    Guarded,
    Rng,
    bucket,
    in_rows,
    normal,
    paged,
    poisoned,
    sizes,
)

from tscompile.kernels import desc  # noqa: E402
from tscompile.kernels.desc import args_of  # noqa: E402


def embed(rng: Rng) -> Case:
    rows, num = bucket(rng)
    vocab, width, dtype = int(rng.integers(5, 40)), int(rng.integers(1, 200)), "bf16"
    shard = bool(rng.integers(2))
    table = normal(rng, vocab, width, dtype=dtype)
    first = int(rng.integers(3)) * vocab if shard else 0
    ids = rng.integers(0, 3 * vocab if shard else vocab, num)
    made = desc.Embed(
        args_of("table:weight", "rank:weight", "out!") if shard else args_of("table:weight", "out!"),
        str(rng.choice(["token_ids", "positions"])),
        width,
        dtype,
        "rows",
        vocab if shard else 0,
    )
    own = (ids >= first) & (ids < first + vocab)
    wanted = np.where(own[:, None], table[np.where(own, ids - first, 0)], 0.0)
    padded = in_rows(table, dtype)
    args = {"table": Guarded(dtype, padded.size, padded), "out": Guarded("f32", rows.tokens * width)}
    args["rank"] = Guarded("f32", 1, np.array([first // vocab], np.float32))
    return Case(
        made, rows, {"sizes": sizes(num), made.ids: ids}, args, {"out": poisoned(wanted, rows.tokens)}
    )


def gather_rows(rng: Rng) -> Case:
    rows, num = bucket(rng)
    width, logits = int(rng.integers(1, 200)), int(rng.integers(0, min(num, rows.seqs) + 1))
    x = normal(rng, rows.tokens, width, dtype="bf16")
    chosen = np.sort(rng.choice(num, logits, replace=False))
    made = desc.GatherRows(args_of("x", "out!"), width, "bf16")
    args = {"x": Guarded("bf16", x.size, x), "out": Guarded("bf16", rows.seqs * width)}
    batch = {"sizes": sizes(num, logits=logits), "logit_rows": np.append(chosen, 2**30)}
    return Case(made, rows, batch, args, {"out": poisoned(x[chosen].astype(np.float64), rows.seqs)})


def rms_norm(rng: Rng) -> Case:
    rows, num = bucket(rng)
    heads, width, dim = int(rng.choice([1, 1, 3])), int(rng.integers(1, 300)), str(rng.choice(["T", "L"]))
    most = rows.of(dim)
    num = min(num, most)
    dtype, adds = str(rng.choice(["bf16", "f32"])), bool(rng.integers(2))
    gives = adds and bool(rng.integers(2))
    words = ["x", *(["delta"] if adds else []), "weight:weight", *(["sum!"] if gives else []), "out!"]
    made = desc.RmsNorm(args_of(*words), dim, heads, width, 1e-5, dtype)
    x, delta, weight = normal(rng, most, heads, width), normal(rng, most, heads, width), normal(rng, width)
    total = (x + delta).astype(np.float64) if adds else x.astype(np.float64)
    norm = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-5) * weight
    args = {"x": Guarded("f32", x.size, x), "delta": Guarded("f32", x.size, delta)}
    args |= {"weight": Guarded("f32", width, weight), "sum": Guarded("f32", x.size)}
    args["out"] = Guarded(dtype, x.size)
    expected = {"out": poisoned(norm[:num], most)} | ({"sum": poisoned(total[:num], most)} if gives else {})
    batch = {"sizes": sizes(num if dim == "T" else most, logits=num)}
    return Case(made, rows, batch, args, expected)


def linear(rng: Rng) -> Case:
    rows, num = bucket(rng)
    gather = bool(rng.integers(3) == 0)
    dim = "L" if gather else str(rng.choice(["T", "L"]))
    most, fold = rows.of(dim), int(rng.choice([1, 1, 2])) if not gather else 1
    logits = int(rng.integers(1, min(num, most) + 1)) if gather else min(num, most)
    k, swiglu = int(rng.choice([8, 40, 64, 96, 200])), int(rng.choice([0, 0, 24, 64]))
    n = 2 * arrays.round_up(swiglu, 16) if swiglu else int(rng.choice([1, 17, 64, 130]))
    bias_size = int(rng.choice([0, n if swiglu else n * fold]))
    dtype = "bf16" if swiglu or rng.integers(2) else "f32"
    words = ["x", "weight:weight", *(["bias:weight"] if bias_size else []), "out!"]
    made = desc.Linear(args_of(*words), dim, gather, fold, k, n, "bf16", bias_size, swiglu, dtype)
    x = normal(rng, rows.tokens if gather else most, fold, k, dtype="bf16")
    weight, bias = normal(rng, n, k, dtype="bf16"), normal(rng, max(bias_size, 1))
    chosen = np.sort(rng.choice(num, logits, replace=False)) if gather else np.arange(logits)
    total = x[chosen].astype(np.float64) @ weight.T.astype(np.float64)  # [L, fold, n]
    if bias_size:
        total = total + (bias if swiglu else bias.reshape(fold, n))
    if swiglu:
        halves = total.reshape(*total.shape[:-1], n // 32, 2, 16)
        gate, up = (halves[..., i, :].reshape(*total.shape[:-1], n // 2)[..., :swiglu] for i in (0, 1))
        total = gate / (1 + np.exp(-gate)) * up
    padded = in_rows(weight, "bf16")
    args = {"x": Guarded("bf16", x.size, x), "weight": Guarded("bf16", padded.size, padded)}
    args |= {"bias": Guarded("f32", bias.size, bias), "out": Guarded(dtype, most * fold * (swiglu or n))}
    batch = {"sizes": sizes(num if dim == "T" or gather else most, logits=logits), "logit_rows": chosen}
    if dim == "T":
        batch["sizes"] = sizes(logits)
    return Case(made, rows, batch, args, {"out": poisoned(total, most)}, loose=4.0)


def qkv_write(rng: Rng) -> Case:
    rows, num = bucket(rng)
    kv_heads, group, dim = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.choice([8, 32, 40, 64]))
    heads, page_size, interleaved = kv_heads * group, int(rng.choice([32, 64])), bool(rng.integers(2))
    rotary = int(rng.choice([0, dim, dim // 2]))
    norms = bool(rng.integers(2))
    words = ["qkv", *(["q_norm:weight", "k_norm:weight"] if norms else [])]
    words += [*(["table:weight"] if rotary else []), "kv:kv", "q!"]
    eps = (1e-6, 1e-5) if norms else (0.0, 0.0)
    made = desc.QkvWrite(args_of(*words), heads, kv_heads, dim, *eps, rotary, interleaved, "bf16", page_size)
    found, batch, num_pages = paged(rng, rows, num, page_size)
    most = max(s.length for s in found)
    angles = rng.standard_normal((most, rotary // 2)).astype(np.float32)
    table = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    qkv = normal(rng, rows.tokens, heads + 2 * kv_heads, dim)
    weights = {"q_norm": normal(rng, dim), "k_norm": normal(rng, dim)}
    x = qkv[:num].astype(np.float64)
    for name, part, e in (
        ("q_norm", slice(0, heads), eps[0]),
        ("k_norm", slice(heads, heads + kv_heads), eps[1]),
    ):
        if norms:
            y = x[:, part]
            x[:, part] = y / np.sqrt((y**2).mean(-1, keepdims=True) + e) * weights[name]
    if rotary:
        at = table[batch["positions"]].astype(np.float64)[:, None]
        cos, sin = at[..., : rotary // 2], at[..., rotary // 2 :]
        y = x[:, : heads + kv_heads, :rotary]
        if interleaved:
            a, b = y[..., 0::2].copy(), y[..., 1::2].copy()
            y[..., 0::2], y[..., 1::2] = a * cos - b * sin, b * cos + a * sin
        else:
            a, b = y[..., : rotary // 2].copy(), y[..., rotary // 2 :].copy()
            y[..., : rotary // 2], y[..., rotary // 2 :] = a * cos - b * sin, b * cos + a * sin
    cache = Cache(kv_heads, dim, page_size, num_pages)
    for token, slot in enumerate(batch["slots"]):
        cache.write(slot, x[token, heads : heads + kv_heads], x[token, heads + kv_heads :])
    args = {"qkv": Guarded("f32", qkv.size, qkv), "q": Guarded("bf16", rows.tokens * heads * dim)}
    args |= {name: Guarded("f32", dim, weight) for name, weight in weights.items()}
    if rotary:
        padded = in_rows(table, "f32")
        args["table"] = Guarded("f32", padded.size, padded)
    args["kv"] = Guarded("bf16", cache.array.size)
    expected = {"q": poisoned(x[:, :heads], rows.tokens), "kv": cache.array}
    return Case(made, rows, batch, args, expected, loose=2.0)


def attention(rng: Rng) -> Case:
    rows, num = bucket(rng)
    kv_heads, group, dim = (
        int(rng.integers(1, 3)),
        int(rng.choice([1, 3, 4, 8])),
        int(rng.choice([8, 40, 64])),
    )
    heads, page_size, window = kv_heads * group, int(rng.choice([32, 64, 96])), int(rng.choice([0, 0, 5, 70]))
    dtype = str(rng.choice(["bf16", "f32"]))
    made = desc.Attention(
        args_of("q", "kv:kv", "out!"), heads, kv_heads, dim, "bf16", page_size, dim**-0.5, window, dtype
    )
    found, batch, num_pages = paged(rng, rows, num, page_size)
    cache = Cache(kv_heads, dim, page_size, num_pages)
    q = normal(rng, rows.tokens, heads, dim, dtype="bf16")
    wanted = np.empty((num, heads, dim))
    for i, sequence in enumerate(found):
        k, v = (normal(rng, sequence.length, kv_heads, dim, dtype="bf16") for _ in range(2))
        for position in range(sequence.length):
            page = batch["page_table"][i][position // page_size]
            cache.write(page * page_size + position % page_size, k[position], v[position])
        begin = batch["query_start"][i]
        for token in range(sequence.new):
            last = sequence.length - sequence.new + token + 1
            seen = slice(max(0, last - window) if window else 0, last)
            for head in range(heads):
                scores = k[seen, head // group].astype(np.float64) @ q[begin + token, head] * dim**-0.5
                p = np.exp(scores - scores.max())
                wanted[begin + token, head] = p @ v[seen, head // group] / p.sum()
    args = {"q": Guarded("bf16", q.size, q), "kv": Guarded("bf16", cache.array.size, cache.array)}
    args["out"] = Guarded(dtype, q.size)
    # p is rounded to bf16, by truncation here, before it meets v
    case = Case(made, rows, batch, args, {"out": poisoned(wanted, rows.tokens)})
    case.loose = 3.0 if dtype == "bf16" else 2.0**-7 * 2 / TOLERANCE["f32"]
    return case


def elementwise(rng: Rng) -> Case:
    """silu(gate) * up of a row [gate | up], rounded and not; and its sum with a vector."""
    rows, num = bucket(rng)
    width = int(rng.integers(1, 150))
    x, bias = normal(rng, rows.tokens, 2 * width), normal(rng, width)
    segment = desc.Segment(
        1,
        width,
        0,
        0,
        ((0, 0, 0, 1), (0, width, 0, 1), (1, 0, 0, 1)),
        (
            desc.Node("silu", (0,)),
            desc.Node("mul", (3, 1)),
            desc.Node("add", (4, 2)),
            desc.Node("cast_bf16", (4,)),
        ),
        (6, 5),
    )
    leaves = (desc.Leaf("f32", 2 * width), desc.Leaf("f32", 0))
    words = args_of("a0", "a1:weight", "y0!", "y1!")
    made = desc.Elementwise(words, "T", width, leaves, (segment,), ("bf16", "f32"))
    gate, up = (x[:num, part].astype(np.float64) for part in (slice(0, width), slice(width, None)))
    product = gate / (1 + np.exp(-gate)) * up
    args = {"a0": Guarded("f32", x.size, x), "a1": Guarded("f32", width, bias)}
    args |= {"y0": Guarded("bf16", rows.tokens * width), "y1": Guarded("f32", rows.tokens * width)}
    expected = {"y0": poisoned(product, rows.tokens), "y1": poisoned(product + bias, rows.tokens)}
    return Case(made, rows, {"sizes": sizes(num)}, args, expected, loose=2.0)


CASES: dict[str, Callable[[Rng], Case]] = {
    made.__name__: made
    for made in (
        embed,
        gather_rows,
        rms_norm,
        linear,
        qkv_write,
        attention,
        elementwise,
        *triton_experts.CASES,
        *triton_latents.CASES,
    )
}


def main(first: int, num: int, kinds: list[str]) -> None:
    for kind in kinds or CASES:
        for seed in range(first, first + num):
            rng = np.random.default_rng([seed, list(CASES).index(kind)])
            case = CASES[kind](rng)
            line: dict[str, Any] = {
                "kind": kind,
                "seed": seed,
                "desc": case.made.text,
                "rows": str(case.rows),
            }
            try:
                line["differences"] = case.run()
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}"
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
