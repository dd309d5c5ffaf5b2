"""Multi-head latent attention (DeepSeek-V2, section 2.1): all heads share one cached row a token, the latent
c [rank] and behind it the rotated key [rope], which `kv_b` would decompress into each head's k_nope and v.

A latent state [rank + rope] stands for a layer's paged cache of such rows. `latent_attention` reads the rows
as they are; `mla_attention` is the paper's form, and expands to it with kv_b absorbed by queries and output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tscompile.ir import Op, Value, Weight
from tscompile.ops.attention import (
    ARRAYS,
    attend,
    attend_all,
    attention_rule,
    own_sequences,
    row_bytes,
    visible,
)
from tscompile.ops.base import (
    Attrs,
    Expansion,
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
from tscompile.ops.parts import PARTS, attended, own_slots
from tscompile.recipe import Slice, View

# --- head_linear: x[T, H, K], weight[H, N, K] -> x . weight^T, f32[T, H, N]: each head by its own matrix ---


def _head_linear(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    x, weight = inputs
    fits = len(x.shape) == len(weight.shape) == 3 and x.shape[1:] == (weight.shape[0], weight.shape[2])
    expect(
        fits,
        f"head_linear of x {text_of(x.shape)} with weight {text_of(weight.shape)}: wanted [T, heads, K] and "
        "[heads, N, K]",
    )
    return [Type((*x.shape[:2], weight.shape[1]), "f32")]


def _head_linear_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    return Rule("t h k, h n k -> t h n", partial=(frozenset({0}),))


def _head_linear_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    return [torch.einsum("thk,hnk->thn", inputs[0].float(), inputs[1].float())]


def _head_linear_flops(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs, sizes: Sizes) -> int:
    return 2 * size_of(inputs[1].shape[2], sizes) * elements(outputs[0].shape, sizes)


register(
    OpDef(
        "head_linear",
        (Slot("x", "storage"), Slot("weight", "storage")),
        _head_linear,
        _head_linear_factors,
        reference=_head_linear_reference,
        flops=_head_linear_flops,
    )
)

# --- latent_write: state, row[T, rank + rope], slots[T] (, parts[C]) -> state ---


def _latent_write(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    state, row = inputs[:2]
    expect(
        row.shape[1:] == state.shape,
        f"latent_write of rows {text_of(row.shape)} into a cache of {text_of(state.shape)} a token",
    )
    expect(row.dtype == state.dtype, f"latent_write of {row.dtype} into a cache of {state.dtype}")
    return [Type(state.shape, state.dtype, state=True)]


def _latent_write_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    numbers = ", c" * (len(inputs) > 3)
    return Rule(f"., t ., t{numbers} -> .", owned="t", context="c" if numbers else "")


def _latent_write_reference(context: RankContext, inputs: list[Any], attrs: Attrs) -> list[Any]:
    state, row, slots, *numbers = inputs
    own = own_slots(slots, attrs, numbers)
    state.k[slots[own].long()] = row[own]
    return [state]


register(
    OpDef(
        "latent_write",
        (Slot("state", "state"), Slot("row", "storage"), Slot("slots", "i32"), PARTS),
        _latent_write,
        _latent_write_factors,
        {"page_size": int},
        optional={"parts": int},
        reference=_latent_write_reference,
        flops=lambda *_: 0,
        bytes=lambda inputs, outputs, attrs, sizes: 2 * num_bytes(inputs[1:2], sizes),
    )
)

# --- latent_attention: q[T, H, rank + rope], state, positions, query_start, context_len, page_table ->
# f32[T, H, rank]. Causal. A key is a whole row of the cache, its value the first `rank` elements. With
# parts[C]: f32[T, C, H, rank + 2], as attention. ---


def _latent_attention(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    q, state = inputs[0], inputs[1]
    rank = integer(attrs, "rank")
    fits = len(q.shape) == 3 and q.shape[2:] == state.shape and 0 < rank <= ints(state.shape)[0]
    expect(
        fits,
        f"latent_attention of q {text_of(q.shape)} over rows of {text_of(state.shape)}, {rank} of them "
        "values: wanted q [T, heads, row]",
    )
    expect(q.dtype == state.dtype, f"latent_attention of {q.dtype} q over a cache of {state.dtype}")
    return [Type(attended((*q.shape[:2], rank), inputs[6:]), "f32")]


def _latent_attention_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    return attention_rule(inputs, ".", {})


def _latent_attention_reference(context: RankContext, inputs: list[Any], attrs: Attrs) -> list[Tensor]:
    q, state = inputs[:2]
    rank, heads = integer(attrs, "rank"), [-1, q.shape[1], -1]

    def read(slots: Tensor) -> tuple[Tensor, Tensor]:
        keys = state.k[slots].float()[:, None]
        return keys.expand(heads), keys[..., :rank].expand(heads)

    return [attend_all(context, inputs, attrs, rank, read)]


def _latent_attention_flops(
    inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs, sizes: Sizes
) -> int:
    """Against a context of sizes["context"] tokens."""
    values = elements((*inputs[0].shape[:2], integer(attrs, "rank")), sizes)
    return 2 * (elements(inputs[0].shape, sizes) + values) * visible(attrs, sizes)


def _latent_attention_bytes(
    inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs, sizes: Sizes
) -> int:
    """Each row of the cache once, for all heads."""
    read = size_of(inputs[4].shape[0], sizes) * visible(attrs, sizes) * row_bytes(inputs[1])
    return num_bytes([inputs[0], *outputs], sizes) + read


register(
    OpDef(
        "latent_attention",
        (Slot("q", "storage"), Slot("state", "state"), *ARRAYS, PARTS),
        _latent_attention,
        _latent_attention_factors,
        {"scale": float, "rank": int, "page_size": int},
        optional={"parts": int},
        reference=_latent_attention_reference,
        flops=_latent_attention_flops,
        bytes=_latent_attention_bytes,
    )
)

# --- mla_attention: q_nope[T, H, nope], q_rope[T, H, rope], state, kv_b[H * (nope + v), rank], the batch
# arrays -> f32[T, H, v]. As the paper has it: kv_b decompresses every cached latent into each head's k_nope
# and v; the head's key is k_nope and the shared rotated key behind it. ---


def _mla_sizes(inputs: Sequence[Value]) -> tuple[int, int, int, int]:
    """Heads, nope, v and rank."""
    heads, nope = inputs[0].row_elements // (ints(inputs[0].shape[-1:])[0] or 1), inputs[0].shape[-1]
    rows, rank = ints(inputs[3].shape)
    assert isinstance(nope, int)
    return heads, nope, rows // heads - nope, rank


def _mla(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    q_nope, q_rope, state, kv_b = inputs[:4]
    apart = len(q_nope.shape) == len(q_rope.shape) == 3 and q_nope.shape[:2] == q_rope.shape[:2]
    expect(
        apart and len(kv_b.shape) == 2,
        f"mla_attention of q {text_of(q_nope.shape)} and {text_of(q_rope.shape)} with kv_b "
        f"{text_of(kv_b.shape)}: wanted [T, heads, nope], [T, heads, rope] and [heads x (nope + v), rank]",
    )
    heads, nope, v, rank = _mla_sizes(inputs)
    (rope,) = ints(q_rope.shape[2:])
    expect(
        v > 0 and kv_b.shape[0] == heads * (nope + v) and state.shape == (rank + rope,),
        f"mla_attention of {heads} heads of {nope} + {rope} with kv_b {text_of(kv_b.shape)} over rows of "
        f"{text_of(state.shape)}: wanted kv_b [heads x (nope + v), rank] and rows of rank + rope",
    )
    return [Type((*q_nope.shape[:2], v), "f32")]


def _mla_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    heads = _mla_sizes(inputs)[0]
    return Rule("t h ., t h ., ., h ., ., ., ., . . -> t h .", {"h": heads}, owned="t")


def _mla_reference(context: RankContext, inputs: list[Any], attrs: Attrs) -> list[Tensor]:
    q_nope, q_rope, state, kv_b, *arrays = inputs
    page_size, scale = integer(attrs, "page_size"), number(attrs, "scale")
    heads, nope, rank = q_nope.shape[1], q_nope.shape[2], kv_b.shape[1]
    by_head = kv_b.float().view(heads, -1, rank)
    q = torch.cat([q_nope, q_rope], dim=-1)
    out = torch.zeros((*q.shape[:2], by_head.shape[1] - nope), dtype=torch.float32)
    for rows, slots, at in own_sequences(context, len(q), arrays, page_size):
        latent = state.k[slots].float()
        decompressed = torch.einsum("kr,hdr->khd", latent[:, :rank], by_head)
        k_rope, v = latent[:, None, rank:].expand(-1, heads, -1), decompressed[..., nope:]
        k = torch.cat([decompressed[..., :nope], k_rope], dim=-1)
        out[rows] = attend(q[rows], k, v, torch.arange(len(latent)) <= at, scale)
    return [out]


def _mla_expand(to: Expansion, op: Op) -> Value:
    """kv_b absorbed: a head's score (W_k c) . q_nope is c . (W_k^T q_nope), and its output, the sum of
    p W_v c over the keys, is W_v (the sum of p c). So queries go through W_k^T, attention runs on the cached
    rows with every head's key and value the same, and its output goes through W_v; no latent is ever
    decompressed."""
    q_nope, q_rope, state, kv_b, *arrays = op.inputs
    assert isinstance(kv_b, Weight)
    heads, nope, v, rank = _mla_sizes(op.inputs)
    by_head = (heads, nope + v, rank)
    turned, upright = (View(kv_b.recipe, by_head, order) for order in ((0, 2, 1), (0, 1, 2)))
    w_k = to.weight(f"{kv_b.name}.k", (heads, rank, nope), Slice(turned, 2, 0, nope))
    w_v = to.weight(f"{kv_b.name}.v", (heads, v, rank), Slice(upright, 1, nope, nope + v))
    q_latent = to.emit("head_linear", [q_nope, w_k], {}, "q_latent")
    q = to.emit("concat", [q_latent, q_rope], {}, "q")
    latent = to.emit("latent_attention", [q, state, *arrays], {**op.attrs, "rank": rank}, "latent")
    return to.emit("head_linear", [latent, w_v], {}, "heads")


def _mla_flops(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs, sizes: Sizes) -> int:
    q, seen = elements(inputs[0].shape, sizes) + elements(inputs[1].shape, sizes), visible(attrs, sizes)
    decompressed = 2 * elements(inputs[3].shape, sizes) * seen * size_of(inputs[6].shape[0], sizes)
    return decompressed + 2 * (q + elements(outputs[0].shape, sizes)) * seen


def _mla_bytes(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs, sizes: Sizes) -> int:
    read = size_of(inputs[6].shape[0], sizes) * visible(attrs, sizes) * row_bytes(inputs[2])
    return num_bytes([*inputs[:2], inputs[3], *outputs], sizes) + read


register(
    OpDef(
        "mla_attention",
        (
            Slot("q_nope", "storage"),
            Slot("q_rope", "storage"),
            Slot("state", "state"),
            Slot("kv_b", "storage"),
            *ARRAYS,
        ),
        _mla,
        _mla_factors,
        {"scale": float, "page_size": int},
        reference=_mla_reference,
        expand=_mla_expand,
        flops=_mla_flops,
        bytes=_mla_bytes,
    )
)
