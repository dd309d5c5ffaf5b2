"""Sampling through the C ABI, against arithmetic in numpy on the engine's own log probabilities."""

from collections import Counter
from collections.abc import Iterator

import checkpoints
import numpy as np
import plans
import pytest
import torch
from checkpoints import Spec
from engine import Answer, Engine, Request
from transformers import RepetitionPenaltyLogitsProcessor

VOCAB = 67
SPEC = Spec("llama", {"vocab_size": VOCAB, "num_hidden_layers": 1, "hidden_size": 32, "head_dim": 32})
PROMPT = [5, 17, 23, 5]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("sampling")
    checkpoints.make(SPEC, folder / "checkpoint")
    plan = plans.build(folder / "checkpoint", folder / "plan.tsp", "f32")
    with Engine(plan, num_threads=1) as running:
        yield running


def ask(engine: Engine, **options: object) -> Answer:
    given = {"prompt": PROMPT, "max_tokens": 40, "ignore_eos": True, "num_logprobs": VOCAB, **options}
    return engine.generate([Request(**given)])[0]  # type: ignore[arg-type]


def rows(answer: Answer) -> np.ndarray:
    """[output tokens, VOCAB] log probabilities."""
    result = np.empty((len(answer.tokens), VOCAB))
    for row, (tokens, logprobs) in enumerate(answer.top):
        result[row, tokens] = logprobs
    return result


def test_logprobs_are_a_distribution(engine: Engine) -> None:
    answer = ask(engine, temperature=1.5, seed=3)
    assert np.allclose(np.exp(rows(answer)).sum(-1), 1, atol=1e-5)
    own = rows(answer)[range(40), answer.tokens]
    assert own.tolist() == answer.logprobs
    few = ask(engine, temperature=1.5, seed=3, num_logprobs=3)
    assert few.tokens == answer.tokens
    assert [t[:3] for t, _ in answer.top] == [t for t, _ in few.top]
    none = ask(engine, temperature=1.5, seed=3, num_logprobs=-1)
    assert none.tokens == answer.tokens
    assert none.top == [([], [])] * 40


def test_greedy_takes_the_most_likely(engine: Engine) -> None:
    answer = ask(engine)
    assert rows(answer).argmax(-1).tolist() == answer.tokens
    assert ask(engine, temperature=1.0, top_k=1, seed=9).tokens == answer.tokens


@pytest.mark.parametrize("penalty", [1.2, 2.0, 0.7])
def test_repetition_penalty_is_transformers(engine: Engine, penalty: float) -> None:
    """It wants logits, where the engine tells log probabilities only: they come from transformers' model."""
    model, tokens = checkpoints.reference(SPEC), list(PROMPT)
    answer = ask(engine, repetition_penalty=penalty)
    penalise = RepetitionPenaltyLogitsProcessor(penalty)
    for token in answer.tokens:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logits = penalise(ids, model(ids).logits[:, -1])
        assert int(logits.argmax()) == token
        tokens.append(token)
    assert answer.tokens != ask(engine).tokens


def test_presence_and_frequency_penalties_are_openais(engine: Engine) -> None:
    answer = ask(engine, presence_penalty=0.6, frequency_penalty=0.3)
    for position, (token, logits) in enumerate(zip(answer.tokens, rows(answer), strict=True)):
        for seen, count in Counter(answer.tokens[:position]).items():
            logits[seen] -= 0.6 + 0.3 * count
        assert int(logits.argmax()) == token


def test_logit_bias(engine: Engine) -> None:
    assert set(ask(engine, logit_bias=[(7, 1e4)]).tokens) == {7}
    best = ask(engine).tokens[0]
    answer = ask(engine, logit_bias=[(best, -50.0)], max_tokens=1)
    logits = rows(answer)[0]
    logits[best] -= 50
    assert answer.tokens == [int(logits.argmax())]


def expected(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """[VOCAB] probabilities by transformers' rules, in the order of csrc/sampler.h."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    kept = order[: top_k or VOCAB]
    mass = np.cumsum(p[kept]) / p[kept].sum()
    kept = kept[: int(np.searchsorted(mass, top_p)) + 1]
    kept = kept[p[kept] >= min_p * p.max()]
    result = np.zeros(VOCAB)
    result[kept] = p[kept] / p[kept].sum()
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.6},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.7, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_draws_follow_the_distribution(engine: Engine, options: dict[str, float]) -> None:
    """4,000 seeds on one prompt. Tokens of no probability are never drawn; the rest pass a chi-square
    test."""
    count = 4000
    asked = [
        Request(PROMPT, max_tokens=1, ignore_eos=True, seed=seed, **options)  # type: ignore[arg-type]
        for seed in range(count)
    ]
    drawn = Counter(
        answer.tokens[0]
        for start in range(0, count, 500)
        for answer in engine.generate(asked[start : start + 500])
    )
    full = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    wanted = count * expected(rows(ask(engine, max_tokens=1))[0], **full)  # type: ignore[arg-type]
    assert set(drawn) <= set(np.nonzero(wanted)[0].tolist())
    large = [token for token in range(VOCAB) if wanted[token] >= 5]
    chi_square = sum((drawn[token] - wanted[token]) ** 2 / wanted[token] for token in large)
    # mean k, deviation sqrt(2 k): five deviations
    assert chi_square < len(large) + 5 * np.sqrt(2 * len(large))
