"""Builds plans of test checkpoints through the whole pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints import Spec

from tscompile import models, pipeline
from tscompile.build import Options
from tscompile.kernels.host import best_target
from tscompile.price import Prices
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


def prices(
    base_s: float, bytes_per_s: float, *, sharded: bool = False, rows_moved: bool = False, tokens: int = 64
) -> Prices:
    """A CPU's, with other links. sharded: whether tokens may be. rows_moved: whether rows of experts may."""
    found = Prices.of("cpu-avx2", tokens)
    link = Link(bytes_per_s, (Algorithm("ring", base_s, 0.0),))
    machine = replace(found.topology, host=link, launch_s=0.0, tokens_sharded=sharded, rows_moved=rows_moved)
    return replace(found, topology=machine)
