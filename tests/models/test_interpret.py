"""The captured and the fused graph, interpreted, against transformers in float32: prefill, and token by
token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SPECS, Spec, reference

from tscompile import models, pipeline
from tscompile.build import Build, Options
from tscompile.checkpoint import Checkpoint
from tscompile.interpret import Interpreter, Sequences

PAGE_SIZE, NUM_SLOTS = 32, 1024
TOLERANCE = 1e-4  # relative to the largest logit
BEFORE_FUSE = pipeline.ALL[: pipeline.ALL.index("fuse")]


def captured(folder: Path, passes: tuple[str, ...] = pipeline.BEFORE_SELECT, **options: Any) -> Build:
    """A build of the checkpoint in `folder`, after `passes`."""
    model = options.pop("model", None) or models.find_for(folder)
    chosen = Options(model, folder, page_size=PAGE_SIZE, **{"dtype": "f32", **options})
    build = Build(chosen, Checkpoint(folder), chosen.mesh)
    pipeline.run(build, passes)
    return build


def logits(build: Build, tokens: list[int], chunks: list[int]) -> torch.Tensor:
    """[chunks, vocab]: the last token's after each chunk of `tokens`, with another sequence in the same
    batches."""
    interpreter = Interpreter(build.graph, build.checkpoint.read, NUM_SLOTS, build.mesh)
    sequences, rows, at = Sequences(PAGE_SIZE, NUM_SLOTS), [], 0
    for chunk in chunks:
        batch = sequences.batch({"other": tokens[at : at + 2], "ours": tokens[at : at + chunk]})
        rows.append(interpreter.run(batch)[0][0][1])
        at += chunk
    return torch.stack(rows)


def wanted(model: Any, tokens: list[int], chunks: list[int]) -> torch.Tensor:
    ends = torch.tensor(chunks).cumsum(0) - 1
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0][ends].float()


def saved(spec: Spec, folder: Path) -> Any:
    model = reference(spec)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", SPECS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    model = saved(SPECS[name], tmp_path)
    chunks = [50, 1, 1, 17, 1, 30, 1]  # beyond every window and the first page
    tokens = torch.randint(SPECS[name].config.get("vocab_size", 500), (sum(chunks),)).tolist()
    expected = wanted(model, tokens, chunks)
    for passes in (BEFORE_FUSE, pipeline.BEFORE_SELECT):
        found = logits(captured(tmp_path, passes), tokens, chunks)
        assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE, passes[-1]
