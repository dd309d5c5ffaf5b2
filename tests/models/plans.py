"""Builds plans of test checkpoints through the whole pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tscompile import models, pipeline
from tscompile.build import Options

ALL_TARGETS = ("cpu-avx2", "cpu-avx512", "cpu-amx")


def build(
    checkpoint: Path, out: Path, dtype: str = "f32", targets: tuple[str, ...] = (), **options: Any
) -> Path:
    """The plan at `out`. targets: () for this machine's best. Without text unless no_text=False is given: it
    has its own tests."""
    options = {"no_text": True, **options}
    model = options.pop("model", None) or models.find_for(checkpoint)
    pipeline.compile_plan(
        Options(model=model, weights=checkpoint, out=out, dtype=dtype, targets=targets, **options),
        lambda _: None,
    )
    return out
