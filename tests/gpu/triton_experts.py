"""Cases of routed experts: route, sort_routes, experts (triton_arrays.py)."""

from __future__ import annotations

import numpy as np
import torch
from triton_case import Array, Case, Guarded, Rng, bucket, in_rows, normal, poisoned, sizes

from tscompile.kernels import desc
from tscompile.kernels.desc import args_of
from tscompile.layout import round_up
from tscompile.mesh import Mesh
from tscompile.ops import lookup
from tscompile.ops.base import RankContext

ALONE = RankContext(Mesh((("tp", 1),)), 0)


def route(rng: Rng) -> Case:
    """Half of them with many ties. What is chosen is what the op's reference says of float64."""
    rows, num = bucket(rng)
    groups = int(rng.choice([1, 1, 2, 3, 8]))
    experts = groups * int(rng.integers(2, 150 // groups))
    kept = int(rng.integers(1, groups + 1))
    k = int(rng.integers(1, min(experts // groups * kept, 10) + 1))
    scores, normalize, scale = str(rng.choice(["softmax", "sigmoid"])), bool(rng.integers(2)), 2.5
    logits, bias = 2 * normal(rng, rows.tokens, experts), normal(rng, experts)
    if rng.integers(2):
        logits, bias = np.round(2 * logits) / 2, np.round(bias)
    biased = bool(rng.integers(2))
    words = ["logits", *(["bias:weight"] if biased else []), "ids!", "weights!"]
    made = desc.Route(args_of(*words), experts, k, scores, normalize, scale, groups, kept)
    attrs = {
        "k": k,
        "scores": scores,
        "normalize": normalize,
        "scale": scale,
        "groups": groups,
        "kept": kept,
    }
    reference = lookup("route").reference
    assert reference is not None
    given = [torch.from_numpy(x.astype(np.float64)) for x in (logits[:num], bias)[: 1 + biased]]
    ids, weights = (found.double().numpy() for found in reference(ALONE, given, attrs))
    args = {"logits": Guarded("f32", logits.size, logits), "bias": Guarded("f32", experts, bias)}
    args |= {"ids": Guarded("i32", rows.tokens * k), "weights": Guarded("f32", rows.tokens * k)}
    expected = {"ids": poisoned(ids, rows.tokens), "weights": poisoned(weights, rows.tokens)}
    return Case(made, rows, {"sizes": sizes(num)}, args, expected)


def routes(rng: Rng, tokens: int, experts: int, top: int) -> Array:
    """ids[tokens, top]: half of the routes prefer expert 1, the last expert gets none if it need not."""
    likely = np.ones(experts)
    likely[min(1, experts - 1)] = experts
    likely[-1] = 0 if experts > top + 1 else 1
    likely /= likely.sum()
    return np.stack([rng.choice(experts, top, replace=False, p=likely) for _ in range(tokens)])


def sort_routes(rng: Rng) -> Case:
    """Of all experts, or of some in the middle."""
    rows, num = bucket(rng)
    everyone, top = int(rng.integers(4, 30)), int(rng.integers(1, 5))
    experts = everyone if rng.integers(2) else int(rng.integers(1, everyone))
    first = int(rng.integers(everyone - experts + 1))
    made = desc.SortRoutes(args_of("ids", "numbers:weight", "order!", "counts!"), experts, top)
    ids, numbers = routes(rng, num, everyone, top), np.arange(first, first + experts, dtype=np.float32)
    order, counts = sorted_routes(ids, first, experts)
    padded = in_rows(numbers, "f32")
    args = {"ids": Guarded("i32", ids.size, ids), "numbers": Guarded("f32", padded.size, padded)}
    args |= {"order": Guarded("i32", rows.tokens * top), "counts": Guarded("i32", experts)}
    expected = {"order": poisoned(order, rows.tokens * top), "counts": counts}
    return Case(
        made, rows, {"sizes": sizes(num)}, args, {k: v.astype(np.float64) for k, v in expected.items()}
    )


def sorted_routes(ids: Array, first: int, experts: int) -> tuple[Array, Array]:
    """order, -1 behind the routes to these experts, and counts."""
    own = ids.reshape(-1) - first
    own = np.where((own >= 0) & (own < experts), own, experts)
    order = np.argsort(own, kind="stable")
    counts = np.bincount(own, minlength=experts + 1)[:experts]
    return np.where(np.arange(len(own)) < counts.sum(), order, -1), counts


def experts(rng: Rng) -> Case:
    """Of all experts of the model or of some: rows gathered or as they lie; SwiGLU, combined or plain."""
    rows, num = bucket(rng)
    everyone, top = int(rng.choice([3, 5, 20])), int(rng.integers(1, 4))
    experts = everyone if rng.integers(3) else max(1, everyone // 2)
    kind = str(rng.choice(["up", "up", "plain", "down", "down", "both"]))
    gather, combine = kind in ("up", "plain", "both"), kind in ("down", "both")
    k, swiglu = int(rng.choice([8, 40, 64, 200])), int(rng.choice([20, 64])) if kind == "up" else 0
    n = 2 * round_up(swiglu, 16) if swiglu else int(rng.choice([17, 64, 130]))
    dtype = "bf16" if swiglu else "f32"
    words = ["x", "counts", *(["order"] if gather or combine else []), "weight:weight"]
    words += [*(["weights"] if combine else []), "out!"]
    made = desc.Experts(args_of(*words), top, experts, k, n, "bf16", gather, swiglu, combine, dtype)
    order, counts = sorted_routes(routes(rng, num, everyone, top), 0, experts)
    own = order[: counts.sum()]
    weight, weights = normal(rng, experts, n, k, dtype="bf16"), normal(rng, num, top)
    x = normal(rng, rows.tokens if gather else rows.tokens * top, k, dtype="bf16")
    if not gather:
        x[len(own) :] = np.nan
    taken = (x[own // top] if gather else x[: len(own)]).astype(np.float64)
    numbers = np.repeat(np.arange(experts), counts)
    total = np.einsum("rk,rnk->rn", taken, weight.astype(np.float64)[numbers])
    if swiglu:
        halves = total.reshape(-1, n // 32, 2, 16)
        gate, up = (halves[:, :, i].reshape(-1, n // 2)[:, :swiglu] for i in (0, 1))
        total = gate / (1 + np.exp(-gate)) * up
    if combine:
        rows_of_routes, total = total, np.zeros((num, n))
        np.add.at(total, own // top, rows_of_routes * weights.reshape(-1)[own, None])
    most = rows.tokens if combine else rows.tokens * top
    padded = in_rows(weight, "bf16")
    args = {"x": Guarded("bf16", x.size, x), "weight": Guarded("bf16", padded.size, padded)}
    args |= {"counts": Guarded("i32", experts, counts), "order": Guarded("i32", order.size, order)}
    args |= {"weights": Guarded("f32", weights.size, weights)}
    args["out"] = Guarded(dtype, most * (swiglu or n))
    # of a token without a route to these experts the sum is 0, and a SwiGLU's rows may be few and small
    return Case(made, rows, {"sizes": sizes(num)}, args, {"out": poisoned(total, most)}, loose=8.0)


CASES = (route, sort_routes, experts)
