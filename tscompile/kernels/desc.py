"""What a kernel computes: one frozen dataclass for each group kind (tscompile/ir.py, GROUP_KINDS), with
every constant.
 Two groups with equal descriptions are one kernel. `text` is canonical, and the kernel's symbol is the hash
of it.
 A kernel's arguments, in the order of ts_args.ptr, are `args`. Buffers are dense and row-major: row r of a
value [T, ...] begins at r * row_elements. Weights lie as tscompile/layout.py says: rows padded to 64 bytes,
or tiles."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar

from tscompile.layout import round_up

HEAD_MULTIPLE = 32  # a head's elements in the KV cache are padded to this


@dataclass(frozen=True)
class Arg:
    """One argument. roles: what the template calls it; more than one if the same value is read as several.
    kind: buffer, weight or kv. written: the kernel writes it."""

    roles: tuple[str, ...]
    kind: str = "buffer"
    written: bool = False


def args_of(*words: str) -> tuple[Arg, ...]:
    """Arguments in a short form: "x", "weight:weight", "kv:kv", "out!" (written), "x+delta" (one value, two
    roles)."""
    result = []
    for word in words:
        name, _, kind = word.rstrip("!").partition(":")
        result.append(Arg(tuple(name.split("+")), kind or "buffer", word.endswith("!") or kind == "kv"))
    return tuple(result)


@dataclass(frozen=True)
class KernelDesc:
    """What all kinds share. `kind` is the group kind, and the template's name."""

    kind: ClassVar[str]
    args: tuple[Arg, ...]

    @property
    def text(self) -> str:
        """Canonical: equal descriptions, equal texts."""
        words = [self.kind, "args=" + ",".join("+".join(arg.roles) for arg in self.args)]
        for field in fields(self):
            if field.name != "args":
                words.append(f"{field.name}={_word(getattr(self, field.name))}")
        return " ".join(words)

    @property
    def symbol(self) -> str:
        return f"{self.kind}_{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"

    def index(self, role: str) -> int:
        """Position of `role` in ts_args.ptr."""
        return next(i for i, arg in enumerate(self.args) if role in arg.roles)

    def has(self, role: str) -> bool:
        return any(role in arg.roles for arg in self.args)


def _word(value: object) -> str:
    """Exact, and the same on every machine."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, tuple):
        return "(" + ",".join(_word(item) for item in value) + ")"
    if is_dataclass(value):
        return _word(tuple(getattr(value, field.name) for field in fields(value)))
    return str(value)


@dataclass(frozen=True)
class Embed(KernelDesc):
    """ids[T], table[vocab, width] of dtype -> out f32[T, width]. ids: token_ids or positions, of the batch.
    layout: of the table, rows or tiles (when a linear reads the same weight). shard: 0, or the rows that each
    rank has of the vocabulary; an id that is not among this rank's gives zeros. Roles: table, rank f32[1]
    (its coordinate, if sharded), out."""

    kind = "embed"
    ids: str
    width: int
    dtype: str
    layout: str
    shard: int = 0


@dataclass(frozen=True)
class RmsNorm(KernelDesc):
    """x f32[rows, heads, width] (+ delta) -> (sum f32,) out = x / sqrt(mean(x^2) + eps) * weight, of
    out_dtype.

    Roles: x, delta (if it adds), weight f32[width], sum (if something else reads x + delta), out."""

    kind = "rms_norm"
    rows: str  # T or L
    heads: int
    width: int
    eps: float
    out_dtype: str


@dataclass(frozen=True)
class Linear(KernelDesc):
    """x[rows, fold, k] of dtype, weight[n, k] of dtype in tiles -> out[rows, fold, n] of out_dtype.

    gather: row r is row logit_rows[r] of x, and rows is L. Roles: x, weight, bias f32[bias] (if there is
    one), out. bias: 0, or its length, after which it repeats in a row of fold * n. swiglu: 0, or the width
    of the output, silu(gate) * up of interleaved 16-column tiles: then n is 2 * round_up(swiglu, 16)."""

    kind = "linear"
    rows: str  # T or L
    gather: bool
    fold: int
    k: int
    n: int
    dtype: str
    bias: int
    swiglu: int
    out_dtype: str


@dataclass(frozen=True)
class QkvWrite(KernelDesc):
    """qkv f32[T, (heads + 2 kv_heads) head_dim] -> q[T, heads, head_dim] of dtype, and k and v into the
    cache of dtype.

    rotary: 0 without a table. interleaved: RoPE pairs neighbours. Norms come before RoPE. parts: into how
    many parts a page of the page table is cut, page_size tokens each; if more than one, the cache holds the
    one whose number `part` is. Roles: qkv, q_norm f32[head_dim], k_norm f32[head_dim], table f32[max_context,
    rotary] (each if there is one), kv, part f32[1] (if parts), q."""

    kind = "qkv_write"
    heads: int
    kv_heads: int
    head_dim: int
    q_eps: float
    k_eps: float
    rotary: int
    interleaved: bool
    dtype: str
    page_size: int
    parts: int = 1


@dataclass(frozen=True)
class Attention(KernelDesc):
    """q[T, heads, head_dim] of dtype, the layer's cache of dtype -> out[T, heads, head_dim] of out_dtype.
    Causal.

    window: 0, or how many keys a query sees, itself included. parts: as in QkvWrite; if more than one, out is
    f32[T, heads, head_dim + 2], of this part alone: the sum of exp(score - m) v, that of exp(score - m), and
    m, the largest score (-inf if no key is seen). Roles: q, kv, part (if parts), out."""

    kind = "attention"
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    page_size: int
    scale: float
    window: int
    out_dtype: str
    parts: int = 1


@dataclass(frozen=True)
class HeadLinear(KernelDesc):
    """x[T, heads, k], weight[heads, n, k] of dtype in tiles -> out[T, heads, n] of out_dtype.

    rotary: 0, or how many elements of a head of x follow its k, are rotated and given behind the n; then
    interleaved says how RoPE pairs. x_dtype: of dtype, or f32, which is rounded to dtype. Roles: x, weight,
    table f32[max_context, rotary] (if rotary), out."""

    kind = "head_linear"
    heads: int
    k: int
    n: int
    rotary: int
    interleaved: bool
    x_dtype: str
    dtype: str
    out_dtype: str


@dataclass(frozen=True)
class LatentWrite(KernelDesc):
    """row[T, row] of row_dtype -> the cache of latents of dtype.

    rotary: 0, or how many last elements are rotated, while those before are normed with eps; then
    interleaved says how RoPE pairs. parts: as in QkvWrite. Roles: kv, row, norm f32[row - rotary] and table
    f32[max_context, rotary] (if rotary), part (if parts)."""

    kind = "latent_write"
    row: int
    eps: float
    rotary: int
    interleaved: bool
    row_dtype: str
    dtype: str
    page_size: int
    parts: int = 1


@dataclass(frozen=True)
class LatentAttention(KernelDesc):
    """q[T, heads, row] of dtype, the layer's cache of latents of dtype -> out[T, heads, rank] of out_dtype.
    Causal. A key is a row of the cache, its value the first `rank` elements. parts: as in Attention, out
    f32[T, heads, rank + 2]. Roles: q, kv, part (if parts), out."""

    kind = "latent_attention"
    heads: int
    row: int
    rank: int
    dtype: str
    page_size: int
    scale: float
    out_dtype: str
    parts: int = 1


@dataclass(frozen=True)
class MergeParts(KernelDesc):
    """x f32[T, parts, heads, head_dim + 2], as Attention gives it of each part -> out[T, heads, head_dim] of
    out_dtype. Roles: x, out."""

    kind = "merge_parts"
    parts: int
    heads: int
    head_dim: int
    out_dtype: str


@dataclass(frozen=True)
class GatherRows(KernelDesc):
    """x[T, width] of dtype -> out[L, width], row r being row logit_rows[r]. Roles: x, out."""

    kind = "gather_rows"
    width: int
    dtype: str


@dataclass(frozen=True)
class Rope(KernelDesc):
    """x f32[T, heads, head_dim], table f32[max_context, rotary] -> out of out_dtype. interleaved: RoPE
    pairs neighbours. Roles: x, table, out."""

    kind = "rope"
    heads: int
    head_dim: int
    rotary: int
    interleaved: bool
    out_dtype: str


@dataclass(frozen=True)
class KvWrite(KernelDesc):
    """k[T, kv_heads, head_dim] of k_dtype, v of v_dtype -> the cache of dtype. parts: as in QkvWrite. Roles:
    kv, k, v, part (if parts)."""

    kind = "kv_write"
    kv_heads: int
    head_dim: int
    k_dtype: str
    v_dtype: str
    dtype: str
    page_size: int
    parts: int = 1


@dataclass(frozen=True)
class Route(KernelDesc):
    """logits f32[T, experts] -> the k best experts of each token, ids i32[T, k], and their weights f32[T, k].

    scores: softmax or sigmoid. The choice is by score + bias; of `groups` groups the experts of `kept` take
    part. normalize: weights divided by their sum; then times `scale`. Roles: logits, bias f32[experts] (if
    there is one), ids, weights."""

    kind = "route"
    experts: int
    k: int
    scores: str
    normalize: bool
    scale: float
    groups: int
    kept: int


@dataclass(frozen=True)
class SortRoutes(KernelDesc):
    """ids i32[T, k] -> order i32[T * k], the routes to these experts and -1 behind them, counts i32[experts].
    Roles: ids, numbers f32[experts] (which are these experts), order, counts."""

    kind = "sort_routes"
    experts: int
    k: int


@dataclass(frozen=True)
class Experts(KernelDesc):
    """x of dtype, weight[experts, n, k] of dtype in tiles -> out of out_dtype. Rows are sorted by expert.

    top: routes of a token. gather: row r is row order[r] / top of x [T, k]; else x is the rows. swiglu: as in
    Linear. combine: out f32[T, n], the sum over a token's rows of weights[order[r]] * row, in the order of
    experts; else out is [rows, n], or [rows, swiglu]. Roles: x, counts i32[experts], order (if it gathers or
    combines), weight, weights f32[T, top] (if it combines), out."""

    kind = "experts"
    top: int
    experts: int
    k: int
    n: int
    dtype: str
    gather: bool
    swiglu: int
    combine: bool
    out_dtype: str


@dataclass(frozen=True)
class Dispatch(KernelDesc):
    """x[T, width] of dtype -> out[T * top, width]: row r is row order[r] / top of x, up to an order of -1.
    Roles: x, order, out."""

    kind = "dispatch"
    top: int
    width: int
    dtype: str


@dataclass(frozen=True)
class Combine(KernelDesc):
    """rows f32[T * top, width] -> out f32[T, width], as Experts combines, up to an order of -1. Roles: rows,
    order, weights f32[T, top], out."""

    kind = "combine"
    top: int
    width: int


@dataclass(frozen=True)
class Leaf:
    """What an elementwise kernel reads: the argument of role a<its number>. row: elements from one row of
    the batch to the next; 0 for what all rows share, such as a weight."""

    dtype: str
    row: int


@dataclass(frozen=True)
class Node:
    """One operation of a segment on values before it: its reads are numbered first, then its nodes. value:
    of scale and shift."""

    op: str
    operands: tuple[int, ...]
    value: float = 0.0


@dataclass(frozen=True)
class Segment:
    """`repeat` runs of `length` elements of a row. Run i begins at element start + i * stride of every
    output.

    reads: (leaf, first element, elements from run to run, step within a run: 1, or 0 for one element that
    all take). results: for each output the value that it takes here."""

    repeat: int
    length: int
    start: int
    stride: int
    reads: tuple[tuple[int, int, int, int], ...]
    nodes: tuple[Node, ...]
    results: tuple[int, ...]


@dataclass(frozen=True)
class Elementwise(KernelDesc):
    """A DAG of elementwise operations on rows of `row` elements. Roles: a0, a1, ... (the leaves), y0, y1,
    ... (the outputs)."""

    kind = "elementwise"
    rows: str  # T, L, or 1 if all it reads is weights
    row: int
    leaves: tuple[Leaf, ...]
    segments: tuple[Segment, ...]
    out_dtypes: tuple[str, ...]


def padded_head(head_dim: int) -> int:
    """A head's elements, or a latent row's, in the KV cache."""
    return round_up(head_dim, HEAD_MULTIPLE)


def page_elements(state: tuple[int, ...], page_size: int) -> int:
    """Elements of one layer's page of a KV state, [num_kv_heads, head_dim] or the row of a latent."""
    *heads, row = state
    return (2 * heads[0] if heads else 1) * padded_head(row) * page_size
