"""Placement ops. `boundary` and `redistribute` exist between capture and `collectives`; the rest run across
the ranks of one axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tscompile.ir import Sym, Value
from tscompile.ops.base import (
    Across,
    Attrs,
    Infer,
    OpDef,
    RankContext,
    Rule,
    Slot,
    Type,
    expect,
    integer,
    register,
    text_of,
)
from tscompile.ops.elementwise import LETTERS


def _same(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    return [Type(inputs[0].shape, inputs[0].dtype)]


def _identity_rule(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    dims = " ".join(LETTERS[: len(inputs[0].shape)])
    return Rule(f"{dims} -> {dims}", partial=(frozenset({0}),))


def _identity(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    return [inputs[0]]


X = (Slot("x", "any"),)

# A module's boundary, where its author said what it takes or gives. placements: "tp:R dp:S(0)".
register(
    OpDef(
        "boundary",
        X,
        _same,
        _identity_rule,
        {"module": str, "placements": str},
        reference=_identity,
        flops=lambda *_: 0,
    )
)
# From one placement to another along `axis`; global shapes on both sides. Made by `reshard`, realised by
# `collectives`.
register(
    OpDef(
        "redistribute",
        X,
        _same,
        _identity_rule,
        {"axis": str, "source": str, "target": str},
        reference=_identity,
    )
)


Tensors = list[Tensor]
Starts = list[int] | None  # where each rank's part of what is given begins, and the end; None: equal parts


def _all_reduce(tensors: list[Tensor], attrs: Attrs, starts: Starts) -> list[Tensor]:
    stacked = torch.stack(tensors)
    total = stacked.sum(0) if attrs["op"] == "sum" else stacked.amax(0)
    return [total.clone() for _ in tensors]


def _all_gather(tensors: list[Tensor], attrs: Attrs, starts: Starts) -> list[Tensor]:
    whole = torch.cat(tensors, dim=integer(attrs, "dim"))
    return [whole.clone() for _ in tensors]


def _slice(tensors: list[Tensor], attrs: Attrs, starts: Starts) -> list[Tensor]:
    dim = integer(attrs, "dim")
    starts = starts or [i * tensors[0].shape[dim] // len(tensors) for i in range(len(tensors) + 1)]
    return [x.narrow(dim, starts[i], starts[i + 1] - starts[i]) for i, x in enumerate(tensors)]


def _reduce_scatter(tensors: list[Tensor], attrs: Attrs, starts: Starts) -> list[Tensor]:
    return _slice(_all_reduce(tensors, attrs, starts), attrs, starts)


def _all_to_all(tensors: list[Tensor], attrs: Attrs, starts: Starts) -> list[Tensor]:
    whole = torch.cat(tensors, dim=integer(attrs, "source"))
    return _slice([whole] * len(tensors), attrs, starts)


def _send(tensors: list[Tensor | None], attrs: Attrs, starts: Starts) -> list[Tensor | None]:
    given: list[Tensor | None] = [None] * len(tensors)
    given[integer(attrs, "dst")] = tensors[integer(attrs, "src")]
    return given


def _resized(*, grow: str = "", shrink: str = "") -> Infer:
    """The shape rule of an op whose dim `attrs[grow]` becomes `ranks` times as long, and `attrs[shrink]` as
    short."""

    def infer(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
        shape, ranks = list(inputs[0].shape), integer(attrs, "ranks")
        for key, times, parts in ((grow, ranks, 1), (shrink, 1, ranks)):
            if key and ranks > 1:
                dim = shape[integer(attrs, key)]
                if isinstance(dim, Sym):
                    axis = str(attrs["axis"])
                    expect((axis in dim.over) == (times > 1), f"{dim} over {axis}")
                    over = dim.over[:-1] if times > 1 else (*dim.over, axis)
                    shape[integer(attrs, key)] = replace(dim, over=over)
                    continue
                expect(
                    isinstance(dim, int) and dim % parts == 0,
                    f"{text_of(inputs[0].shape)} over {ranks} ranks",
                )
                assert isinstance(dim, int)
                shape[integer(attrs, key)] = dim * times // parts
        return [Type(tuple(shape), inputs[0].dtype)]

    return infer


def _collective(name: str, infer: Infer, across: Across, attrs: dict[str, type]) -> None:
    register(OpDef(name, X, infer, _identity_rule, {"axis": str, **attrs}, across=across, flops=lambda *_: 0))


# axis: the mesh axis. dim: what is gathered, or split over the ranks; source: what was split. ranks: how
# many, 1 while shapes are global. slice moves nothing: a rank keeps its part. send: from the rank at
# coordinate src to the one at dst; the others of the axis have nothing, before and after.
_collective("all_reduce", _same, _all_reduce, {"op": str})
_collective("all_gather", _resized(grow="dim"), _all_gather, {"dim": int, "ranks": int})
_collective("reduce_scatter", _resized(shrink="dim"), _reduce_scatter, {"op": str, "dim": int, "ranks": int})
_collective(
    "all_to_all",
    _resized(grow="source", shrink="dim"),
    _all_to_all,
    {"source": int, "dim": int, "ranks": int},
)
_collective("slice", _resized(shrink="dim"), _slice, {"dim": int, "ranks": int})
_collective("send", _same, _send, {"src": int, "dst": int})
