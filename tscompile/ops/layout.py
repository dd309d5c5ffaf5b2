"""Ops that move or rename elements and compute nothing: reshape, split, concat, gather_rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tscompile.ir import Attr, Shape, Sym, Value
from tscompile.ops.base import (
    Attrs,
    OpDef,
    RankContext,
    Rule,
    Slot,
    Type,
    expect,
    integers,
    num_bytes,
    register,
    text_of,
)
from tscompile.ops.elementwise import LETTERS

# --- reshape: x -> the same elements, row-major. attr `shape`: ints; the symbolic dim, if any, is -1. ---


def reshape_attr(shape: Shape) -> tuple[int, ...]:
    """A shape as the attr has it: at most one symbolic dim, written -1."""
    return tuple(-1 if isinstance(dim, Sym) else dim for dim in shape)


def _reshape(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    x = inputs[0]
    wanted = integers(attrs, "shape")
    symbols = [dim for dim in x.shape if isinstance(dim, Sym)]
    expect(wanted.count(-1) <= 1, f"reshape to {list(wanted)}: at most one -1")
    known = 1
    for dim in wanted:
        known *= dim if dim != -1 else 1
    if symbols:
        expect(len(symbols) == 1, f"reshape of {text_of(x.shape)}: at most one symbolic dim")
        before = math.prod(dim for dim in x.shape[: x.shape.index(symbols[0])] if isinstance(dim, int))
        fits = -1 in wanted and known == x.row_elements and before == math.prod(wanted[: wanted.index(-1)])
        expect(
            fits,
            f"{text_of(x.shape)} does not reshape to {list(wanted)}: {symbols[0]} must stay a dim of its own",
        )
        return [Type(tuple(symbols[0] if dim == -1 else dim for dim in wanted), x.dtype)]
    expect(
        -1 not in wanted and known == x.row_elements, f"{text_of(x.shape)} does not reshape to {list(wanted)}"
    )
    return [Type(tuple(wanted), x.dtype)]


def _reshape_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    """Dims are matched greedily into runs of equal products; a run's leading dims split together, by the
    smaller's size."""
    x, y = inputs[0].shape, outputs[0].shape
    names = iter(LETTERS)
    left, right = ["."] * len(x), ["."] * len(y)
    sizes: dict[str, int] = {}
    i = j = 0
    while i < len(x) and j < len(y):
        name = next(names)
        left[i] = right[j] = name
        a, b = x[i], y[j]
        i, j = i + 1, j + 1
        if isinstance(a, Sym) or isinstance(b, Sym):
            continue
        sizes[name] = min(a, b)
        while a != b and i <= len(x) and j <= len(y):
            if a < b:
                step = x[i]
                assert isinstance(step, int)
                a, i = a * step, i + 1
            else:
                step = y[j]
                assert isinstance(step, int)
                b, j = b * step, j + 1
    return Rule(f"{' '.join(left)} -> {' '.join(right)}", sizes, partial=(frozenset({0}),))


def _reshape_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    return [inputs[0].reshape(integers(attrs, "shape"))]


def _local_shape(attrs: Attrs, outputs: Sequence[Value], axes: Mapping[str, str]) -> dict[str, Attr]:
    return {**attrs, "shape": reshape_attr(outputs[0].shape)}


def _no_flops(*_: object) -> int:
    return 0


register(
    OpDef(
        "reshape",
        (Slot("x", "any"),),
        _reshape,
        _reshape_factors,
        {"shape": tuple},
        reference=_reshape_reference,
        flops=_no_flops,
        bytes=_no_flops,
        localize=_local_shape,
    )
)

# --- split: x -> parts of `sizes` along the last dim ---


def _split(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    x, sizes = inputs[0], integers(attrs, "sizes")
    fits = x.shape[-1] == sum(sizes) and all(size > 0 for size in sizes)
    expect(
        fits,
        f"split of {text_of(x.shape)} into {list(sizes)}: wanted positive sizes that add up to the last dim",
    )
    return [Type((*x.shape[:-1], size), x.dtype) for size in sizes]


def _leading(shape: Shape) -> str:
    return " ".join([*LETTERS[: len(shape) - 1], "."])


def _split_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    dims = _leading(inputs[0].shape)
    return Rule(f"{dims} -> {', '.join([dims] * len(outputs))}", partial=(frozenset({0}),))


def _split_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    return list(torch.split_with_sizes(inputs[0], integers(attrs, "sizes"), dim=-1))


register(
    OpDef(
        "split",
        (Slot("x", "any"),),
        _split,
        _split_factors,
        {"sizes": tuple},
        reference=_split_reference,
        flops=_no_flops,
    )
)

# --- concat: parts -> one, along the last dim ---


def _concat(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    first, total = inputs[0], 0
    for x in inputs:
        expect(
            x.shape[:-1] == first.shape[:-1] and x.dtype == first.dtype,
            f"concat of {first.dtype}{text_of(first.shape)} and {x.dtype}{text_of(x.shape)}: "
            "all but the last dim must agree",
        )
        assert isinstance(x.shape[-1], int)
        total += x.shape[-1]
    return [Type((*first.shape[:-1], total), first.dtype)]


def _concat_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    dims = _leading(inputs[0].shape)
    together = (frozenset(range(len(inputs))),)
    return Rule(f"{', '.join([dims] * len(inputs))} -> {dims}", partial=together)


def _concat_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    return [torch.cat(inputs, dim=-1)]


register(
    OpDef(
        "concat",
        (Slot("parts", "any", variadic=True),),
        _concat,
        _concat_factors,
        reference=_concat_reference,
        flops=_no_flops,
    )
)

# --- gather_rows: x[T, ...], rows[L] -> x[rows] ---


def _gather(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    x, rows = inputs
    return [Type((*rows.shape, *x.shape[1:]), x.dtype)]


def _gather_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    rest = " ".join(LETTERS[1 : len(inputs[0].shape)])
    return Rule(f". {rest}, l -> l {rest}", partial=(frozenset({0}),))


def _gather_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    return [inputs[0][inputs[1].long()]]


register(
    OpDef(
        "gather_rows",
        (Slot("x", "any"), Slot("rows", "i32")),
        _gather,
        _gather_factors,
        reference=_gather_reference,
        flops=_no_flops,
        bytes=lambda inputs, outputs, attrs, sizes: 2 * num_bytes(outputs, sizes),
    )
)
