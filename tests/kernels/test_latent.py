"""Latent attention: the projection by head, the write of a row and the attention over them. Against float64;
bit for bit across targets, threads, chunking, company and the placement of pages, with the cache's unused
slots poisoned."""

from __future__ import annotations

import kernel_arrays as arrays
import numpy as np
import pytest
from kernel_arrays import LatentLayout, Request
from kernel_harness import BASE, DESCS, VARIANTS, Buffer, Variant, call, desc
from test_attention import ALONE, MIXED, same
from test_rows import angles, near, normal, on_every_variant, rotated

from tscompile.kernels import desc as d

PLAIN, TAIL = d.args_of("x", "weight:weight", "out!"), d.args_of("x", "weight:weight", "table:weight", "out!")
LINEARS = [
    desc("head-linear", d.HeadLinear(PLAIN, 3, 64, 48, 0, False, "bf16", "bf16", "bf16")),
    desc("head-linear-odd", d.HeadLinear(PLAIN, 2, 40, 25, 0, False, "bf16", "bf16", "f32")),
    desc("head-linear-rope", d.HeadLinear(TAIL, 3, 24, 72, 20, True, "f32", "bf16", "bf16")),
    desc("head-linear-f32", d.HeadLinear(TAIL, 5, 36, 17, 8, False, "f32", "f32", "f32")),
]
WRITE, WHOLE = d.args_of("row", "kv:kv"), d.args_of("row", "norm:weight", "table:weight", "kv:kv")
WRITES = [
    desc("latent-write", d.LatentWrite(WRITE, 80, 0.0, 0, False, "bf16", "bf16", 32)),
    desc("latent-write-whole", d.LatentWrite(WHOLE, 84, 1e-6, 20, True, "f32", "bf16", 64)),
    desc("latent-write-f32", d.LatentWrite(WHOLE, 40, 1e-5, 8, False, "f32", "f32", 32)),
]
ARGS = d.args_of("q", "kv:kv", "out!")
ATTENTIONS = [
    desc("latent", d.LatentAttention(ARGS, 4, 80, 64, "bf16", 64, 0.11, "bf16")),
    desc("latent-odd", d.LatentAttention(ARGS, 3, 60, 40, "bf16", 32, 0.13, "f32")),
    desc("latent-many-heads", d.LatentAttention(ARGS, 72, 48, 32, "bf16", 96, 0.15, "bf16")),
    desc("latent-f32", d.LatentAttention(ARGS, 5, 36, 24, "f32", 64, 0.2, "f32")),
]


@pytest.mark.parametrize("tokens", [1, 7, 37])
@pytest.mark.parametrize("name", LINEARS)
def test_head_linear(name: str, tokens: int) -> None:
    made = DESCS[name]
    assert isinstance(made, d.HeadLinear)
    x = arrays.stored(normal(1, tokens, made.heads, made.k + made.rotary), made.x_dtype)
    weight = arrays.stored(normal(2, made.heads, made.n, made.k) / made.k**0.5, made.dtype)
    laid = np.concatenate([arrays.tiles(head, made.dtype) for head in weight])
    positions, table = (np.arange(tokens) * 5 + 3) % 128, angles(made.rotary or 2)
    padded = arrays.padded_rows(table)

    def run(variant: Variant, threads: int) -> list[np.ndarray]:
        out = Buffer((tokens, made.heads, made.n + made.rotary), arrays.STORED[made.out_dtype])
        arguments = {
            "x": Buffer(x.shape, x.dtype, x),
            "weight": Buffer(laid.shape, laid.dtype, laid),
            "table": Buffer(padded.shape, np.float32, padded),
            "out": out,
        }
        call(name, variant, {"positions": positions}, arguments, threads)
        return [out.array]

    found = arrays.values(on_every_variant(run)[0], made.out_dtype)
    wide = arrays.values(x, made.x_dtype)
    head = arrays.rounded(wide[..., : made.k].astype(np.float32), made.dtype).astype(np.float64)
    wanted = np.einsum("thk,hnk->thn", head, arrays.values(weight, made.dtype))
    slack = 2.0**-8 if made.out_dtype == "bf16" else 1e-6
    assert (np.abs(found[..., : made.n] - wanted) <= slack * np.abs(wanted) + 5e-6).all()
    if made.rotary:
        turned = rotated(wide[..., made.k :], table, positions, made.interleaved)
        assert (np.abs(found[..., made.n :] - turned) <= slack * np.abs(turned) + 5e-6).all()


@pytest.mark.parametrize("name", WRITES)
def test_latent_write(name: str) -> None:
    made = DESCS[name]
    assert isinstance(made, d.LatentWrite)
    layout = LatentLayout(made.row, made.page_size, made.dtype)
    step = [Request(70, 3), Request(1, 1), Request(40, 40), Request(64, 1)]
    counts = [-(-r.length // made.page_size) for r in step]
    pages = np.split(np.random.default_rng(5).permutation(sum(counts)), np.cumsum(counts)[:-1])
    batch = arrays.batch_of(step, made.page_size, [list(p) for p in pages])
    slots, positions = batch["slots"], batch["positions"]
    row = arrays.stored(normal(1, len(slots), made.row), made.row_dtype)
    rank = made.row - made.rotary
    norm, table = normal(2, rank), angles(made.rotary or 2)
    empty = layout.empty(sum(counts), 0xFF)

    def run(variant: Variant, threads: int) -> list[np.ndarray]:
        kv = Buffer(empty.shape, empty.dtype, empty)
        arguments = {"row": Buffer(row.shape, row.dtype, row), "kv": kv}
        for role, weight in (("norm", norm), ("table", table)):
            padded = arrays.padded_rows(weight)
            arguments[role] = Buffer(padded.shape, np.float32, padded)
        call(name, variant, batch, arguments, threads)
        return [kv.array]

    (cache,) = on_every_variant(run)
    found, wanted = layout.read(cache, slots), arrays.values(row, made.row_dtype)
    if made.rotary:
        latent, key = wanted[:, :rank], wanted[:, None, rank:]
        latent = latent / np.sqrt((latent**2).mean(-1, keepdims=True) + made.eps) * norm
        wanted = np.concatenate([latent, rotated(key, table, positions, made.interleaved)[:, 0]], -1)
    assert near(found[:, : made.row], wanted, made.dtype)
    assert not found[:, made.row :].any()
    erased = cache.copy()  # and nothing else
    layout.write(erased, slots, np.full((len(slots), layout.padded), empty.reshape(-1)[0]))
    assert erased.tobytes() == empty.tobytes()


class Problem:
    """Random queries and rows of some sequences; `step` says which of their tokens a call computes."""

    def __init__(self, name: str, lengths: list[int], seed: int = 0) -> None:
        made = DESCS[name]
        assert isinstance(made, d.LatentAttention)
        self.name, self.d = name, made
        self.layout = LatentLayout(made.row, made.page_size, made.dtype)
        random = np.random.default_rng(seed)

        def draw(*shape: int) -> np.ndarray:
            return arrays.stored(random.standard_normal(shape) * 1.5, made.dtype)

        self.q = [draw(length, made.heads, made.row) for length in lengths]
        self.rows = [draw(length, made.row) for length in lengths]

    def run(
        self,
        step: list[Request],
        variant: Variant = BASE,
        threads: int = 1,
        fill: int = 0xFF,
        shuffle: int = 0,
    ) -> list[np.ndarray]:
        """For each sequence [new, heads, rank], as stored. fill: what the unused slots hold; shuffle: seeds
        where pages lie."""
        size = self.d.page_size
        counts = [-(-r.length // size) for r in step]
        free = np.random.default_rng(shuffle).permutation(sum(counts) + 3)
        pages = np.split(free[: sum(counts)], np.cumsum(counts)[:-1])
        cache = self.layout.empty(len(free), fill)
        batch = arrays.batch_of(step, size, [list(p) for p in pages])
        for request, own, rows in zip(step, pages, self.rows, strict=True):
            at = np.arange(request.length)
            self.layout.write(cache, own[at // size] * size + at % size, rows[at])
        q = np.concatenate([q[r.length - r.new : r.length] for r, q in zip(step, self.q, strict=True)])
        out = Buffer((*q.shape[:2], self.d.rank), arrays.STORED[self.d.out_dtype])
        kv = Buffer(cache.shape, cache.dtype, cache)
        call(self.name, variant, batch, {"q": Buffer(q.shape, q.dtype, q), "kv": kv, "out": out}, threads)
        assert kv.array.tobytes() == cache.tobytes()
        return np.split(out.array, batch["query_start"][1:-1])

    def expected(self, step: list[Request]) -> list[np.ndarray]:
        found = []
        for request, *parts in zip(step, self.q, self.rows, strict=True):
            q, rows = (arrays.values(part, self.d.dtype) for part in parts)
            at = np.arange(request.length - request.new, request.length)
            keys = rows[: request.length]
            scores = np.einsum("qhd,kd->hqk", q[at], keys) * self.d.scale
            scores = np.where(np.arange(request.length) <= at[:, None], scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p = p / p.sum(-1, keepdims=True)
            found.append(np.einsum("hqk,kd->qhd", p, keys[:, : self.d.rank]))
        return found


@pytest.mark.parametrize("name", ATTENTIONS)
def test_near_float64(name: str) -> None:
    problem = Problem(name, [r.length for r in MIXED])
    for found, wanted in zip(problem.run(MIXED), problem.expected(MIXED), strict=True):
        error = np.abs(arrays.values(found, problem.d.out_dtype) - wanted).max()
        # bf16: p is rounded to 8 bits before its product
        assert error < (2e-2 if problem.d.dtype == "bf16" else 1e-5)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_same_bits_on_every_target_and_any_threads(name: str) -> None:
    for step in (ALONE, MIXED):
        problem = Problem(name, [r.length for r in step], seed=1)
        wanted = problem.run(step)
        for variant in VARIANTS:
            for threads in (1, 2, 7, 64):
                assert same(problem.run(step, variant, threads), wanted), f"{variant}, {threads} threads"


@pytest.mark.parametrize("name", ATTENTIONS)
def test_same_bits_however_chunked_and_in_any_company(name: str) -> None:
    problem = Problem(name, [r.length for r in ALONE], seed=2)
    (wanted,) = problem.run(ALONE)
    for chunks in ([64, 86], [1, 2, 61, 7, 9, 70], [33, 1, 1, 115]):
        steps = [Request(int(end), chunk) for end, chunk in zip(np.cumsum(chunks), chunks, strict=True)]
        found = np.concatenate([problem.run([step])[0] for step in steps])
        assert found.tobytes() == wanted.tobytes(), chunks
    company = Problem(name, [r.length for r in MIXED], seed=3)
    together = company.run(MIXED)
    assert same(company.run(MIXED, shuffle=1), together)
    for i, request in enumerate(MIXED):
        alone = Problem(name, [request.length])
        alone.q, alone.rows = [company.q[i]], [company.rows[i]]
        assert same(alone.run([request]), [together[i]])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_masked_keys_contribute_nothing(name: str, variant: Variant) -> None:
    """Not from slots that hold no token, nor from later tokens whose values are not finite."""
    problem = Problem(name, [r.length for r in ALONE], seed=4)
    (wanted,) = problem.run(ALONE, variant)
    assert same(problem.run(ALONE, variant, fill=0), [wanted])
    problem.rows[0][-20:] = arrays.stored(np.full(problem.rows[0][-20:].shape, np.inf), problem.d.dtype)
    (found,) = problem.run(ALONE, variant)
    assert found[:-20].tobytes() == wanted[:-20].tobytes()
    assert found[-20:].tobytes() != wanted[-20:].tobytes()
