"""Every Triton kernel against float64 in Triton's interpreter: triton_arrays.py, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
KINDS = (
    "embed",
    "gather_rows",
    "rms_norm",
    "linear",
    "qkv_write",
    "attention",
    "elementwise",
    "route",
    "sort_routes",
    "experts",
    "head_linear",
    "latent_write",
    "latent_attention",
)
FIRST = int(os.environ.get("TS_TRITON_SEED", "0"))  # `make test-gpu` goes on where `make test` ends
CASES = int(os.environ.get("TS_TRITON_CASES", "2"))  # of each kind


@cache
def results() -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / "triton_arrays.py"), str(FIRST), str(CASES)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind: str) -> None:
    """Outputs were NaN before, and rows that the step has not still are; guards are whole; inputs as they
    were."""
    of_kind = [result for result in results() if result["kind"] == kind]
    wrong = [f"seed {r['seed']}: {r['desc']}, {r['rows']}: {r['error']}" for r in of_kind if "error" in r]
    assert not wrong, "\n".join(wrong)
    assert [r["seed"] for r in of_kind] == list(range(FIRST, FIRST + CASES))


def test_no_kind_is_left_out() -> None:
    assert {result["kind"] for result in results()} == set(KINDS)
