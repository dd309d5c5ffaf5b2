"""rope, kv_write and paged attention.

A KV state [num_kv_heads, head_dim] stands for a layer's paged cache. The reference keeps it as `KVCache`: two
tensors indexed by slot. Kernels lay it out as ARCHITECTURE.md says, "The KV cache".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tscompile.ir import DTYPES, Value
from tscompile.ops.base import (
    Attrs,
    OpDef,
    RankContext,
    Rule,
    Sizes,
    Slot,
    Type,
    elements,
    expect,
    integer,
    ints,
    num_bytes,
    number,
    register,
    size_of,
    text_of,
)
from tscompile.ops.elementwise import TORCH_DTYPES
from tscompile.ops.parts import PARTS, attend_part, attended, num_parts, of_part, own_slots

# The batch arrays that say where a query's keys lie.
ARRAYS = (
    Slot("positions", "i32"),
    Slot("query_start", "i32"),
    Slot("context_len", "i32"),
    Slot("page_table", "i32"),
)


@dataclass
class KVCache:
    """k, v: [num_slots, num_kv_heads, head_dim], updated in place. Of a latent state (ops/latent.py) k holds
    the rows [num_slots, rank + rope], and v nothing."""

    k: Tensor
    v: Tensor

    @staticmethod
    def empty(state: Value, num_slots: int) -> KVCache:
        """Zeros for the slots of a KV state."""
        shape, dtype = (num_slots, *ints(state.shape)), TORCH_DTYPES[state.dtype]
        latent = len(state.shape) == 1
        return KVCache(torch.zeros(shape, dtype=dtype), torch.zeros(0 if latent else shape, dtype=dtype))


def context_slots(page_table: Tensor, length: int, page_size: int) -> Tensor:
    """i64[length]: where the keys of a sequence lie, page_table being its row."""
    keys = torch.arange(length)
    return page_table.long()[keys // page_size] * page_size + keys % page_size


def own_sequences(
    context: RankContext, num_tokens: int, arrays: Sequence[Tensor], page_size: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of each sequence whose tokens the rank has (it has num_tokens): their rows, where the keys of its
    context lie, and its tokens' positions, [Q, 1]. arrays: as ARRAYS has them. page_size: tokens of a page of
    the page table."""
    positions, query_start, context_len, page_table = arrays
    first, end = context.tokens or (0, num_tokens)
    for s, length in enumerate(context_len.tolist()):
        start, stop = query_start[s : s + 2].tolist()
        if first <= start < end:
            slots = context_slots(page_table[s], length, page_size)
            yield slice(start - first, stop - first), slots, positions[start:stop].long()[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """softmax(q.k * scale) . v for q [Q, H, D], k [K, H, D] and v [K, H, E] f32, seen bool[Q, K] ->
    f32[Q, H, E]. p is rounded to q's dtype before its product."""
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    weighted = torch.einsum("hqk,khd->qhd", p.to(q.dtype).float(), v)
    return weighted / p.sum(-1).transpose(0, 1)[..., None]


# --- rope: x[T, H, D], table[max_context, R], positions[T] -> x with its first R elements of each head
# rotated. The halves of R are paired, (i, i + R/2); if `interleaved`, neighbours are, (2i, 2i + 1), and the
# rotated pair is given at (i, i + R/2), as transformers does it. The table's row is cos[R/2], sin[R/2]. ---


def _rope(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    x, table, _ = inputs
    expect(len(x.shape) == 3, f"rope takes [T, heads, head_dim], not {text_of(x.shape)}")
    rotary, head_dim = table.shape[1], x.shape[2]
    assert isinstance(rotary, int)
    assert isinstance(head_dim, int)
    fits = rotary % 2 == 0 and rotary <= head_dim
    expect(
        fits,
        f"rope of heads of {head_dim} with a table of {rotary}: wanted an even number of at most {head_dim}",
    )
    return [Type(x.shape, "f32")]


def _rope_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    return Rule("t h ., . ., t -> t h .", partial=(frozenset({0}),))


def _rope_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    x, table, positions = inputs
    half = table.shape[1] // 2
    row = table[positions.long()][:, None, :]
    cos, sin = row[..., :half], row[..., half:]
    rest = x[..., 2 * half :]
    first, second = x[..., :half], x[..., half : 2 * half]
    if attrs["interleaved"]:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return [torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)]


register(
    OpDef(
        "rope",
        (Slot("x", "f32"), Slot("table", "f32"), Slot("positions", "i32")),
        _rope,
        _rope_factors,
        {"interleaved": bool},
        reference=_rope_reference,
        flops=lambda inputs, outputs, attrs, sizes: 3 * elements(outputs[0].shape, sizes),
    )
)

# --- kv_write: state, k[T, Hkv, D], v[T, Hkv, D], slots[T] (, parts[C]) -> state ---


def _kv_write(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    state, k, v = inputs[:3]
    fits = k.shape == v.shape and k.shape[1:] == state.shape
    expect(
        fits,
        f"kv_write of k {text_of(k.shape)} and v {text_of(v.shape)} into a cache of "
        f"{text_of(state.shape)} a token",
    )
    expect(
        k.dtype == v.dtype == state.dtype,
        f"kv_write of {k.dtype} and {v.dtype} into a cache of {state.dtype}",
    )
    return [Type(state.shape, state.dtype, state=True)]


def _kv_write_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    numbers = ", c" * (len(inputs) > 4)
    return Rule(f"h ., t h ., t h ., t{numbers} -> h .", owned="t", context="c" if numbers else "")


def _kv_write_reference(context: RankContext, inputs: list[Any], attrs: Attrs) -> list[Any]:
    state, k, v, slots, *numbers = inputs
    own = own_slots(slots, attrs, numbers)
    state.k[slots[own].long()] = k[own]
    state.v[slots[own].long()] = v[own]
    return [state]


register(
    OpDef(
        "kv_write",
        (Slot("state", "state"), Slot("k", "storage"), Slot("v", "storage"), Slot("slots", "i32"), PARTS),
        _kv_write,
        _kv_write_factors,
        {"page_size": int},
        optional={"parts": int},
        reference=_kv_write_reference,
        flops=lambda *_: 0,
        bytes=lambda inputs, outputs, attrs, sizes: 2 * num_bytes(inputs[1:3], sizes),
    )
)

# --- attention: q[T, Hq, D], state, positions[T], query_start[S+1], context_len[S], page_table[S, P] ->
# f32[T, Hq, D]. Causal; with window w > 0 a query at position p sees keys p-w+1 .. p. q head h reads KV head
# h // (Hq / Hkv). With parts[C]: f32[T, C, Hq, D + 2], of each part of the context what attend_part says. ---


def _attention(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    q, state = inputs[0], inputs[1]
    expect(len(q.shape) == 3, f"attention takes q [T, heads, head_dim], not {text_of(q.shape)}")
    heads, kv_heads = q.shape[1], state.shape[0]
    assert isinstance(heads, int)
    assert isinstance(kv_heads, int)
    fits = q.shape[2] == state.shape[1] and heads % kv_heads == 0
    expect(
        fits,
        f"attention of q {text_of(q.shape)} over a cache of {text_of(state.shape)} a token: head_dim must be "
        f"equal, and the KV heads ({kv_heads}) must divide the heads ({heads})",
    )
    expect(q.dtype == state.dtype, f"attention of {q.dtype} q over a cache of {state.dtype}")
    return [Type(attended(q.shape, inputs[6:]), "f32")]


def attention_rule(inputs: Sequence[Value], state: str, sizes: dict[str, int]) -> Rule:
    """Of q, a state of these dims, ARRAYS and maybe parts."""
    numbers, parts = (", c", "c ") if len(inputs) > 6 else ("", "")
    return Rule(
        f"t h ., {state}, ., ., ., . .{numbers} -> t {parts}h .",
        sizes,
        repeats=frozenset({1} if sizes else ()),
        owned="t",
        context=parts.strip(),
    )


def _attention_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    kv_heads = inputs[1].shape[0]
    assert isinstance(kv_heads, int)
    return attention_rule(inputs, "h .", {"h": kv_heads})


def _attention_reference(context: RankContext, inputs: list[Any], attrs: Attrs) -> list[Tensor]:
    q, state = inputs[:2]
    repeat = q.shape[1] // state.k.shape[1]

    def read(slots: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (half[slots].float().repeat_interleave(repeat, dim=1) for half in (state.k, state.v))
        return k, v

    return [attend_all(context, inputs, attrs, q.shape[2], read)]


def attend_all(
    context: RankContext,
    inputs: list[Any],
    attrs: Attrs,
    width: int,
    read: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Attention of q, a state, ARRAYS and maybe parts. read: slots [K] -> k [K, H, D] and v [K, H, width]."""
    q, _, *arrays = inputs
    scale, window = number(attrs, "scale"), integer(attrs, "window") if "window" in attrs else 0
    numbers = arrays[4].tolist() if len(arrays) > 4 else []
    (rows, heads, _), parts = q.shape, len(numbers)
    out = torch.zeros((rows, parts, heads, width + 2) if parts else (rows, heads, width))
    page_size = integer(attrs, "page_size") * num_parts(attrs)
    for mine, slots, at in own_sequences(context, rows, arrays[:4], page_size):
        k, v = read(slots)
        keys = torch.arange(len(slots))
        seen = (keys <= at) & (keys > at - window) if window else keys <= at
        if not parts:
            out[mine] = attend(q[mine], k, v, seen, scale)
        for i, part in enumerate(numbers):
            own = of_part(keys, attrs, part)
            out[mine, i] = attend_part(q[mine], k[own], v[own], seen[:, own], scale)
    return out


def _attention_flops(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs, sizes: Sizes) -> int:
    """Against a context of sizes["context"] tokens."""
    return 4 * elements(inputs[0].shape, sizes) * visible(attrs, sizes)


def _attention_bytes(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs, sizes: Sizes) -> int:
    read = 2 * size_of(inputs[4].shape[0], sizes) * visible(attrs, sizes) * row_bytes(inputs[1])
    return num_bytes([inputs[0], *outputs], sizes) + read


def row_bytes(state: Value) -> int:
    """Bytes of one row of a KV state: of K or V, or of a latent."""
    return math.prod(ints(state.shape)) * DTYPES[state.dtype]


def visible(attrs: Attrs, sizes: Sizes) -> int:
    """Keys that a query sees of a context of sizes["context"] tokens."""
    return (
        min(integer(attrs, "window") or sizes["context"], sizes["context"])
        if "window" in attrs
        else sizes["context"]
    )


register(
    OpDef(
        "attention",
        (
            Slot("q", "storage"),
            Slot("state", "state"),
            *ARRAYS,
            PARTS,
        ),
        _attention,
        _attention_factors,
        {"scale": float, "window": int, "page_size": int},
        optional={"parts": int},
        reference=_attention_reference,
        flops=_attention_flops,
        bytes=_attention_bytes,
    )
)
