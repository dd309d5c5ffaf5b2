"""Random modules with random boundaries are placed or refused, and what is placed is right: on every one of N
simulated ranks it gives what the module gives on one.

    pytest tests/passes/test_random_modules.py --cases 100000                      more of them
    pytest tests/passes/test_random_modules.py --first-case 4711 --cases 1         one alone
"""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from functools import cache

import golden
import pytest
import torch
from random_modules import PAGE_SIZE, VOCAB, RandomModel

from tscompile.errors import CompileError
from tscompile.interpret import Batch, Interpreter, Sequences
from tscompile.ir import Graph
from tscompile.ops import REGISTRY
from tscompile.passes import (
    canonicalize,
    collectives,
    context,
    fit,
    localize,
    propagate,
    reshard,
    stages,
)
from tscompile.price import Prices
from tscompile.printer import print_graph
from tscompile.verify import verify

TOLERANCE = 1e-4  # of the largest element: sums are taken in another order
PRICES = [
    golden.prices(base, bandwidth, tokens=tokens)
    for base, bandwidth in ((1e-6, 1e8), (1e-8, 1e10), (0.0, 1e12))
    for tokens in (8, 2000)
]
PASSES = (canonicalize, context, fit, stages, propagate, reshard, collectives, localize)


@cache
def numbers() -> torch.Tensor:
    return torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))


def weights_of(graph: Graph) -> dict[str, torch.Tensor]:
    """A weight's tensor, such that what a module makes is about as large as what it takes."""
    found = {}
    for weight in graph.weights:
        size = weight.row_elements
        start = zlib.crc32(weight.name.encode()) % (len(numbers()) - size)
        depth = weight.shape[-1] if len(weight.shape) > 1 else 1
        assert isinstance(depth, int)
        found[weight.name] = (numbers()[start : start + size] * depth**-0.5).view(weight.shape)
    return found


def with_pages(graph: Graph, page_size: int) -> Graph:
    """The graph, with pages of that many tokens."""
    for op in graph.ops:
        if "page_size" in op.attrs:
            op.attrs["page_size"] = page_size
    return graph


def random_steps(rng: random.Random, owners: int, page_size: int, num_slots: int) -> list[Batch]:
    sequences = Sequences(page_size, num_slots, owners)
    steps = []
    for _ in range(2):
        names = rng.sample("abcde", rng.randint(1, 5))
        tokens = {name: [rng.randrange(VOCAB) for _ in range(rng.choice([1, 1, 2, 5]))] for name in names}
        steps.append(sequences.batch(tokens, all_logits=rng.random() < 0.3))
    return steps


def place(graph: Graph, prices: Prices, of_small_steps: Prices) -> list[Graph]:
    """Every pass that places, and the verifier after each. The graph of each bucket of tokens."""
    build = golden.build_of(graph)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(propagate, "prices_of", lambda at: of_small_steps if at.tokens == 1 else prices)
        for step in PASSES:
            step.run(build)
            for placed in build.buckets.values():
                verify(placed)
    return list(build.buckets.values())


def check(seed: int, seen: Counter[str]) -> None:
    """One case. AssertionError if it is wrong; whatever else but CompileError is an error too."""
    rng = random.Random(seed)
    model = RandomModel(rng)
    graph, mesh = model.graph, model.graph.mesh
    owners, page_size = mesh.num_owners, PAGE_SIZE * mesh.num_parts
    num_slots = page_size * owners * 32
    batches, tensors = random_steps(rng, owners, page_size, num_slots), weights_of(graph)
    one = Interpreter(with_pages(graph, page_size), tensors.__getitem__, num_slots)
    expected = [one.run(batch)[0] for batch in batches]
    prices, of_small_steps = rng.choice(PRICES), rng.choice(PRICES)
    try:
        graphs = place(with_pages(graph, PAGE_SIZE), prices, of_small_steps)
    except CompileError as error:
        check_refusal(str(error), model)
        seen["refused"] += 1
        return
    for placed in graphs:
        many = Interpreter(placed, tensors.__getitem__, num_slots, mesh)
        for batch, wanted in zip(batches, expected, strict=True):
            for rank, found in enumerate(many.run(batch)):
                has = mesh.coords(rank).get("pp", 0) == 0  # the outputs: ranks of the first stage alone
                for ours, whole in zip(found, wanted if has else [], strict=True):
                    differs = (ours[:, : whole.shape[1]] - whole).abs().max()  # the rest fit has padded
                    wrong = float(differs / whole.abs().max().clamp(min=1e-3))
                    assert wrong <= TOLERANCE, f"rank {rank} is wrong by {wrong:.1e} of the largest"
        seen.update({op.kind for op in placed.ops})
        seen.update({str(p) for value in placed.values() for p in value.placement})
    seen["placed"] += 1
    seen["two buckets"] += len(graphs) == 2


def check_refusal(said: str, model: RandomModel) -> None:
    """It names a value or a module of the model, where it stands, and an axis of the mesh; or how many stages
    the model can be cut into."""
    if stages := re.fullmatch(r"pp=(\d): g can be cut into (\d) stages .*: pp can be 1 to (\d)", said):
        assert int(stages[1]) > int(stages[2]) == int(stages[3])
        return
    assert re.match(r"model\.py:\d+: ", said), f"no line of the model: {said}"
    assert re.search(r"[%@](v|w|kv\.)\d|\bm\d+ says", said), f"no value: {said}"
    axes = [f"{axis}{sign}" for axis, _ in model.graph.mesh.axes for sign in "=:"]
    assert any(axis in said for axis in axes), f"no axis: {said}"


def test_what_is_placed_is_right(request: pytest.FixtureRequest) -> None:
    cases, first = (request.config.getoption(name) for name in ("--cases", "--first-case"))
    seen: Counter[str] = Counter()
    for seed in range(first, first + cases):
        try:
            check(seed, seen)
        except Exception as error:
            text = print_graph(RandomModel(random.Random(seed)).graph)
            again = f"pytest tests/passes/test_random_modules.py --first-case {seed} --cases 1"
            pytest.fail(
                f"case {seed}: {type(error).__name__}: {error}\n{text}\nagain: {again}", pytrace=False
            )
    if cases >= 1000:  # the cases are worth their time: most are placed, and by every op and collective
        assert seen["placed"] > cases / 2
        assert seen["refused"] > cases / 20
        assert seen["two buckets"] > cases / 20
        gone = {"boundary", "redistribute"}  # by placing
        gone |= {"mla_attention", "finish"}  # by `expand`, before it; made by `overlap`, after
        assert set(REGISTRY) - gone <= set(seen)
