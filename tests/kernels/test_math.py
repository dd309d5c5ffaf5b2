"""exp: one polynomial, within an ulp, the same bits on every target."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from kernel_harness import BASE, VARIANTS, Variant, libraries


def exp(x: np.ndarray, variant: Variant) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    assert len(x) % 16 == 0
    y = np.empty_like(x)
    libraries()[variant].run_exp(
        x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(x))
    )
    return y


POINTS = np.concatenate(
    [
        np.linspace(-87.33, 88.72, 160_000),
        np.random.default_rng(1).standard_normal(160_000),
        np.random.default_rng(2).uniform(-1e-3, 1e-3, 16_000),
    ]
).astype(np.float32)


def test_within_an_ulp() -> None:
    wanted = np.exp(POINTS.astype(np.float64))
    ulp = np.spacing(wanted.astype(np.float32)).astype(np.float64)
    assert (np.abs(exp(POINTS, BASE) - wanted) / ulp).max() < 1.0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_special_values(variant: Variant) -> None:
    x = np.array(
        [0.0, -0.0, np.inf, -np.inf, -87.4, -1e30, 88.8, 1e30, 1e-40, -1e-40, *[1.0] * 6], np.float32
    )
    wanted = [1, 1, np.inf, 0, 0, 0, np.inf, np.inf, 1, 1]
    assert exp(x, variant)[:10].tolist() == wanted
    assert np.isnan(exp(np.full(16, np.nan, np.float32), variant)).all()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_same_bits(variant: Variant) -> None:
    assert exp(POINTS, variant).tobytes() == exp(POINTS, BASE).tobytes()
