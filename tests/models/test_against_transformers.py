"""The whole path against transformers: random checkpoints of every kind that the families have, compiled,
and run by the real engine. float32 plans within 1e-4 of float32 transformers, with the same greedy
continuations; bf16 plans no further from it than transformers' own bf16 is."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import plans
import pytest
import torch
from checkpoints import SPECS
from engine import Answer, Engine, Request

MAX_NEW = 64


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More only cost time with models so small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """A checkpoint of float32 weights, and transformers' model of it."""

    name: str
    folder: Path
    model: Any


@pytest.fixture(scope="module", params=SPECS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    spec = SPECS[request.param]
    folder = checkpoints.make(spec, tmp_path_factory.mktemp(request.param))
    return Case(request.param, folder, checkpoints.reference(spec))


def prompts(vocab_size: int) -> list[list[int]]:
    """One token; a page and its neighbours; past every window."""
    rng = np.random.default_rng(3)
    return [rng.integers(1, vocab_size, size=length).tolist() for length in (1, 5, 31, 64, 65, 150)]


def reference_logprobs(model: Any, tokens: list[int]) -> np.ndarray:
    """[len(tokens), vocab] float64: of what follows each token."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits.double(), -1).numpy()


def engine_logprobs(answer: Answer, vocab_size: int) -> np.ndarray:
    """[tokens of the answer, vocab]: of what the engine thought likely at each."""
    result = np.full((len(answer.tokens), vocab_size), np.nan)
    for row, (tokens, logprobs) in enumerate(answer.top):
        assert len(tokens) == vocab_size
        assert logprobs == sorted(logprobs, reverse=True)
        result[row, tokens] = logprobs
    assert not np.isnan(result).any()
    return result


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Without transformers' own end-of-sequence and sampling rules."""
    tokens = list(prompt)
    past = None
    step = torch.tensor([tokens])
    with torch.no_grad():
        for _ in range(count):
            out = model(step, past_key_values=past, use_cache=True)
            past = out.past_key_values
            tokens.append(int(out.logits[0, -1].argmax()))
            step = torch.tensor([tokens[-1:]])
    return tokens[len(prompt) :]


def test_float32(case: Case, tmp_path: Path) -> None:
    vocab_size = case.model.config.vocab_size
    plan = plans.build(case.folder, tmp_path / "plan.tsp", "f32")
    asked = [
        Request(prompt, max_tokens=MAX_NEW, ignore_eos=True, num_logprobs=vocab_size)
        for prompt in prompts(vocab_size)
    ]
    with Engine(plan) as engine:
        answers = engine.generate(asked)
    for request, answer in zip(asked, answers, strict=True):
        prompt = list(request.prompt)
        assert answer.finish == "length"
        wanted = reference_logprobs(case.model, prompt + answer.tokens)[len(prompt) - 1 : -1]
        found = engine_logprobs(answer, vocab_size)
        worst = np.abs(found - wanted).max() / np.abs(wanted).max()
        assert worst < 1e-4, (
            f"prompt of {len(prompt)}: log probabilities differ by {worst:.2e} of the largest"
        )
        # a choice that hangs on the last bits would prove nothing: pick another seed
        best = np.sort(wanted, axis=-1)[:, -2:]
        assert (best[:, 1] - best[:, 0]).min() > 1e-4, "two tokens are nearly as likely: change the seed"
        assert answer.tokens == wanted.argmax(-1).tolist()
    # so each token is what transformers would have chosen; once, let it choose
    assert answers[1].tokens == greedy(case.model, list(asked[1].prompt), MAX_NEW)


def test_bf16(case: Case, tmp_path: Path) -> None:
    """The root mean square error over all prompts and positions, ours against transformers' own in bf16.
    Where scores are sigmoids, which lie close, rounding now and then changes the choice of an expert,
    theirs or ours, and the few tokens after such a jump would be all that a mean square counts: there, the
    median."""
    vocab_size = case.model.config.vocab_size
    plan = plans.build(case.folder, tmp_path / "plan.tsp", "bf16")
    rounded = checkpoints.reference(SPECS[case.name]).to(torch.bfloat16)
    asked = [
        Request(prompt, max_tokens=8, ignore_eos=True, num_logprobs=vocab_size)
        for prompt in prompts(vocab_size)
    ]
    with Engine(plan) as engine:
        answers = engine.generate(asked)
    ours, theirs = [], []
    for request, answer in zip(asked, answers, strict=True):
        tokens, first = [*request.prompt, *answer.tokens], len(request.prompt) - 1
        exact = reference_logprobs(case.model, tokens)[first:-1]
        ours.append(engine_logprobs(answer, vocab_size) - exact)
        theirs.append(reference_logprobs(rounded, tokens)[first:-1] - exact)
    config = case.model.config
    jumps = config.model_type == "deepseek_v3" and config.first_k_dense_replace < config.num_hidden_layers
    mean = np.median if jumps else np.mean
    error, allowed = (float(np.sqrt(mean(np.square(np.concatenate(x))))) for x in (ours, theirs))
    assert error <= allowed, f"error {error:.4f}, transformers' own bf16 {allowed:.4f}"
