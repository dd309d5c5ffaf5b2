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
        bytes=lambda *_: 0,
    )
)
# From one placement to another along `axis`; global shapes on both sides. Rows that are routed come with each
# rank's term of their counts. Made by `reshard`, realised by `collectives`.
register(
    OpDef(
        "redistribute",
        (Slot("x", "any", variadic=True),),
        _same,
        _identity_rule,
        {"axis": str, "source": str, "target": str},
        reference=_identity,
    )
)


Ranks = list[list[Tensor]]  # each rank's inputs
Starts = list[int] | None  # where each rank's part of what is given begins, and the end; None: equal parts


def _all_reduce(ranks: Ranks, attrs: Attrs, starts: Starts) -> list[Tensor]:
    stacked = torch.stack([x for (x,) in ranks])
    total = stacked.sum(0, dtype=stacked.dtype) if attrs["op"] == "sum" else stacked.amax(0)
    return [total.clone() for _ in ranks]


def _all_gather(ranks: Ranks, attrs: Attrs, starts: Starts) -> list[Tensor]:
    whole = torch.cat([x for (x,) in ranks], dim=integer(attrs, "dim"))
    return [whole.clone() for _ in ranks]


def _parts(whole: list[Tensor], attrs: Attrs, starts: Starts) -> list[Tensor]:
    dim = integer(attrs, "dim")
    starts = starts or [i * whole[0].shape[dim] // len(whole) for i in range(len(whole) + 1)]
    return [x.narrow(dim, starts[i], starts[i + 1] - starts[i]) for i, x in enumerate(whole)]


def _slice(ranks: Ranks, attrs: Attrs, starts: Starts) -> list[Tensor]:
    return _parts([x for (x,) in ranks], attrs, starts)


def _reduce_scatter(ranks: Ranks, attrs: Attrs, starts: Starts) -> list[Tensor]:
    return _parts(_all_reduce(ranks, attrs, starts), attrs, starts)


def _all_to_all(ranks: Ranks, attrs: Attrs, starts: Starts) -> list[Tensor]:
    whole = torch.cat([x for (x,) in ranks], dim=integer(attrs, "source"))
    return _parts([whole] * len(ranks), attrs, starts)


def _ragged_all_to_all(ranks: Ranks, attrs: Attrs, starts: Starts) -> list[Tensor]:
    """counts[q * E + e]: the rows of rank q's tokens for expert e. Of one rank's experts the rows lie by
    expert, then by the rank of their token; of one rank's tokens by expert: both in the order of one rank."""
    counts = ranks[0][1].view(len(ranks), -1)  # [of a rank's tokens, to an expert]
    experts, own = counts.shape[1], counts.shape[1] // len(ranks)
    parts: dict[tuple[int, int], Tensor] = {}  # (the token's rank, the expert) -> rows
    for rank, (x, _) in enumerate(ranks):
        held = [(rank, e) for e in range(experts)]
        if attrs["target"] == "T":
            held = [(q, e) for e in range(rank * own, (rank + 1) * own) for q in range(len(ranks))]
        sizes = [int(counts[part]) for part in held]
        parts.update(zip(held, torch.split_with_sizes(x, sizes), strict=True))
    if attrs["target"] == "T":
        return [torch.cat([parts[r, e] for e in range(experts)]) for r in range(len(ranks))]
    return [
        torch.cat([parts[q, e] for e in range(r * own, (r + 1) * own) for q in range(len(ranks))])
        for r in range(len(ranks))
    ]


def _send(ranks: list[list[Tensor | None]], attrs: Attrs, starts: Starts) -> list[Tensor | None]:
    given: list[Tensor | None] = [None] * len(ranks)
    given[integer(attrs, "dst")] = ranks[integer(attrs, "src")][0]
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


def _routed(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    """Rows of routes, and how many there are: global shapes, or those of one rank (by token, by expert)."""
    rows, counts = inputs
    dim, axis, ranks = rows.shape[0], str(attrs["axis"]), integer(attrs, "ranks")
    fits = isinstance(dim, Sym) and dim.ragged and len(counts.shape) == 1
    expect(fits, f"rows {text_of(rows.shape)} of experts with the counts {text_of(counts.shape)}")
    assert isinstance(dim, Sym)
    over, by_token = dim.over, attrs["target"] == "T"
    if ranks > 1:
        expect(over == (() if by_token else (axis,)), f"rows {text_of(rows.shape)} to {attrs['target']!r}")
        over = (axis,) if by_token else ()
    return [Type((replace(dim, over=over), *rows.shape[1:]), rows.dtype)]


def _collective(
    name: str,
    infer: Infer,
    across: Across,
    attrs: dict[str, type],
    inputs: tuple[Slot, ...] = X,
    *,
    exchanges: bool = True,
) -> None:
    definition = OpDef(name, inputs, infer, _identity_rule, {"axis": str, **attrs}, across=across)
    register(replace(definition, exchanges=exchanges, flops=lambda *_: 0))


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
_collective("slice", _resized(shrink="dim"), _slice, {"dim": int, "ranks": int}, exchanges=False)
_collective("send", _same, _send, {"src": int, "dst": int})
# Rows that are routed, from their tokens' ranks to their experts' (target "") or back (target "T"). counts:
# all ranks' terms of the rows of each expert, end to end.
_collective(
    "ragged_all_to_all",
    _routed,
    _ragged_all_to_all,
    {"target": str, "ranks": int},
    (Slot("rows", "any"), Slot("counts", "i32")),
)
# The value of a collective that `overlap` has put in two, which until here is in flight: nothing else reads
# it, and what it is made of stays as it is.
register(
    OpDef(
        "finish",
        (Slot("x", "any"), Slot("made_of", "any", variadic=True)),
        _same,
        lambda inputs, outputs, attrs: Rule(
            ", ".join([" ".join("." * len(v.shape)) for v in inputs])
            + f" -> {' '.join('.' * len(inputs[0].shape))}"
        ),
        reference=_identity,
        flops=lambda *_: 0,
        bytes=lambda *_: 0,
    )
)
