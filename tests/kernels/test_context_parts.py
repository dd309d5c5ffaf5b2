"""Kernels whose cache holds a part of the context: writes keep their part's tokens and nothing else;
attention part by part, merged, against float64, and bit for bit across targets, threads, chunking, company
and the placement of pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import kernel_arrays as arrays
import numpy as np
import pytest
import test_attention
import test_latent
from kernel_arrays import KvLayout, LatentLayout, Request
from kernel_harness import BASE, DESCS, VARIANTS, Buffer, Variant, call, desc
from test_attention import ALONE, MIXED, same
from test_rows import angles, normal, on_every_variant

from tscompile.kernels import desc as d

PART = d.Arg(("part",), "weight")


def in_parts(name: str, parts: int) -> str:
    """The same kernel over a part of the context."""
    made: Any = DESCS[name]
    inputs = [arg for arg in made.args if not arg.written or arg.kind == "kv"]
    outputs = [arg for arg in made.args if arg not in inputs]
    more = {"out_dtype": "f32"} if hasattr(made, "out_dtype") else {}
    return desc(f"{name}-part", replace(made, args=(*inputs, PART, *outputs), parts=parts, **more))


WRITES = [
    in_parts(name, parts)
    for name, parts in (
        ("kv-write", 3),
        ("kv-write-f32", 2),
        ("qkv-write", 2),
        ("qkv-write-f32", 4),
        ("latent-write", 3),
        ("latent-write-f32", 2),
    )
]
ATTENTIONS = [
    in_parts(name, parts)
    for name, parts in (
        ("attention-window", 2),
        ("attention-wide", 3),
        ("attention-f32-window", 4),
        ("latent-many-heads", 2),
        ("latent-f32", 2),
    )
]


def merging(name: str) -> str:
    made: Any = DESCS[name]
    width = made.rank if isinstance(made, d.LatentAttention) else made.head_dim
    args = d.args_of("x", "out!")
    return desc(f"{name}-merged", d.MergeParts(args, made.parts, made.heads, width, made.dtype))


MERGED = {name: merging(name) for name in ATTENTIONS}


def number_of(part: int) -> Buffer:
    return Buffer((16,), np.float32, part)


@pytest.mark.parametrize("name", WRITES)
def test_writes_keep_their_part(name: str) -> None:
    """The parts' caches have between them what the kernel without parts writes, and nothing else."""
    made: Any = DESCS[name]
    plain, size, span = name.removesuffix("-part"), made.page_size, made.page_size * made.parts
    latent = isinstance(made, d.LatentWrite)
    shape = (made.row, size, made.dtype) if latent else (made.kv_heads, made.head_dim, size, made.dtype)
    layout: Any = (LatentLayout if latent else KvLayout)(*shape)
    step = [Request(70, 3), Request(1, 1), Request(120, 120), Request(64, 1)]

    def batch_of(page: int) -> dict[str, np.ndarray]:
        counts = [-(-r.length // page) for r in step]
        pages = np.split(np.random.default_rng(5).permutation(sum(counts)), np.cumsum(counts)[:-1])
        return arrays.batch_of(step, page, [list(p) for p in pages])

    tokens, rotary = sum(r.new for r in step), getattr(made, "rotary", 0)
    inputs = {"table": arrays.padded_rows(angles(rotary or 2))}
    if latent:
        inputs |= {"row": arrays.stored(normal(1, tokens, made.row), made.row_dtype)}
        inputs |= {"norm": arrays.padded_rows(normal(2, made.row - rotary))}
    elif isinstance(made, d.QkvWrite):
        inputs |= {"qkv": normal(1, tokens, made.heads + 2 * made.kv_heads, made.head_dim)}
        inputs |= {f"{x}_norm": arrays.padded_rows(normal(i, made.head_dim)) for i, x in ((2, "q"), (3, "k"))}
    else:
        rows = [normal(i, tokens, made.kv_heads, made.head_dim) for i in (1, 2)]
        inputs |= {"k": arrays.stored(rows[0], made.k_dtype), "v": arrays.stored(rows[1], made.v_dtype)}

    def written(name: str, batch: dict[str, np.ndarray], variant: Variant, threads: int, part: int) -> Any:
        cache = layout.empty(int(batch["slots"].max()) // size + 1, 0xFF)
        arguments = {role: Buffer(x.shape, x.dtype, x) for role, x in inputs.items()}
        arguments |= {"kv": Buffer(cache.shape, cache.dtype, cache), "part": number_of(part)}
        if made.has("q"):
            arguments["q"] = Buffer((tokens, made.heads, made.head_dim), arrays.STORED[made.dtype])
        call(name, variant, batch, arguments, threads)
        return [arguments[role].array for role in ("kv", "q") if role in arguments]

    batch, apart = batch_of(size), batch_of(span)
    whole, *q = written(plain, batch, BASE, 1, 0)
    wanted = rows_at(layout, whole, batch["slots"])
    for part in range(made.parts):
        run = on_every_variant(lambda variant, threads, p=part: written(name, apart, variant, threads, p))
        mine = apart["positions"] // size % made.parts == part
        assert mine.any()
        slots = apart["slots"][mine] // span * size + apart["positions"][mine] % size
        found = rows_at(layout, run[0], slots)
        assert same(found, [rows[mine] for rows in wanted])
        assert same(run[1:], q)
        erased, bare = run[0].copy(), layout.empty(len(run[0]), 0xFF)
        for cache in (erased, bare):
            whole_rows(layout).write(cache, slots, *(np.zeros_like(rows) for rows in found))
        assert erased.tobytes() == bare.tobytes()


def rows_at(layout: Any, cache: np.ndarray, slots: np.ndarray) -> list[np.ndarray]:
    """K and V, or the latents, with their padding."""
    found = layout.read(cache, slots)
    return list(found) if isinstance(found, tuple) else [found]


def whole_rows(layout: Any) -> Any:
    """The layout of rows with their padding."""
    if isinstance(layout, LatentLayout):
        return layout
    return KvLayout(layout.kv_heads, layout.padded, layout.page_size, layout.dtype)


class Parts:
    """Runs attention of one of the modules' problems part by part and merges what they give, by kernels."""

    def __init__(self, name: str, lengths: list[int], seed: int = 0) -> None:
        self.latent = isinstance(DESCS[name], d.LatentAttention)
        self.of: Any = (test_latent if self.latent else test_attention).Problem(name, lengths, seed)
        self.d, self.name = self.of.d, name
        self.width = self.d.rank if self.latent else self.d.head_dim
        self.cached = [self.of.rows] if self.latent else [self.of.k, self.of.v]  # each a list of sequences'
        self.parts = np.zeros(0)  # of the last run: [T, C, H, width + 2]

    def alone(self, i: int) -> Parts:
        """The i-th sequence's."""
        other = Parts(self.name, [len(self.of.q[i])])
        other.of.q = [self.of.q[i]]
        other.cached = [[sequences[i]] for sequences in self.cached]
        return other

    def run(
        self,
        step: list[Request],
        variant: Variant = BASE,
        threads: int = 1,
        fill: int = 0xFF,
        shuffle: int = 0,
    ) -> list[np.ndarray]:
        size, span = self.d.page_size, self.d.page_size * self.d.parts
        counts = [-(-r.length // span) for r in step]
        free = np.random.default_rng(shuffle).permutation(sum(counts) + 3)
        pages = np.split(free[: sum(counts)], np.cumsum(counts)[:-1])
        batch = arrays.batch_of(step, span, [list(p) for p in pages])
        q = np.concatenate([q[r.length - r.new : r.length] for r, q in zip(step, self.of.q, strict=True)])
        found = []
        for part in range(self.d.parts):
            cache = self.of.layout.empty(len(free), fill)
            for i, (request, own) in enumerate(zip(step, pages, strict=True)):
                at = np.arange(request.length)
                at = at[at // size % self.d.parts == part]
                rows = [sequences[i][at] for sequences in self.cached]
                self.of.layout.write(cache, own[at // span] * size + at % size, *rows)
            out = Buffer((*q.shape[:2], self.width + 2), np.float32)
            arguments = {"q": Buffer(q.shape, q.dtype, q), "kv": Buffer(cache.shape, cache.dtype, cache)}
            call(self.name, variant, batch, {**arguments, "part": number_of(part), "out": out}, threads)
            found.append(out.array)
        self.parts = np.stack(found, 1)
        merged = Buffer((*q.shape[:2], self.width), arrays.STORED[self.d.dtype])
        x = Buffer(self.parts.shape, np.float32, self.parts)
        call(MERGED[self.name], variant, batch, {"x": x, "out": merged}, threads)
        return np.split(merged.array, batch["query_start"][1:-1])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_near_float64(name: str, variant: Variant) -> None:
    problem = Parts(name, [r.length for r in MIXED])
    for found, wanted in zip(problem.run(MIXED, variant), problem.of.expected(MIXED), strict=True):
        error = np.abs(arrays.values(found, problem.d.dtype) - wanted).max()
        # bf16: p is rounded to 8 bits before its product
        assert error < (2e-2 if problem.d.dtype == "bf16" else 1e-5)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_part_without_keys(name: str) -> None:
    """Sum 0, max -infinity and values 0: a first token has one key, in the first part."""
    problem = Parts(name, [1])
    problem.run([Request(1, 1)])
    (first, *others), width = problem.parts[0], problem.width
    assert (first[:, width] == 1).all()
    assert np.isfinite(first).all()
    for part in others:
        assert (part[:, width + 1] == -np.inf).all()
        assert not part[:, : width + 1].any()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_same_bits_on_every_target_and_any_threads(name: str) -> None:
    problem = Parts(name, [r.length for r in MIXED], seed=1)
    wanted, parts = problem.run(MIXED), problem.parts
    for variant in VARIANTS:
        for threads in (1, 2, 7, 64):
            assert same(problem.run(MIXED, variant, threads), wanted), f"{variant}, {threads} threads"
            assert problem.parts.tobytes() == parts.tobytes()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_same_bits_however_chunked_and_in_any_company(name: str) -> None:
    problem = Parts(name, [r.length for r in ALONE], seed=2)
    (wanted,) = problem.run(ALONE)
    assert same(problem.run(ALONE, fill=0), [wanted])
    for chunks in ([64, 86], [1, 2, 61, 7, 9, 70], [33, 1, 1, 115]):
        steps = [Request(int(end), chunk) for end, chunk in zip(np.cumsum(chunks), chunks, strict=True)]
        found = np.concatenate([problem.run([step])[0] for step in steps])
        assert found.tobytes() == wanted.tobytes(), chunks
    company = Parts(name, [r.length for r in MIXED], seed=3)
    together = company.run(MIXED)
    assert same(company.run(MIXED, shuffle=1), together)
    for i, request in enumerate(MIXED):
        assert same(company.alone(i).run([request]), [together[i]])
