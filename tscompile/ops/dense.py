"""embedding, linear, swiglu, rms_norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tscompile.ir import Attr, Value
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
    num_bytes,
    number,
    register,
    text_of,
)
from tscompile.ops.elementwise import LETTERS

# --- embedding: ids i32[T], table[V, H] -> f32[T, H]. vocab_axis: the mesh axis over which the table's rows
# are sharded ("": none); a rank gives zeros for ids that are not among its rows. ---


def _embedding(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    ids, table = inputs
    expect(len(table.shape) == 2, f"an embedding's table is [V, H], not {text_of(table.shape)}")
    return [Type((*ids.shape, table.shape[1]), "f32")]


def _embedding_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    return Rule("t, v h -> t h", looked_up=frozenset({"v"}))


def _embedding_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    ids, table = inputs[0].long(), inputs[1]
    axis = str(attrs["vocab_axis"])
    if not axis:
        return [table[ids].float()]
    ids = ids - context.coord(axis) * table.shape[0]
    mine = (ids >= 0) & (ids < table.shape[0])
    return [table[torch.where(mine, ids, 0)].float() * mine[:, None]]


def _embedding_local(attrs: Attrs, outputs: Sequence[Value], axes: Mapping[str, str]) -> dict[str, Attr]:
    return {**attrs, "vocab_axis": axes.get("v", "")}


def _embedding_bytes(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs, sizes: Sizes) -> int:
    return num_bytes([inputs[0], outputs[0]], sizes) + num_bytes([outputs[0]], sizes)


register(
    OpDef(
        "embedding",
        (Slot("ids", "i32"), Slot("table", "storage")),
        _embedding,
        _embedding_factors,
        {"vocab_axis": str},
        coordinate="vocab_axis",
        reference=_embedding_reference,
        flops=lambda *_: 0,
        bytes=_embedding_bytes,
        localize=_embedding_local,
    )
)

# --- linear: x[..., K], weight[N, K] -> f32[..., N], the accumulator ---


def _linear(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    x, weight = inputs
    fits = len(weight.shape) == 2 and x.shape[-1] == weight.shape[1]
    expect(
        fits,
        f"linear of x {text_of(x.shape)} with weight {text_of(weight.shape)}: the last dims must be equal",
    )
    return [Type((*x.shape[:-1], weight.shape[0]), "f32")]


def _linear_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    rows = " ".join(LETTERS[: len(inputs[0].shape) - 1])
    return Rule(f"{rows} k, n k -> {rows} n", partial=(frozenset({0}),))


def _linear_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    return [torch.nn.functional.linear(inputs[0].float(), inputs[1].float())]


def _linear_flops(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs, sizes: Sizes) -> int:
    depth = inputs[1].shape[1]
    assert isinstance(depth, int)
    return 2 * depth * elements(outputs[0].shape, sizes)


register(
    OpDef(
        "linear",
        (Slot("x", "storage"), Slot("weight", "storage")),
        _linear,
        _linear_factors,
        reference=_linear_reference,
        flops=_linear_flops,
    )
)

# --- swiglu: x[..., 2 * padded] in interleaved tiles of gate and up -> silu(gate) * up, [..., width]. Made by
# `fuse` only. ---


def _swiglu(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    width, tile = integer(attrs, "width"), integer(attrs, "tile")
    padded = -(-width // tile) * tile
    expect(
        inputs[0].shape[-1] == 2 * padded,
        f"swiglu of {text_of(inputs[0].shape)}: wanted 2 x {padded} columns",
    )
    return [Type((*inputs[0].shape[:-1], width), "f32")]


def _swiglu_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    rows = " ".join(LETTERS[: len(inputs[0].shape) - 1])
    return Rule(f"{rows} . -> {rows} .")


def _swiglu_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    width, tile = integer(attrs, "width"), integer(attrs, "tile")
    tiles = inputs[0].reshape(*inputs[0].shape[:-1], -(-width // tile), 2, tile)
    gate, up = tiles[..., 0, :].flatten(-2)[..., :width], tiles[..., 1, :].flatten(-2)[..., :width]
    return [gate * torch.sigmoid(gate) * up]


register(
    OpDef(
        "swiglu",
        (Slot("x", "f32"),),
        _swiglu,
        _swiglu_factors,
        {"width": int, "tile": int},
        reference=_swiglu_reference,
        flops=lambda inputs, outputs, attrs, sizes: 5 * elements(outputs[0].shape, sizes),
    )
)

# --- rms_norm: x[..., H], weight[H] -> x / sqrt(mean(x^2) + eps) * weight, over the last dim ---


def _rms_norm(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    x, weight = inputs
    fits = weight.shape == x.shape[-1:]
    expect(
        fits,
        f"rms_norm of {text_of(x.shape)} with weight {text_of(weight.shape)}: wanted {text_of(x.shape[-1:])}",
    )
    return [Type(x.shape, "f32")]


def _rms_norm_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    dims = " ".join([*LETTERS[: len(inputs[0].shape) - 1], "."])
    return Rule(f"{dims}, . -> {dims}")


def _rms_norm_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    x, weight = inputs
    return [x * torch.rsqrt(x.square().mean(-1, keepdim=True) + number(attrs, "eps")) * weight]


register(
    OpDef(
        "rms_norm",
        (Slot("x", "f32"), Slot("weight", "f32")),
        _rms_norm,
        _rms_norm_factors,
        {"eps": float},
        reference=_rms_norm_reference,
        flops=lambda inputs, outputs, attrs, sizes: 4 * elements(outputs[0].shape, sizes),
    )
)
