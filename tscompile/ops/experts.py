"""Routed experts: route, sort_routes, dispatch, expert_linear, combine.

    ids, weights  = route(logits [T, E])                  a token's experts, and how much each counts
    order, counts = sort_routes(ids, numbers [E])         the T * k routes, sorted by expert
    rows          = dispatch(x [T, H], order)             [R, H]: each route's token, sorted by expert
    y             = expert_linear(rows, counts, w[E,N,H]) [R, N]: each expert multiplies its own rows
    out           = combine(y, order, weights)            [T, N]: a token's rows, weighted and added up

The dim R of sorted rows belongs to two factors of the placement rules, the expert's `e` and the token's `t`.
With experts sharded over an axis, a rank has the rows of its own experts (Shard(0) of R, ragged), and what it
combines is Partial(sum). `numbers` is 0, 1, ..., E - 1: a rank's shard of it says which experts are its own,
so that the program is the same on all ranks. With tokens sharded, a rank has the rows of its own tokens
(Shard(0, "T")) for all experts, and its counts are a term of the sum. Dispatch to experts on other ranks, and
combine of what they give, are moves of `rows` from one owner to another: `ragged_all_to_all`. `order` counts
the tokens that a rank has, so it does not move.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tscompile.ir import DTYPES, Shape, Sym, Value
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

# --- route: logits[T, E] (, bias[E]) -> ids i32[T, k], weights f32[T, k], best first, ties to the lower id.
# Scores are softmax or sigmoid of the logits; the choice is by score + bias, the weight is the score.
# normalize: weights are divided by their sum + 1e-20. scale: what they are multiplied by in the end.
# Group-limited (DeepSeek-V3): of `groups` equal groups of experts only those `kept` may be chosen whose two
# best sum highest. ---

SCORES = ("softmax", "sigmoid")


def _route(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    logits, experts = inputs[0], inputs[0].shape[-1]
    k, groups, kept = (integer(attrs, name) for name in ("k", "groups", "kept"))
    expect(
        len(logits.shape) == 2 and isinstance(experts, int),
        f"route of {text_of(logits.shape)}: wanted [T, experts]",
    )
    assert isinstance(experts, int)
    expect(len(inputs) <= 2, "route takes logits and at most a bias")
    expect(
        all(v.shape == (experts,) for v in inputs[1:]),
        f"route of {text_of(logits.shape)} with a bias of {text_of(inputs[-1].shape)}: wanted [{experts}]",
    )
    expect(attrs["scores"] in SCORES, f"route by {attrs['scores']!r}: wanted {' or '.join(SCORES)}")
    expect(
        1 <= kept <= groups and experts % groups == 0 and (groups == 1 or experts // groups >= 2),
        f"route of {experts} experts in {groups} groups of which {kept} are kept: wanted equal groups of at "
        "least 2, and some of them",
    )
    expect(
        1 <= k <= experts // groups * kept,
        f"route to {k} experts of {experts // groups * kept} that can be chosen",
    )
    return [Type((logits.shape[0], k), "i32"), Type((logits.shape[0], k), "f32")]


def _route_factors(inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs) -> Rule:
    return Rule(f"t .{', .' * (len(inputs) - 1)} -> t ., t .")


def _route_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    logits = inputs[0]
    scores = torch.softmax(logits, -1) if attrs["scores"] == "softmax" else torch.sigmoid(logits)
    choice = scores + inputs[1] if len(inputs) > 1 else scores
    groups = integer(attrs, "groups")
    if groups > 1:
        split = choice.view(len(choice), groups, choice.shape[1] // groups)
        best = split.topk(2, dim=-1).values.sum(-1)
        chosen = _first(best, integer(attrs, "kept"))
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, chosen, True)
        choice = split.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    ids = _first(choice, integer(attrs, "k"))
    weights = scores.gather(-1, ids)
    if attrs["normalize"]:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return [ids.int(), weights * number(attrs, "scale")]


def _first(x: Tensor, count: int) -> Tensor:
    """Where the largest of each row are, in descending order, ties to the lower index."""
    return torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :count]


register(
    OpDef(
        "route",
        (Slot("logits", "f32", variadic=True),),
        _route,
        _route_factors,
        {"k": int, "scores": str, "normalize": bool, "scale": float, "groups": int, "kept": int},
        reference=_route_reference,
    )
)

# --- sort_routes: ids[T, k], numbers[E] -> order i32[R], counts i32[E]. Route r = t * k + j is of token t to
# its j-th expert; `order` lists the routes to these E experts, by expert, then ascending. ---


def _sort(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    ids, numbers = inputs
    routes = _routes(ids.shape)
    expect(routes is not None, f"sort_routes of {text_of(ids.shape)}: wanted [T, k]")
    expect(len(numbers.shape) == 1, f"sort_routes by {text_of(numbers.shape)}: wanted the experts' numbers")
    assert routes is not None
    return [Type((routes,), "i32"), Type(numbers.shape, "i32")]


def _routes(ids: Shape) -> Sym | None:
    """The dim of the routes of [T, k], with their tokens; None if it is not that."""
    tokens, k = ids if len(ids) == 2 else (0, 0)
    if not isinstance(tokens, Sym) or (tokens.name, tokens.times, tokens.plus) != ("T", 1, 0):
        return None
    return Sym("R", times=k, over=tokens.over) if isinstance(k, int) else None


def _sort_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    ids, numbers = inputs[0].flatten(), inputs[1].int()
    order = torch.sort(ids, stable=True).indices
    own = torch.isin(ids[order], numbers)
    counts = (ids[:, None] == numbers[None, :]).sum(0)
    return [order[own].int(), counts.int()]


register(
    OpDef(
        "sort_routes",
        (Slot("ids", "i32"), Slot("numbers", "f32")),
        _sort,
        lambda inputs, outputs, attrs: Rule("t ., e -> e*t, e", counted="t"),
        reference=_sort_reference,
    )
)

# --- dispatch: x[T, H], order[R] -> rows[R, H], of x's dtype. k: routes of a token. ---


def _dispatch(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    x, order = inputs
    expect(
        len(x.shape) == 2 and order.shape == (_routes((x.shape[0], integer(attrs, "k"))),),
        f"dispatch of {text_of(x.shape)} by {text_of(order.shape)}: wanted [T, H] and [R*{attrs['k']}]",
    )
    return [Type((order.shape[0], x.shape[1]), x.dtype)]


register(
    OpDef(
        "dispatch",
        (Slot("x", "storage"), Slot("order", "i32")),
        _dispatch,
        lambda inputs, outputs, attrs: Rule("t h, e*t -> e*t h", partial=(frozenset({0}),)),
        {"k": int},
        reference=lambda context, inputs, attrs: [inputs[0][inputs[1].long() // integer(attrs, "k")]],
        flops=lambda *_: 0,
        bytes=lambda inputs, outputs, attrs, sizes: 2 * num_bytes(outputs, sizes),
    )
)

# --- expert_linear: rows[R, K] sorted by expert, counts[E], weight[E, N, K] -> f32[R, N]. The first counts[0]
# rows are expert 0's. ---


def _expert_linear(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    rows, counts, weight = inputs
    fits = len(rows.shape) == 2 and len(weight.shape) == 3 and counts.shape == weight.shape[:1]
    expect(
        fits and rows.shape[1] == weight.shape[2],
        f"expert_linear of rows {text_of(rows.shape)}, counts {text_of(counts.shape)} with weight "
        f"{text_of(weight.shape)}: wanted [R, K], [E], [E, N, K]",
    )
    return [Type((rows.shape[0], weight.shape[1]), "f32")]


def _expert_linear_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    rows, counts, weight = inputs
    parts = zip(torch.split_with_sizes(rows.float(), counts.tolist()), weight, strict=True)
    return [torch.cat([torch.nn.functional.linear(part, w.float()) for part, w in parts])]


def _expert_linear_flops(
    inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs, sizes: Sizes
) -> int:
    return 2 * elements(inputs[0].shape, sizes) * elements(outputs[0].shape[1:], sizes)


def _expert_linear_bytes(
    inputs: Sequence[Value], outputs: Sequence[Value], attrs: Attrs, sizes: Sizes
) -> int:
    """Of the weight, the experts that are routed to, each once: at most one a row."""
    weight = inputs[2]
    hit = min(elements(inputs[0].shape[:1], sizes), elements(weight.shape[:1], sizes))
    read = hit * elements(weight.shape[1:], sizes) * DTYPES[weight.dtype]
    return num_bytes([inputs[0], *outputs], sizes) + read


register(
    OpDef(
        "expert_linear",
        (Slot("rows", "storage"), Slot("counts", "i32"), Slot("weight", "storage")),
        _expert_linear,
        lambda inputs, outputs, attrs: Rule(
            "e*t k, e, e n k -> e*t n", partial=(frozenset({0}),), counted="t"
        ),
        reference=_expert_linear_reference,
        flops=_expert_linear_flops,
        bytes=_expert_linear_bytes,
    )
)

# --- combine: rows[R, H], order[R], weights[T, k] -> f32[T, H]: the sum over a token's rows of weight * row,
# in ascending order of expert. ---


def _combine(inputs: Sequence[Value], attrs: Attrs) -> list[Type]:
    rows, order, weights = inputs
    routed = len(weights.shape) == 2 and rows.shape[:1] == order.shape
    expect(
        routed and len(rows.shape) == 2 and order.shape == (_routes(weights.shape),),
        f"combine of rows {text_of(rows.shape)} by {text_of(order.shape)} with weights "
        f"{text_of(weights.shape)}: wanted [R*k, H], [R*k], [T, k]",
    )
    return [Type((weights.shape[0], rows.shape[1]), "f32")]


def _combine_reference(context: RankContext, inputs: list[Tensor], attrs: Attrs) -> list[Tensor]:
    rows, order, weights = inputs[0], inputs[1].long(), inputs[2]
    out = rows.new_zeros(weights.shape[0], rows.shape[1])
    weighted = rows * weights.flatten()[order][:, None]
    return [out.index_add_(0, order // weights.shape[1], weighted)]


register(
    OpDef(
        "combine",
        (Slot("rows", "f32"), Slot("order", "i32"), Slot("weights", "f32")),
        _combine,
        lambda inputs, outputs, attrs: Rule("e*t h, e*t, t . -> t h", partial=(frozenset({0}),)),
        reference=_combine_reference,
        flops=lambda inputs, outputs, attrs, sizes: 2 * elements(inputs[0].shape, sizes),
    )
)
