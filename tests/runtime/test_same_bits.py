"""The promise: for one plan, a request's output is the same to the last bit, whatever else is in the batch,
however the prompt was chunked, whether its prefix was cached, with any number of threads, preempted or not,
and on any of the CPU targets."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import checkpoints
import numpy as np
import plans
import pytest
from checkpoints import SPECS
from engine import Answer, Engine, EngineError, Request

# Small, but with every kernel in it: qk-norm, a window, sizes that fill no tile, a bias.
MODELS = {
    "deepseek-bf16": ("deepseek-routed", "bf16"),
    "qwen3-f32": ("qwen3-tied", "f32"),
    "qwen3-bf16": ("qwen3-gqa-8", "bf16"),
    "mistral-bf16": ("mistral-window", "bf16"),
    "llama-odd-bf16": ("llama-mqa-odd-sizes", "bf16"),
    "llama-biases-f32": ("llama-biases", "f32"),
    "qwen3-moe-bf16": ("qwen3-moe", "bf16"),
}
NUM_LOGPROBS = 5


@pytest.fixture(scope="module", params=MODELS)
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, dtype = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    checkpoints.make(SPECS[name], folder / "checkpoint")
    return plans.build(folder / "checkpoint", folder / "plan.tsp", dtype, plans.ALL_TARGETS, page_size=32)


def requests(vocab_size: int) -> list[Request]:
    """Sixteen: short and long, greedy and sampled, with every knob turned somewhere."""
    rng = np.random.default_rng(5)

    def prompt(length: int) -> list[int]:
        return [int(token) for token in rng.integers(1, vocab_size, size=length)]

    made = [Request(prompt(length), max_tokens=24) for length in (1, 2, 31, 32, 33, 64, 100, 200)]
    made += [
        Request(prompt(7), temperature=1.0, seed=1, max_tokens=30),
        Request(prompt(40), temperature=0.7, top_p=0.9, seed=2, max_tokens=30),
        Request(prompt(90), temperature=1.3, top_k=20, seed=3, max_tokens=20),
        Request(prompt(12), temperature=1.0, min_p=0.02, seed=4, max_tokens=20),
        Request(prompt(25), repetition_penalty=1.3, max_tokens=20),
        Request(
            prompt(50), presence_penalty=0.7, frequency_penalty=0.4, temperature=0.9, seed=5, max_tokens=20
        ),
        Request(prompt(3), logit_bias=[(5, 4.0), (9, -100.0)], temperature=1.0, seed=6, max_tokens=20),
        Request(prompt(130), temperature=0.8, top_p=0.95, top_k=50, min_p=0.01, seed=7, max_tokens=40),
    ]
    return [replace(request, num_logprobs=NUM_LOGPROBS, ignore_eos=True) for request in made]


def outputs(answers: list[Answer]) -> list[tuple[object, ...]]:
    for answer in answers:
        assert answer.finish == "length", answer.message
    return [answer.output for answer in answers]


@pytest.fixture(scope="module")
def asked(plan: Path) -> list[Request]:
    with Engine(plan, num_threads=1, num_pages=8) as engine:
        return requests(engine.stats().vocab_size)


@pytest.fixture(scope="module")
def alone(plan: Path, asked: list[Request]) -> list[tuple[object, ...]]:
    """Each by itself, on one thread, its prompt in one chunk, nothing cached: what all else must equal."""
    with Engine(plan, num_threads=1, prefix_cache=False) as engine:
        return outputs([answer for request in asked for answer in engine.generate([request])])


def test_in_a_batch_of_sixteen(plan: Path, asked: list[Request], alone: list[tuple[object, ...]]) -> None:
    with Engine(plan, prefix_cache=False) as engine:
        assert outputs(engine.generate(asked)) == alone
        assert engine.stats().num_steps < sum(len(tokens) for tokens, *_ in alone)  # type: ignore[misc, arg-type]


@pytest.mark.parametrize("budget", [1, 2, 7, 16, 31, 32, 33, 100])
def test_prompts_chunked(
    plan: Path, asked: list[Request], alone: list[tuple[object, ...]], budget: int
) -> None:
    with Engine(plan, token_budget=budget, max_seqs=min(budget, 16), prefix_cache=False) as engine:
        assert outputs(engine.generate(asked)) == alone


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
def test_any_number_of_threads(
    plan: Path, asked: list[Request], alone: list[tuple[object, ...]], threads: int
) -> None:
    with Engine(plan, num_threads=threads, prefix_cache=False) as engine:
        assert outputs(engine.generate(asked)) == alone


def test_prefixes_cached(plan: Path, asked: list[Request], alone: list[tuple[object, ...]]) -> None:
    with Engine(plan, prefix_cache=True) as engine:
        assert outputs(engine.generate(asked)) == alone
        again = engine.generate(asked)
        assert outputs(again) == alone
        whole_pages = [(len(request.prompt) - 1) // 32 * 32 for request in asked]
        assert [answer.num_cached for answer in again] == whole_pages


def test_preempted(plan: Path, asked: list[Request]) -> None:
    """They start within a page each and grow to four; there are nine."""
    growing = [replace(r, prompt=r.prompt[: 5 + i], max_tokens=100) for i, r in enumerate(asked)]
    with Engine(plan, num_threads=1, prefix_cache=False) as engine:
        alone = outputs([answer for request in growing for answer in engine.generate([request])])
    for prefix_cache, ahead in ((False, False), (True, False), (True, True)):
        with Engine(plan, num_pages=9, prefix_cache=prefix_cache, overlap_schedule=ahead) as engine:
            assert outputs(engine.generate(growing)) == alone
            stats = engine.stats()
            assert stats.num_preemptions > 0
            assert stats.num_pages_free + stats.num_pages_cached == 9


@pytest.mark.parametrize("options", [{}, {"token_budget": 33}], ids=str)
def test_scheduled_ahead(
    plan: Path, asked: list[Request], alone: list[tuple[object, ...]], options: dict[str, int]
) -> None:
    """While the step before it runs."""
    with Engine(plan, num_threads=1, overlap_schedule=True, **options) as engine:
        for _ in range(2):  # then with what is cached
            assert outputs(engine.generate(asked)) == alone


def runnable(plan: Path) -> Iterator[str]:
    for target in plans.ALL_TARGETS:
        try:
            with Engine(plan, target=target, num_pages=8):
                yield target
        except EngineError:
            continue


def test_any_target(plan: Path, asked: list[Request], alone: list[tuple[object, ...]]) -> None:
    targets = list(runnable(plan))
    assert targets
    for target in targets:
        with Engine(plan, target=target) as engine:
            assert engine.target == target
            assert outputs(engine.generate(asked)) == alone, target


def test_a_seed_matters_and_repeats(plan: Path) -> None:
    with Engine(plan) as engine:
        same = Request([3, 4, 5], temperature=1.0, seed=11, max_tokens=20, ignore_eos=True)
        other = Request([3, 4, 5], temperature=1.0, seed=12, max_tokens=20, ignore_eos=True)
        first, second, third = engine.generate([same, same, other])
        assert first.tokens == second.tokens != third.tokens


@pytest.mark.parametrize("most", [1, 5, 16])
def test_tokens_guessed_ahead(plan: Path, asked: list[Request], most: int) -> None:
    """Outputs that repeat themselves, so that guesses come true, of one token or, now and then, of two.
    At any cost: whether they are worth their time depends on what else the machine does."""
    biases: list[list[tuple[int, float]]] = [[(5, 50.0)], [(5, 50.0), (6, 50.0)], []]
    made = [replace(r, max_tokens=60, logit_bias=biases[i % 3]) for i, r in enumerate(asked)]
    with Engine(plan, num_threads=1, prefix_cache=False) as engine:
        alone = outputs([answer for request in made for answer in engine.generate([request])])
        num_steps = engine.stats().num_steps
    with Engine(plan, max_draft=-most) as engine:
        assert outputs([answer for request in made for answer in engine.generate([request])]) == alone
        stats = engine.stats()
        assert 0 < stats.num_accepted_tokens < stats.num_drafted_tokens
        assert stats.num_steps < num_steps
        assert outputs(engine.generate(made)) == alone, "all at once"
