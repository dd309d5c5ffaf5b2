"""Sliding windows through the real engine: layers that see a window hold no more pages than it and a chunk
take, and answers are those of an engine that has room for everything, and transformers'."""

from __future__ import annotations

import math
from pathlib import Path

import plans
import pytest
import torch
from checkpoints import SPECS, reference
from engine import Engine, EngineError, Request
from test_rank_tokens import ranks_of

from tscompile.kernels.host import best_target
from tscompile.reader import Plan

SIZES = {"page_size": 32, "max_tokens": 64, "max_seqs": 4}
# The groups, and the pages that a request of 316 tokens takes in steps of 32: ten, where all is kept.
CASES = {
    "mistral-window": ([{"kind": "window", "window": 40}], 4),
    "qwen3-some-layers-windowed": ([{"kind": "full"}, *[{"kind": "window", "window": 48}] * 2], 10 + 4 + 4),
}


def asked() -> list[Request]:
    """Of 316 tokens and fewer; some begin alike."""
    generator = torch.Generator().manual_seed(11)
    long = torch.randint(1, 500, (300,), generator=generator).tolist()
    other = torch.randint(1, 500, (90,), generator=generator).tolist()
    prompts = [long, long[:160] + other, other, long[:1], long[:64]]
    return [Request(prompt, max_tokens=16, ignore_eos=True, num_logprobs=3) for prompt in prompts]


@pytest.mark.parametrize("name", CASES)
def test_memory_is_the_windows(name: str, tmp_path: Path) -> None:
    groups, num_pages = CASES[name]
    model = reference(SPECS[name])
    model.save_pretrained(tmp_path)
    path = plans.build(tmp_path, tmp_path / "plan.tsp", **SIZES)
    assert Plan(path).json(f"tsp/program/{best_target()}")["kv"]["groups"] == groups
    with Engine(path, num_threads=1, prefix_cache=False) as engine:
        answers = [engine.generate([request])[0] for request in asked()]
    wanted = [answer.output for answer in answers]
    tokens = [*asked()[0].prompt, *answers[0].tokens]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    assert logits[299:-1].argmax(-1).tolist() == answers[0].tokens
    for options in ({"num_pages": num_pages}, {"num_pages": 3 * num_pages}, {"max_draft": 4}):
        with Engine(path, token_budget=32, **options) as engine:
            assert [answer.output for answer in engine.generate(asked())] == wanted
            again = engine.generate(asked())
            assert [answer.output for answer in again] == wanted
            stats = engine.stats()
            assert stats.num_pages_free + stats.num_pages_cached == stats.num_pages
    assert again[1].num_cached == 224, "with room, all pages that are full"
    with (
        Engine(path, token_budget=32, num_pages=num_pages - 1) as engine,
        pytest.raises(EngineError, match=f"need {num_pages} KV pages of 32 tokens"),
    ):
        engine.submit(asked()[0])


@pytest.mark.parametrize("mesh", [{"dp": 2}, {"tp": 2, "pp": 2}])
def test_groups_over_ranks(mesh: dict[str, int], tmp_path: Path) -> None:
    reference(SPECS["qwen3-some-layers-windowed"]).save_pretrained(tmp_path)
    with Engine(plans.build(tmp_path, tmp_path / "1.tsp", **SIZES), num_threads=1) as engine:
        wanted = [answer.tokens for answer in engine.generate(asked())]
    path = plans.build(tmp_path, tmp_path / "ranks.tsp", **SIZES, **mesh)
    with ranks_of(path, math.prod(mesh.values()), num_pages=30) as engine:
        for _ in range(2):
            assert [answer.tokens for answer in engine.generate(asked())] == wanted
        assert engine.stats().num_cached_tokens > 0
