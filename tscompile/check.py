"""`build --verify`: the user's own model, run as captured on one rank and as fused on every rank, on random
tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tscompile.build import Build
from tscompile.errors import InternalError
from tscompile.interpret import Interpreter, Sequences
from tscompile.mesh import Mesh
from tscompile.passes import capture, precision, propagate, reshard

TOLERANCE = {"f32": 1e-4, "bf16": 3e-2}  # relative to the largest logit: sums are taken in another order
PROMPT, STEPS = 12, 3


def verify_build(build: Build) -> dict[str, Any]:
    """Compares logits of a prompt and some steps after it. The largest difference relative to the largest
    logit, by the tolerance it was held to. InternalError if it is larger: a pass has changed the model."""
    one = dataclasses.replace(build, mesh=Mesh(), receipts=[])
    for step in (capture, precision, propagate, reshard):
        step.run(one)
    expected = _logits(one, Mesh())[0]
    worst = 0.0
    for logits in _logits(build, build.mesh):
        found = logits[:, : expected.shape[1]]  # beyond it lies what pads the vocabulary
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    tolerance = TOLERANCE[build.options.dtype]
    if not worst <= tolerance:
        raise InternalError(
            f"--verify: logits differ by {worst:.1e} of the largest, wanted at most {tolerance:.0e}"
        )
    return {"max_difference": worst, "tolerance": tolerance, "ranks": build.mesh.num_ranks}


def _logits(build: Build, mesh: Mesh) -> list[torch.Tensor]:
    """Of a prompt and STEPS more tokens, [1 + STEPS, vocab], a tensor a rank."""
    assert build.model is not None
    page_size = build.options.page_size
    num_slots = 4 * page_size
    tokens = torch.randint(
        build.model.vocab_size, (PROMPT + STEPS,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    tokens = tokens[: build.model.max_context]
    interpreter, sequences = (
        Interpreter(build.graph, build.checkpoint.read, num_slots, mesh),
        Sequences(page_size, num_slots),
    )
    chunks = [tokens[:PROMPT], *([token] for token in tokens[PROMPT:])]
    steps = [interpreter.run(sequences.batch({"a": chunk})) for chunk in chunks]
    return [torch.cat([step[rank][0] for step in steps]) for rank in range(mesh.num_ranks)]
