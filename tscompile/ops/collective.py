"""Placement ops. `boundary` and `redistribute` exist between capture and `collectives`; the rest run across
the ranks of one axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tscompile.ir import Value
from tscompile.ops.base import Attrs, OpDef, RankContext, Rule, Slot, Type, integer, register
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
BOUNDARY = register(
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
REDISTRIBUTE = register(
    OpDef(
        "redistribute",
        X,
        _same,
        _identity_rule,
        {"axis": str, "source": str, "target": str},
        reference=_identity,
    )
)


def _all_reduce(tensors: list[Tensor], attrs: Attrs) -> list[Tensor]:
    stacked = torch.stack(tensors)
    total = stacked.sum(0) if attrs["op"] == "sum" else stacked.amax(0)
    return [total.clone() for _ in tensors]


def _all_gather(tensors: list[Tensor], attrs: Attrs) -> list[Tensor]:
    whole = torch.cat(tensors, dim=integer(attrs, "dim"))
    return [whole.clone() for _ in tensors]


def _slice(tensors: list[Tensor], attrs: Attrs) -> list[Tensor]:
    return [x.chunk(len(tensors), dim=integer(attrs, "dim"))[i] for i, x in enumerate(tensors)]


def _reduce_scatter(tensors: list[Tensor], attrs: Attrs) -> list[Tensor]:
    return _slice(_all_reduce(tensors, attrs), attrs)


def _all_to_all(tensors: list[Tensor], attrs: Attrs) -> list[Tensor]:
    whole = torch.cat(tensors, dim=integer(attrs, "source"))
    return list(whole.chunk(len(tensors), dim=integer(attrs, "dim")))


# `axis`: the mesh axis; `dim`: what is gathered, or split over the ranks. slice moves nothing: a rank keeps
# its part.
ALL_REDUCE = register(
    OpDef("all_reduce", X, _same, _identity_rule, {"axis": str, "op": str}, across=_all_reduce)
)
ALL_GATHER = register(
    OpDef("all_gather", X, _same, _identity_rule, {"axis": str, "dim": int}, across=_all_gather)
)
REDUCE_SCATTER = register(
    OpDef(
        "reduce_scatter",
        X,
        _same,
        _identity_rule,
        {"axis": str, "op": str, "dim": int},
        across=_reduce_scatter,
    )
)
ALL_TO_ALL = register(
    OpDef(
        "all_to_all", X, _same, _identity_rule, {"axis": str, "source": int, "dim": int}, across=_all_to_all
    )
)
SLICE = register(
    OpDef("slice", X, _same, _identity_rule, {"axis": str, "dim": int}, across=_slice, flops=lambda *_: 0)
)
