"""linear: against float64, against a scalar model of the order of arithmetic, and bit for bit across
targets, threads and M."""

from __future__ import annotations

import kernel_arrays as arrays
import numpy as np
import pytest
from kernel_harness import BASE, DESCS, VARIANTS, Buffer, Variant, call, desc

from tscompile.kernels.desc import Linear, args_of

X, BIASED = args_of("x", "weight:weight", "out!"), args_of("x", "weight:weight", "bias:weight", "out!")
CASES = [
    desc("linear-odd", Linear(X, "T", False, 1, 100, 40, "bf16", 0, 0, "f32")),
    desc("linear-deep", Linear(BIASED, "T", False, 1, 1100, 33, "bf16", 33, 0, "f32")),
    desc("linear-long", Linear(X, "L", False, 1, 32, 509, "bf16", 0, 0, "bf16")),
    desc("linear-swiglu", Linear(X, "T", False, 1, 64, 96, "bf16", 0, 40, "bf16")),
    desc("linear-swiglu-bias", Linear(BIASED, "T", False, 1, 72, 64, "f32", 64, 32, "f32")),
    desc("linear-gather", Linear(X, "L", True, 2, 48, 130, "bf16", 0, 0, "f32")),
    desc("linear-f32", Linear(X, "T", False, 3, 75, 50, "f32", 0, 0, "f32")),
    desc("linear-repeated-bias", Linear(BIASED, "T", False, 2, 40, 24, "bf16", 48, 0, "bf16")),
    desc("linear-short-bias", Linear(BIASED, "T", False, 3, 40, 24, "f32", 6, 0, "f32")),
    desc("linear-f32-deep", Linear(BIASED, "L", True, 1, 1111, 17, "f32", 17, 0, "f32")),
]
ROWS = (
    1,
    2,
    3,
    5,
    7,
    8,
    11,
    16,
    19,
    40,
    300,
)  # across the widths of register tiles, AMX's 8 and 16, and the blocks of rows


class Problem:
    """Random operands of a case, for `rows` rows of the batch."""

    def __init__(self, name: str, rows: int, seed: int = 0) -> None:
        made = DESCS[name]
        assert isinstance(made, Linear)
        random = np.random.default_rng(seed)
        self.name, self.d, self.rows = name, made, rows
        x = arrays.stored(random.standard_normal((max(rows, 4) * 2, made.fold, made.k)), made.dtype)
        self.x = x if made.gather else x[:rows]
        weight = random.standard_normal((made.n, made.k)) / made.k**0.5
        self.weight = arrays.stored(weight, made.dtype)
        self.bias = random.standard_normal(made.bias).astype(np.float32)
        # rows in any order: the kernel must not rely on theirs
        self.logit_rows = random.permutation(len(x))[:rows]

    def run(self, variant: Variant, threads: int = 1, rows: slice = slice(None)) -> np.ndarray:
        """[rows, fold, out width] as stored."""
        d = self.d
        x, chosen = (self.x, self.logit_rows[rows]) if d.gather else (self.x[rows], self.logit_rows[rows])
        width = d.swiglu or d.n
        out = Buffer((len(chosen), d.fold, width), arrays.STORED[d.out_dtype])
        weight = arrays.tiles(self.weight, d.dtype)
        arguments = {
            "x": Buffer(x.shape, x.dtype, x),
            "weight": Buffer(weight.shape, weight.dtype, weight),
            "bias": Buffer((arrays.round_up(d.bias, 16),), np.float32, arrays.padded_rows(self.bias)),
            "out": out,
        }
        batch = {"num_tokens": len(x) if d.rows == "L" else len(chosen), "logit_rows": chosen}
        call(self.name, variant, batch, arguments, threads)
        return out.array

    def product(self) -> tuple[np.ndarray, np.ndarray]:
        """(float64 product and bias, sum of the absolute values of its terms)."""
        x = arrays.values(self.x[self.logit_rows] if self.d.gather else self.x, self.d.dtype)
        weight = arrays.values(self.weight, self.d.dtype)
        bias = np.resize(self.bias, (self.d.fold, self.d.n)) if self.d.bias else 0
        return x @ weight.T + bias, np.abs(x) @ np.abs(weight).T + np.abs(bias)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """(float64 result, its tolerance before rounding to out_dtype)."""
        y, scale = self.product()
        tolerance = scale * 2.0**-20
        if self.d.swiglu:
            tiles = y.reshape(*y.shape[:-1], -1, 2, 16)
            gate, up = (tiles[..., i, :].reshape(*y.shape[:-1], -1)[..., : self.d.swiglu] for i in (0, 1))
            tolerance = tolerance.max() * (2 + np.abs(gate) + np.abs(up))
            y = gate / (1 + np.exp(-gate)) * up
        return y, tolerance + (np.abs(y) * 2.0**-8 if self.d.out_dtype == "bf16" else 0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_near_float64(name: str, variant: Variant) -> None:
    problem = Problem(name, 37)
    wanted, tolerance = problem.expected()
    found = arrays.values(problem.run(variant), problem.d.out_dtype)
    assert (np.abs(found - wanted) <= tolerance).all()


@pytest.mark.parametrize("name", CASES)
def test_same_bits_on_every_target_and_any_threads(name: str) -> None:
    for rows in ROWS:
        problem = Problem(name, rows, seed=rows)
        wanted = problem.run(BASE).tobytes()
        for variant in VARIANTS:
            for threads in (1, 7) if rows < 40 else (2, 3):
                found = problem.run(variant, threads)
                assert found.tobytes() == wanted, f"{rows} rows, {threads} threads, {variant}"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_row_does_not_depend_on_others(name: str, variant: Variant) -> None:
    problem = Problem(name, 45, seed=7)
    whole = problem.run(variant)
    for rows in (slice(0, 1), slice(1, 3), slice(10, 22), slice(44, 45), slice(5, 40)):
        assert problem.run(variant, rows=rows).tobytes() == whole[rows].tobytes()


@pytest.mark.parametrize("scale", [1e-18, 3e-19, 1e-38])
@pytest.mark.parametrize("name", ["linear-odd", "linear-f32"])
def test_denormals_are_flushed_alike(name: str, scale: float) -> None:
    """Products, chains and sums around the least normal number; operands that are denormal themselves."""
    problem = Problem(name, 20, seed=11)
    dtype = problem.d.dtype
    problem.x = arrays.stored(arrays.values(problem.x, dtype) * scale, dtype)
    problem.weight = arrays.stored(arrays.values(problem.weight, dtype) * min(scale, 1e-19), dtype)
    wanted = problem.run(BASE)
    tiny = (wanted != 0) & (np.abs(wanted) < np.finfo(np.float32).tiny)
    assert not tiny.any()
    for variant in VARIANTS:
        assert problem.run(variant).tobytes() == wanted.tobytes(), variant


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nothing_wanted(variant: Variant) -> None:
    problem = Problem("linear-gather", 3)
    assert problem.run(variant, rows=slice(0, 0)).size == 0


def test_order_of_arithmetic() -> None:
    """ARCHITECTURE.md, rule 3, in numpy: a bf16 product is exact in f32, and a float64 sum of two f32
    rounds once to f32 but in halfway cases that these values do not meet."""
    problem = Problem("linear-odd", 5)
    d = problem.d
    k = arrays.round_up(d.k, 32)
    x = np.pad(arrays.from_bf16(problem.x[:, 0]), ((0, 0), (0, k - d.k))).astype(np.float64)
    weight = np.pad(arrays.from_bf16(problem.weight), ((0, 0), (0, k - d.k))).astype(np.float64)
    total = np.zeros((len(x), d.n), np.float32)
    for chunk in range(0, k, 32):
        chains = [np.zeros_like(total), np.zeros_like(total)]
        for i in range(32):
            term = x[:, chunk + i, None] * weight[None, :, chunk + i]
            chains[i % 2] = (term + chains[i % 2]).astype(np.float32)
        total = total + (chains[0] + chains[1])
    assert problem.run(BASE)[:, 0].tobytes() == total.tobytes()
