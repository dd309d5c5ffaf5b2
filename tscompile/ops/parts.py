"""A context that lies in parts: what reads or writes a KV cache may take, last, the numbers of the parts that
it works on, of attrs["parts"] in all (passes/context.py). A page of the page table then has parts * page_size
tokens, and part q of a context is the q-th page_size tokens of each of its pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tscompile.ir import Shape, Value
from tscompile.ops.base import (
    Attrs,
    OpDef,
    RankContext,
    Rule,
    Slot,
    Type,
    elements,
    expect,
    integer,
    register,
    text_of,
)

PARTS = Slot("parts", "f32", optional=True)


def num_parts(attrs: Attrs) -> int:
    """Parts that the cache holds each sequence's context in, on all ranks together."""
    return integer(attrs, "parts") if "parts" in attrs else 1


def of_part(slots: Tensor, attrs: Attrs, number: float) -> Tensor:
    """bool[N]: whether these slots, or positions, are in a part of the context."""
    return slots // integer(attrs, "page_size") % num_parts(attrs) == int(number)


def own_slots(slots: Tensor, attrs: Attrs, numbers: Sequence[Tensor]) -> Tensor:
    """bool[T]: which tokens a write keeps. numbers: its last input, if it has that."""
    parts = [of_part(slots, attrs, number) for given in numbers for number in given.tolist()]
    return torch.stack(parts).any(0) if parts else torch.ones_like(slots, dtype=torch.bool)


def attended(shape: Shape, numbers: Sequence[Value]) -> Shape:
    """What attention gives, [T, H, E], or with parts [T, C, H, E + 2]."""
    if not numbers:
        return shape
    rows, heads, width = shape
    assert isinstance(width, int)
    return (rows, numbers[0].shape[0], heads, width + 2)


def attend_part(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """`attention.attend` for some of the keys, to be merged: f32[Q, H, E + 2], with m the largest score the
    sum of exp(score - m) v, that of exp(score - m), and m, which is -inf where no key is seen."""
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    none = scores.new_full((*scores.shape[:2], 1), float("-inf"))
    best = torch.cat([scores, none], -1).amax(-1, keepdim=True)
    p = torch.exp(scores - best.nan_to_num(neginf=0.0))
    weighted = torch.einsum("hqk,khd->qhd", p.to(q.dtype).float(), v)
    return torch.cat([weighted, p.sum(-1).transpose(0, 1)[..., None], best.transpose(0, 1)], -1)


# --- merge_parts: [T, C, H, D + 2], what attention gives of each part of the context -> f32[T, H, D]. With
# m_c, l_c and acc_c of part c and m the largest m_c: sum of exp(m_c - m) acc_c / sum of exp(m_c - m) l_c, the
# online softmax's way to put two together (Milakov and Gimelshein 2018; Flash-Decoding). ---


def _merge_parts(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    shape = inputs[0].shape
    wide = len(shape) == 4 and isinstance(shape[3], int) and shape[3] > 2
    expect(wide, f"merge_parts takes [T, parts, heads, head_dim + 2], not {text_of(shape)}")
    rows, _, heads, width = shape
    assert isinstance(width, int)
    return [Type((rows, heads, width - 2), "f32")]


def _merge_parts_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    weighted, total, best = inputs[0][..., :-2], inputs[0][..., -2:-1], inputs[0][..., -1:]
    weight = torch.exp(best - best.amax(1, keepdim=True))
    return [(weight * weighted).sum(1) / (weight * total).sum(1)]


register(
    OpDef(
        "merge_parts",
        (Slot("parts", "f32"),),
        _merge_parts,
        lambda inputs, outputs, attrs: Rule("t . h . -> t h ."),
        reference=_merge_parts_reference,
        flops=lambda inputs, outputs, attrs, sizes: 2 * elements(inputs[0].shape, sizes),
    )
)
