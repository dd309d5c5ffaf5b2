"""attention: against float64, and bit for bit across targets, threads, chunking, company and the placement
of pages, with the cache's unused slots poisoned."""

from __future__ import annotations

import kernel_arrays as arrays
import numpy as np
import pytest
from kernel_arrays import Request
from kernel_harness import BASE, DESCS, VARIANTS, Buffer, Variant, call, desc

from tscompile.kernels.desc import Attention, args_of

ARGS = args_of("q", "kv:kv", "out!")
CASES = [
    desc("attention", Attention(ARGS, 4, 2, 64, "bf16", 64, 0.125, 0, "bf16")),
    desc("attention-window", Attention(ARGS, 6, 1, 80, "bf16", 32, 0.11, 40, "f32")),
    desc("attention-wide", Attention(ARGS, 40, 1, 32, "bf16", 32, 0.17, 3, "bf16")),
    desc("attention-f32", Attention(ARGS, 3, 3, 24, "f32", 64, 0.2, 0, "f32")),
    desc("attention-f32-window", Attention(ARGS, 4, 2, 32, "f32", 32, 0.18, 70, "f32")),
]
ALONE = [Request(150, 150)]
MIXED = [Request(1, 1), Request(70, 1), Request(100, 30), Request(33, 33), Request(64, 1), Request(65, 2)]


class Problem:
    """Random q, k and v of some sequences; `steps` says which of their tokens a call computes."""

    def __init__(self, name: str, lengths: list[int], seed: int = 0) -> None:
        made = DESCS[name]
        assert isinstance(made, Attention)
        self.name, self.d = name, made
        self.random = np.random.default_rng(seed)
        self.layout = arrays.KvLayout(made.kv_heads, made.head_dim, made.page_size, made.dtype)

        def draw(length: int, heads: int) -> np.ndarray:
            return arrays.stored(
                self.random.standard_normal((length, heads, made.head_dim)) * 1.5, made.dtype
            )

        self.q = [draw(length, made.heads) for length in lengths]
        self.k = [draw(length, made.kv_heads) for length in lengths]
        self.v = [draw(length, made.kv_heads) for length in lengths]

    def run(
        self,
        step: list[Request],
        variant: Variant = BASE,
        threads: int = 1,
        fill: int = 0xFF,
        shuffle: int = 0,
    ) -> list[np.ndarray]:
        """For each sequence [new, heads, head_dim], as stored. fill: what the unused slots hold; shuffle:
        seeds where pages lie."""
        counts = [-(-r.length // self.d.page_size) for r in step]
        free = np.random.default_rng(shuffle).permutation(sum(counts) + 3)
        pages = np.split(free[: sum(counts)], np.cumsum(counts)[:-1])
        cache = self.layout.empty(len(free), fill)
        batch = arrays.batch_of(step, self.d.page_size, [list(p) for p in pages])
        for request, own, k, v in zip(step, pages, self.k, self.v, strict=True):
            at = np.arange(request.length)
            self.layout.write(
                cache, own[at // self.d.page_size] * self.d.page_size + at % self.d.page_size, k[at], v[at]
            )
        q = np.concatenate([q[r.length - r.new : r.length] for r, q in zip(step, self.q, strict=True)])
        out = Buffer(q.shape, arrays.STORED[self.d.out_dtype])
        kv = Buffer(cache.shape, cache.dtype, cache)
        call(self.name, variant, batch, {"q": Buffer(q.shape, q.dtype, q), "kv": kv, "out": out}, threads)
        assert kv.array.tobytes() == cache.tobytes()
        return np.split(out.array, batch["query_start"][1:-1])

    def expected(self, step: list[Request]) -> list[np.ndarray]:
        d, found = self.d, []
        for request, *parts in zip(step, self.q, self.k, self.v, strict=True):
            q, k, v = (arrays.values(part, d.dtype) for part in parts)
            rows = np.arange(request.length - request.new, request.length)
            keys = np.arange(request.length)
            k, v = (np.repeat(x[keys], d.heads // d.kv_heads, axis=1) for x in (k, v))
            scores = np.einsum("qhd,khd->hqk", q[rows], k) * d.scale
            seen = (keys <= rows[:, None]) & ((keys > rows[:, None] - d.window) if d.window else True)
            scores = np.where(seen, scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            found.append(np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v))
        return found


def same(found: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    return [x.tobytes() for x in found] == [x.tobytes() for x in wanted]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_near_float64(name: str, variant: Variant) -> None:
    problem = Problem(name, [r.length for r in MIXED])
    for found, wanted in zip(problem.run(MIXED, variant), problem.expected(MIXED), strict=True):
        error = np.abs(arrays.values(found, problem.d.out_dtype) - wanted).max()
        # bf16: p is rounded to 8 bits before its product
        assert error < (2e-2 if problem.d.dtype == "bf16" else 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_on_every_target_and_any_threads(name: str) -> None:
    for step in (ALONE, MIXED):
        problem = Problem(name, [r.length for r in step], seed=1)
        wanted = problem.run(step)
        for variant in VARIANTS:
            for threads in (1, 2, 3, 7, 64):
                assert same(problem.run(step, variant, threads), wanted), f"{variant}, {threads} threads"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_same_bits_however_the_prompt_is_chunked(name: str, variant: Variant) -> None:
    problem = Problem(name, [r.length for r in ALONE], seed=2)
    (wanted,) = problem.run(ALONE)
    for chunks in ([64, 86], [1, 2, 61, 7, 9, 70], [33, 1, 1, 115]):
        ends = np.cumsum(chunks)
        found = [
            problem.run([Request(int(end), chunk)], variant)[0]
            for end, chunk in zip(ends, chunks, strict=True)
        ]
        assert np.concatenate(found).tobytes() == wanted.tobytes(), chunks


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_same_bits_in_any_company_and_wherever_pages_lie(name: str, variant: Variant) -> None:
    problem = Problem(name, [r.length for r in MIXED], seed=3)
    wanted = problem.run(MIXED, variant)
    assert same(problem.run(MIXED, variant, shuffle=1), wanted)
    for i, request in enumerate(MIXED):
        alone = Problem(name, [request.length])
        alone.q, alone.k, alone.v = [problem.q[i]], [problem.k[i]], [problem.v[i]]
        assert same(alone.run([request], variant), [wanted[i]])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_masked_keys_contribute_nothing(name: str, variant: Variant) -> None:
    """Not from slots that hold no token, nor from later tokens or tokens before the window whose values are
    not finite."""
    problem = Problem(name, [r.length for r in ALONE], seed=4)
    (wanted,) = problem.run(ALONE, variant)
    assert same(problem.run(ALONE, variant, fill=0), [wanted])
    d = problem.d
    # NaN in K and V of the last 20 tokens: only their own rows may change. Infinity in the first 10: rows
    # whose window has passed them must not.
    problem.k[0][-20:], problem.v[0][-20:] = (
        arrays.stored(np.full(problem.k[0][-20:].shape, x), d.dtype) for x in (np.inf, -np.inf)
    )
    problem.v[0][:10] = (
        arrays.stored(np.full(problem.v[0][:10].shape, np.inf), d.dtype) if d.window else problem.v[0][:10]
    )
    (found,) = problem.run(ALONE, variant)
    first = 10 + d.window if d.window else 0
    assert found[first:-20].tobytes() == wanted[first:-20].tobytes()
    assert found[-20:].tobytes() != wanted[-20:].tobytes()
