"""Builds plans of test checkpoints through the whole pipeline."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints import Spec

from tscompile import models, pipeline
from tscompile.build import Options
from tscompile.ir import Value
from tscompile.kernels.host import best_target
from tscompile.placement import Placement
from tscompile.price import Prices, collective_of
from tscompile.reader import Plan
from tscompile.topology import Algorithm, Link

ALL_TARGETS = ("cpu-avx2", "cpu-avx512", "cpu-amx")

# What runs on 1, 2 and 4 ranks: with 4, KV heads are repeated, and the vocabulary is padded.
_RANKED = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "vocab_size": 333}
RANKED = {
    "llama": Spec("llama", {**_RANKED, "tie_word_embeddings": True}),
    "mistral": Spec("mistral", {**_RANKED, "sliding_window": 24, "head_dim": 32}),
    "qwen3": Spec("qwen3", {**_RANKED, "head_dim": 32, "attention_bias": True}),
}


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


def launches(path: Path) -> list[dict[str, Any]]:
    """Of this machine's best target, of steps of any number of tokens."""
    buckets = Plan(path).json(f"tsp/program/{best_target()}")["buckets"]
    return [launch for bucket in buckets for launch in bucket["launches"]]


def prices(base_s: float, bytes_per_s: float, *, tokens: int = 64) -> Prices:
    """A CPU's, with other links, which move bytes while it computes."""
    found = Prices.of("cpu-avx2", tokens)
    link = Link(bytes_per_s, (Algorithm("ring", base_s, 0.0),), frozenset({"base", "bytes"}))
    machine = replace(found.topology, host=link, launch_s=0.0)
    return replace(found, topology=machine)


class RowsFree(Prices):
    """Rows of experts cost nothing to move."""

    def move(self, value: Value, source: Placement, target: Placement, ranks: int, parts: int = 1) -> float:
        cost = super().move(value, source, target, ranks, parts)
        free = collective_of(source, target) == "ragged_all_to_all" and cost < math.inf
        return 0.0 if free else cost


def rows_free() -> Prices:
    """Such that tokens are sharded where they are routed, and each route's row goes to the rank of its expert
    and back."""
    found = prices(1e-13, 1e11, tokens=512)
    return RowsFree(found.topology, found.sizes)
