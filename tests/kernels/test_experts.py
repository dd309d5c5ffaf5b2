"""experts, route, sort_routes: against float64 and the ops' references, and bit for bit across targets,
threads and what else is in the batch."""

from __future__ import annotations

import kernel_arrays as arrays
import numpy as np
import pytest
import torch
from kernel_harness import BASE, DESCS, VARIANTS, Buffer, Variant, call, desc

from tscompile.kernels.desc import Combine, Dispatch, Experts, Route, SortRoutes, args_of
from tscompile.mesh import Mesh
from tscompile.ops import lookup
from tscompile.ops.base import RankContext

UP = args_of("x", "order", "counts", "weight:weight", "out!")
PLAIN = args_of("x", "counts", "weight:weight", "out!")
DOWN = args_of("x", "counts", "weight:weight", "order", "weights", "out!")
EXPERTS = [
    desc("experts-up", Experts(UP, 2, 5, 64, 96, "bf16", True, 40, False, "bf16")),
    desc("experts-up-f32", Experts(UP, 3, 7, 75, 64, "f32", True, 32, False, "f32")),
    desc("experts-plain", Experts(PLAIN, 2, 4, 40, 33, "bf16", False, 0, False, "f32")),
    desc("experts-down", Experts(DOWN, 2, 5, 40, 70, "bf16", False, 0, True, "f32")),
    desc("experts-down-f32", Experts(DOWN, 3, 7, 100, 48, "f32", False, 0, True, "f32")),
    desc("experts-down-top1", Experts(DOWN, 1, 3, 33, 300, "bf16", False, 0, True, "f32")),
]
LOGITS, BIASED = (
    args_of("logits", "ids!", "weights!"),
    args_of("logits", "bias:weight", "ids!", "weights!"),
)
ROUTES = [
    desc("route", Route(LOGITS, 13, 3, "softmax", False, 1.0, 1, 1)),
    desc("route-normalized", Route(LOGITS, 128, 8, "softmax", True, 1.0, 1, 1)),
    desc("route-all", Route(LOGITS, 16, 16, "softmax", True, 2.0, 1, 1)),
    desc("route-sigmoid", Route(LOGITS, 40, 1, "sigmoid", True, 1.0, 1, 1)),
    desc("route-groups", Route(BIASED, 60, 5, "sigmoid", True, 2.5, 6, 2)),
]
SORT = args_of("ids", "numbers:weight", "order!", "counts!")
SORTS = [desc("sort-routes", SortRoutes(SORT, 9, 4)), desc("sort-routes-shard", SortRoutes(SORT, 3, 4))]
MOVES = [
    desc(f"dispatch-{dtype}", Dispatch(args_of("x", "order", "out!"), 3, 37, dtype))
    for dtype in ("bf16", "f32")
]
COMBINE = args_of("rows", "order", "weights", "out!")
COMBINES = {
    desc("combine", Combine(COMBINE, 2, 70)): (
        desc("experts-rows", Experts(PLAIN, 2, 5, 40, 70, "bf16", False, 0, False, "f32")),
        "experts-down",
    ),
    desc("combine-f32", Combine(COMBINE, 3, 48)): (
        desc("experts-rows-f32", Experts(PLAIN, 3, 7, 100, 48, "f32", False, 0, False, "f32")),
        "experts-down-f32",
    ),
}
TOKENS = (1, 2, 5, 16, 37, 150)  # rows of an expert across the register tiles, AMX's 8 and 16, and the blocks


class Problem:
    """Random routes and operands of a case. Half of the routes prefer expert 1, some experts get none."""

    def __init__(self, name: str, tokens: int, seed: int = 0) -> None:
        made = DESCS[name]
        assert isinstance(made, Experts)
        self.name, self.d, self.tokens = name, made, tokens
        random = np.random.default_rng(seed)
        likely = np.ones(made.experts)
        likely[1], likely[-1] = made.experts, 0 if made.experts > made.top else 1
        likely /= likely.sum()
        self.ids = np.stack(
            [random.choice(made.experts, made.top, replace=False, p=likely) for _ in range(tokens)]
        )
        self.order = np.argsort(self.ids.reshape(-1), kind="stable")
        self.counts = np.bincount(self.ids.reshape(-1), minlength=made.experts)
        self.weights = random.random((tokens, made.top)).astype(np.float32)
        x = random.standard_normal((tokens if made.gather else tokens * made.top, made.k))
        self.x = arrays.stored(x, made.dtype)
        weight = random.standard_normal((made.experts, made.n, made.k)) / made.k**0.5
        self.weight = arrays.stored(weight, made.dtype)

    def run(self, variant: Variant, threads: int = 1) -> np.ndarray:
        """[tokens or rows, out width] as stored."""
        d = self.d
        tiles = np.concatenate([arrays.tiles(w, d.dtype) for w in self.weight])
        rows = self.tokens if d.combine else len(self.order)
        out = Buffer((rows, d.swiglu or d.n), arrays.STORED[d.out_dtype])
        arguments = {
            "x": Buffer(self.x.shape, self.x.dtype, self.x),
            "order": Buffer(self.order.shape, np.int32, self.order),
            "counts": Buffer(self.counts.shape, np.int32, self.counts),
            "weight": Buffer(tiles.shape, tiles.dtype, tiles),
            "weights": Buffer(self.weights.shape, np.float32, self.weights),
            "out": out,
        }
        call(self.name, variant, {"num_tokens": self.tokens}, arguments, threads)
        return out.array

    def of_token(self, token: int) -> Problem:
        """The same token alone."""
        alone = Problem(self.name, 1)
        alone.ids = self.ids[token : token + 1]
        alone.order = np.argsort(alone.ids.reshape(-1), kind="stable")
        alone.counts = np.bincount(alone.ids.reshape(-1), minlength=self.d.experts)
        alone.weights, alone.weight = self.weights[token : token + 1], self.weight
        own = self.rows_of(token)
        alone.x = self.x[token : token + 1] if self.d.gather else self.x[own]
        return alone

    def rows_of(self, token: int) -> np.ndarray:
        """Where a token's rows are among the sorted, in order of expert."""
        return np.flatnonzero(self.order // self.d.top == token)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """(float64 result, its tolerance)."""
        d, weight = self.d, arrays.values(self.weight, self.d.dtype)
        x = arrays.values(self.x, d.dtype)
        x = x[self.order // d.top] if d.gather else x
        expert = np.repeat(np.arange(d.experts), self.counts)
        y = np.einsum("rk,rnk->rn", x, weight[expert])
        scale = np.einsum("rk,rnk->rn", np.abs(x), np.abs(weight[expert])) * 2.0**-20
        if d.swiglu:
            tiles = y.reshape(len(y), -1, 2, 16)
            gate, up = (tiles[:, :, i].reshape(len(y), -1)[:, : d.swiglu] for i in (0, 1))
            scale = scale.max() * (2 + np.abs(gate) + np.abs(up))
            y = gate / (1 + np.exp(-gate)) * up
        if d.combine:
            factor = self.weights.reshape(-1)[self.order].astype(np.float64)
            total, error = np.zeros((2, self.tokens, d.n))
            np.add.at(total, self.order // d.top, factor[:, None] * y)
            np.add.at(error, self.order // d.top, scale + np.abs(factor[:, None] * y) * 2.0**-20)
            y, scale = total, error
        return y, scale + (np.abs(y) * 2.0**-8 if d.out_dtype == "bf16" else 0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", EXPERTS)
def test_near_float64(name: str, variant: Variant) -> None:
    problem = Problem(name, 37)
    wanted, tolerance = problem.expected()
    found = arrays.values(problem.run(variant), problem.d.out_dtype)
    assert (np.abs(found - wanted) <= tolerance).all()


@pytest.mark.parametrize("name", EXPERTS)
def test_same_bits_on_every_target_and_any_threads(name: str) -> None:
    for tokens in TOKENS:
        problem = Problem(name, tokens, seed=tokens)
        wanted = problem.run(BASE).tobytes()
        for variant in VARIANTS:
            for threads in (1, 7) if tokens < 40 else (3,):
                found = problem.run(variant, threads)
                assert found.tobytes() == wanted, f"{tokens} tokens, {threads} threads, {variant}"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", EXPERTS)
def test_a_token_does_not_depend_on_others(name: str, variant: Variant) -> None:
    problem = Problem(name, 45, seed=7)
    whole = problem.run(variant)
    for token in (0, 17, 44):
        own = slice(token, token + 1) if problem.d.combine else problem.rows_of(token)
        assert problem.of_token(token).run(variant).tobytes() == whole[own].tobytes()


def routed(
    name: str, logits: np.ndarray, bias: np.ndarray, variant: Variant, threads: int = 1
) -> list[bytes]:
    """ids and weights, as bytes."""
    made = DESCS[name]
    assert isinstance(made, Route)
    ids, weights = (Buffer((len(logits), made.k), dtype) for dtype in (np.int32, np.float32))
    arguments = {
        "logits": Buffer(logits.shape, np.float32, logits),
        "bias": Buffer((arrays.round_up(made.experts, 16),), np.float32, arrays.padded_rows(bias)),
        "ids": ids,
        "weights": weights,
    }
    call(name, variant, {"num_tokens": len(logits)}, arguments, threads)
    return [ids.array.tobytes(), weights.array.tobytes()]


def route_inputs(name: str, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    made = DESCS[name]
    assert isinstance(made, Route)
    random = np.random.default_rng(3)
    logits = (2 * random.standard_normal((tokens, made.experts))).astype(np.float32)
    logits[1] = 0.5  # all equal: the lowest numbers win
    return logits, random.standard_normal(made.experts).astype(np.float32)


@pytest.mark.parametrize("name", ROUTES)
def test_routes_are_the_references(name: str) -> None:
    made, (logits, bias) = DESCS[name], route_inputs(name, 40)
    assert isinstance(made, Route)
    given = [torch.from_numpy(x) for x in ((logits, bias) if made.has("bias") else (logits,))]
    attrs = {key: getattr(made, key) for key in ("k", "scores", "normalize", "scale", "groups", "kept")}
    reference = lookup("route").reference
    assert reference is not None
    ids, weights = reference(RankContext(Mesh(), 0), given, attrs)
    wanted = routed(name, logits, bias, BASE)
    assert np.array_equal(np.frombuffer(wanted[0], np.int32), ids.numpy().reshape(-1))
    assert np.allclose(np.frombuffer(wanted[1], np.float32), weights.numpy().reshape(-1), rtol=1e-5)
    for variant in VARIANTS:
        for threads in (1, 3):
            assert routed(name, logits, bias, variant, threads) == wanted, variant


@pytest.mark.parametrize("name", ROUTES)
def test_routes_of_nan_are_experts(name: str) -> None:
    made, (logits, bias) = DESCS[name], route_inputs(name, 3)
    assert isinstance(made, Route)
    logits[0], logits[1] = np.nan, np.inf
    ids = np.frombuffer(routed(name, logits, bias, BASE)[0], np.int32).reshape(3, -1)
    assert all(len(set(row)) == made.k and min(row) >= 0 and max(row) < made.experts for row in ids.tolist())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("name", "first"), [("sort-routes", 0), ("sort-routes-shard", 3)])
def test_sort_routes(name: str, first: int, variant: Variant) -> None:
    made = DESCS[name]
    assert isinstance(made, SortRoutes)
    random = np.random.default_rng(1)
    for tokens in (1, 50):
        ids = np.stack([random.permutation(9)[: made.k] for _ in range(tokens)]).astype(np.int32)
        numbers = np.arange(first, first + made.experts, dtype=np.float32)
        order, counts = Buffer((ids.size,), np.int32), Buffer((made.experts,), np.int32)
        arguments = {
            "ids": Buffer(ids.shape, np.int32, ids),
            "numbers": Buffer((16,), np.float32, arrays.padded_rows(numbers)),
            "order": order,
            "counts": counts,
        }
        call(name, variant, {"num_tokens": tokens}, arguments, threads=2)
        wanted = [r for e in numbers for r in np.flatnonzero(ids.reshape(-1) == e)]
        assert order.array.tolist() == wanted + [-1] * (ids.size - len(wanted))
        assert counts.array.tolist() == [int((ids == e).sum()) for e in numbers]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", MOVES)
def test_dispatch(name: str, variant: Variant) -> None:
    """Each route's token; nothing behind the last route to these experts."""
    made = DESCS[name]
    assert isinstance(made, Dispatch)
    random = np.random.default_rng(2)
    for tokens, routes in ((1, 3), (20, 60), (20, 41), (5, 0)):
        x = arrays.stored(random.standard_normal((tokens, made.width)), made.dtype)
        order = np.full(tokens * made.top, -1, np.int32)
        order[:routes] = random.permutation(tokens * made.top)[:routes]
        out = Buffer((tokens * made.top, made.width), x.dtype)
        behind = out.array[routes:].tobytes()
        arguments = {
            "x": Buffer(x.shape, x.dtype, x),
            "order": Buffer(order.shape, np.int32, order),
            "out": out,
        }
        call(name, variant, {"num_tokens": tokens}, arguments, threads=3)
        assert out.array[:routes].tobytes() == x[order[:routes] // made.top].tobytes()
        assert out.array[routes:].tobytes() == behind


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", COMBINES)
def test_combine_gives_the_bits_of_experts_that_combine(name: str, variant: Variant) -> None:
    made, (rows, fused) = DESCS[name], COMBINES[name]
    assert isinstance(made, Combine)
    for tokens in (1, 19):
        apart, together = Problem(rows, tokens, seed=5), Problem(fused, tokens, seed=5)
        y, order = apart.run(variant), apart.order.astype(np.int32)
        out = Buffer((tokens, made.width), np.float32)
        arguments = {
            "rows": Buffer(y.shape, np.float32, y),
            "order": Buffer(order.shape, np.int32, order),
            "weights": Buffer(apart.weights.shape, np.float32, apart.weights),
            "out": out,
        }
        call(name, variant, {"num_tokens": tokens}, arguments, threads=3)
        assert out.array.tobytes() == together.run(variant).tobytes()
