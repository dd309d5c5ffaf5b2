"""Elementwise ops. All arithmetic is f32; an operand of lower rank is broadcast over the leading dims."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tscompile.ir import Shape, Sym, Value
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
    number,
    register,
    text_of,
)

LETTERS = "abcdefgh"
TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i32": torch.int32}


def broadcast(x: Shape, y: Shape) -> Shape:
    """The longer shape, if the other is its suffix."""
    wide, narrow = (x, y) if len(x) >= len(y) else (y, x)
    fits = wide[len(wide) - len(narrow) :] == narrow
    expect(
        fits, f"{text_of(x)} and {text_of(y)} do not fit: wanted equal shapes, or one the suffix of the other"
    )
    return wide


def _dims(shape: Shape, rank: int) -> str:
    letters = zip(shape, LETTERS[rank - len(shape) : rank], strict=True)
    return " ".join(f"{a}*t" if isinstance(dim, Sym) and dim.ragged else a for dim, a in letters)


def _binary(
    name: str, compute: Callable[[Tensor, Tensor], Tensor], partial: tuple[frozenset[int], ...]
) -> None:
    def infer(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
        return [Type(broadcast(inputs[0].shape, inputs[1].shape), "f32")]

    def factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
        rank = len(outputs[0].shape)
        x, y, out = (_dims(v.shape, rank) for v in (*inputs, outputs[0]))
        return Rule(f"{x}, {y} -> {out}", partial=partial)

    def reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
        return [compute(inputs[0], inputs[1])]

    slots = (Slot("x", "f32"), Slot("y", "f32"))
    register(OpDef(name, slots, infer, factors, reference=reference, elementwise=True))


def _unary(
    name: str,
    compute: Callable[[Tensor, Attrs], Tensor],
    attrs: dict[str, type] | None = None,
    *,
    linear: bool = False,
    flops_an_element: int = 1,
) -> None:
    def infer(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
        return [Type(inputs[0].shape, "f32")]

    def factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
        dims = _dims(outputs[0].shape, len(outputs[0].shape))
        return Rule(f"{dims} -> {dims}", partial=(frozenset({0}),) if linear else ())

    def reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
        return [compute(inputs[0], attrs)]

    def flops(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs, sizes: Sizes) -> int:
        return flops_an_element * elements(outputs[0].shape, sizes)

    register(
        OpDef(
            name,
            (Slot("x", "f32"),),
            infer,
            factors,
            attrs or {},
            reference=reference,
            elementwise=True,
            flops=flops,
        )
    )


def _cast(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    to = str(attrs["to"])
    expect(to in TORCH_DTYPES, f"cast to {to!r}: known are {', '.join(TORCH_DTYPES)}")
    return [Type(inputs[0].shape, to)]


def _cast_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    dims = _dims(outputs[0].shape, len(outputs[0].shape))
    return Rule(f"{dims} -> {dims}")


def _cast_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    return [inputs[0].to(TORCH_DTYPES[str(attrs["to"])])]


TOGETHER, EITHER = (frozenset({0, 1}),), (frozenset({0}), frozenset({1}))

_binary("add", torch.add, TOGETHER)
_binary("sub", torch.sub, TOGETHER)
_binary("mul", torch.mul, EITHER)
_unary("neg", lambda x, _: -x, linear=True)
_unary("scale", lambda x, attrs: x * number(attrs, "value"), {"value": float}, linear=True)
_unary("shift", lambda x, attrs: x + number(attrs, "value"), {"value": float})
_unary("silu", lambda x, _: x * torch.sigmoid(x), flops_an_element=4)
_unary("sigmoid", lambda x, _: torch.sigmoid(x), flops_an_element=3)
_unary("relu", lambda x, _: torch.relu(x))
# 0.5 x (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x * sigmoid(2 u)
_unary("gelu_tanh", lambda x, _: torch.nn.functional.gelu(x, approximate="tanh"), flops_an_element=8)
register(
    OpDef(
        "cast",
        (Slot("x", "any"),),
        _cast,
        _cast_factors,
        {"to": str},
        reference=_cast_reference,
        elementwise=True,
    )
)
