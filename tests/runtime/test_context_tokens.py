"""Plans whose ranks share each sequence's context out answer as a plan of one rank does, whatever is beside a
request in the batch, however its prompt was chunked and whether its prefix was cached."""

from __future__ import annotations

import math
from pathlib import Path

import plans
import pytest
import torch
from checkpoints import SPECS, reference
from engine import Engine, Request
from test_rank_tokens import ranks_of

from tscompile.kernels.host import best_target
from tscompile.reader import Plan

PAGE = 32  # tokens of a page that a rank holds


def prompts_of(seed: int) -> list[list[int]]:
    """Some that begin in a page and some that end several later, one that goes on where another ends."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (150, 37, 5, 1, 64, 65, 128)
    prompts = [torch.randint(500, (length,), generator=generator).tolist() for length in lengths]
    return [*prompts, prompts[0] + prompts[1]]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama-gqa-tied", {"cp": 2}),
        ("mistral-window", {"tp": 2, "cp": 2}),
        ("llama-mha", {"pp": 2, "cp": 2}),
        ("qwen3-bias-odd-vocab", {"cp": 3}),
        ("qwen3-moe", {"ep": 2, "cp": 2}),
        ("deepseek-routed", {"dp": 2, "cp": 2}),
    ],
)
def test_contexts_over_ranks(name: str, mesh: dict[str, int], tmp_path: Path) -> None:
    reference(SPECS[name]).save_pretrained(tmp_path)
    sizes = {"page_size": PAGE, "max_tokens": 48, "max_seqs": 6}  # so long prompts come in chunks
    asked = [Request(prompt, max_tokens=16, ignore_eos=True) for prompt in prompts_of(3)]
    with Engine(plans.build(tmp_path, tmp_path / "1.tsp", **sizes), num_threads=1) as engine:
        wanted = [answer.tokens for answer in engine.generate(asked)]
    path = plans.build(tmp_path, tmp_path / "several.tsp", **sizes, **mesh)
    page_size = PAGE * mesh["cp"]
    program = Plan(path).json(f"tsp/program/{best_target()}")
    assert program["limits"]["page_size"] == page_size
    with ranks_of(path, math.prod(mesh.values()), num_pages=8) as engine:
        assert [answer.tokens for answer in engine.generate(asked)] == wanted
        assert engine.stats().page_size == page_size
        before = engine.stats().num_cached_tokens
        again = engine.generate(asked[::-1])[::-1]
        assert [answer.tokens for answer in again] == wanted
        assert engine.stats().num_cached_tokens > before  # pages that lie on all of them were found again


def test_bits_do_not_depend_on_company_chunks_or_guesses(tmp_path: Path) -> None:
    """Tokens and log probabilities, bit for bit, of one cp plan: alone and beside others, with any threads,
    with a cached prefix, and with tokens guessed from what repeats."""
    reference(SPECS["llama-gqa-tied"]).save_pretrained(tmp_path)
    long = prompts_of(5)[0]
    repeating = (long[:20] * 8)[:150]
    asked = [
        Request(prompt, max_tokens=24, ignore_eos=True, num_logprobs=5)
        for prompt in (long, repeating, long[:70], long[:1])
    ]
    path = plans.build(tmp_path, tmp_path / "plan.tsp", page_size=PAGE, cp=2, max_tokens=512)
    found = []
    for options in ({"token_budget": 16, "max_seqs": 4}, {"num_threads": 2, "max_draft": -4}):
        with ranks_of(path, 2, **options) as engine:
            together = engine.generate(asked)
            alone = [engine.generate([request])[0] for request in asked]
            drafted = engine.stats().num_drafted_tokens
        assert (drafted > 0) == ("max_draft" in options)
        found += [[answer.output for answer in answers] for answers in (together, alone)]
    assert all(answers == found[0] for answers in found[1:])
