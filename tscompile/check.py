"""`build --verify`: the user's own model, run as captured on one rank and as fused on every rank, on random
tokens."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from torch import Tensor

from tscompile.build import Build
from tscompile.errors import InternalError
from tscompile.interpret import Batch, Interpreter, Sequences
from tscompile.mesh import Mesh
from tscompile.passes import capture, precision, propagate, reshard

TOLERANCE = {"f32": "1e-4", "bf16": "3e-2"}  # relative to the largest logit: sums are taken in another order
SEED, STEPS, NUM_PAGES = 0, 5, 16


def verify_build(build: Build) -> tuple[dict[str, Any], float]:
    """Compares the logits of random steps, each run by the graph of every bucket: (what the plan keeps as
    "tsp/verify", the largest difference relative to the largest logit). InternalError, which names the step
    and the rank, if it is beyond the tolerance: a pass has changed the model."""
    assert build.model is not None
    page_size, max_context = build.options.page_size * build.mesh.num_parts, build.model.max_context
    options = dataclasses.replace(build.options, page_size=page_size)
    one = dataclasses.replace(build, options=options, mesh=Mesh(), smaller={}, receipts=[], notes=[])
    for step in (capture, precision, propagate, reshard):
        step.run(one)
    batches = random_steps(build.mesh, build.model.vocab_size, page_size, max_context)
    num_slots = build.mesh.num_owners * NUM_PAGES * page_size
    captured = Interpreter(one.graph, build.checkpoint.read, num_slots)
    expected = [captured.run(batch)[0][0] for batch in batches]  # [L, vocab_size] each
    worst = 0.0
    for tokens, graph in build.buckets.items():
        found = Interpreter(graph, build.checkpoint.read, num_slots, build.mesh)
        for number, (batch, wanted) in enumerate(zip(batches, expected, strict=True), 1):
            where = f"step {number} of {len(batches)}, {len(batch.token_ids)} tokens, as of up to {tokens}"
            worst = max(worst, difference(build, found.run(batch), wanted, where))
    report = {
        "verified": True,
        "ranks": build.mesh.num_ranks,
        "buckets": list(build.buckets),
        "seed": SEED,
        "steps": len(batches),
        "tokens": sum(len(batch.token_ids) for batch in batches),
        "logits": sum(len(batch.logit_rows) for batch in batches),
        "tolerance": TOLERANCE[build.options.dtype],
    }
    return report, worst


def difference(build: Build, ranks: list[list[Tensor]], wanted: Tensor, step: str) -> float:
    """The largest of any rank's logits, relative to the largest logit; InternalError beyond the tolerance."""
    tolerance, worst = TOLERANCE[build.options.dtype], 0.0
    scale = float(wanted.abs().max()) or 1.0
    for rank, outputs in enumerate(ranks):
        if not outputs:  # of a later stage
            continue
        # a vocabulary that was padded for the ranks is wider
        differs = float((outputs[0][:, : wanted.shape[1]] - wanted).abs().max()) / scale
        if not differs <= float(tolerance):
            raise InternalError(
                f"--verify: in {step}, the logits of rank {rank} of {build.mesh} differ by {differs:.1e} of "
                f"the largest, wanted at most {tolerance}"
            )
        worst = max(worst, differs)
    return worst


def random_steps(mesh: Mesh, vocab_size: int, page_size: int, max_context: int) -> list[Batch]:
    """Steps of three sequences that begin one after the other: prompts, chunks and single tokens mixed. No
    step's number of tokens divides by the ranks."""
    rng, ranks, owners = random.Random(SEED), mesh.num_ranks, mesh.num_owners
    sequences = Sequences(page_size, owners * NUM_PAGES * page_size, owners)
    left = dict.fromkeys("abc", min(max_context, 4 * page_size))
    batches = []
    for step in range(STEPS):
        counts = {}
        for name in list(left)[: step + 1]:
            # the newest brings a prompt, the others a token, or a chunk of their prompt
            most = min(left[name], rng.choice((1, 1, 7)) if name in sequences.length else page_size + 9)
            counts[name] = rng.randint(1, most) if most else 0
        counts = {name: count for name, count in counts.items() if count}
        while ranks > 1 and sum(counts.values()) % ranks == 0:
            name = next((name for name in counts if counts[name] < left[name]), "")
            if not name:
                break
            counts[name] += 1
        if not counts:
            break
        for name, count in counts.items():
            left[name] -= count
        tokens = {name: [rng.randrange(vocab_size) for _ in range(n)] for name, n in counts.items()}
        batches.append(sequences.batch(tokens))
    return batches
