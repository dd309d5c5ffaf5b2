"""The second tier: pages that the prefix cache evicts come back bit for bit the same, from memory and from
disk, with several ranks, and whatever happens to what was kept."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import checkpoints
import engine as api
import numpy as np
import plans
import pytest
import torch
from checkpoints import SPECS, reference
from engine import Answer, Engine, EngineError, Request
from test_rank_tokens import ranks_of

MISS_BROKEN = 4
PAGES = {"page_size": 32, "max_tokens": 64}  # a context of 512 tokens has 16 pages


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    checkpoints.make(SPECS["qwen3-gqa-8"], folder / "checkpoint")
    return plans.build(folder / "checkpoint", folder / "plan.tsp", "bf16", **PAGES)


def conversations(vocab_size: int) -> list[Request]:
    """Five that do not fit into a cache of 16 pages beside each other, greedy and sampled."""
    rng = np.random.default_rng(5)
    made = [
        Request([int(token) for token in rng.integers(1, vocab_size, size=length)], max_tokens=6, seed=seed)
        for seed, length in enumerate((250, 230, 200, 310, 270))
    ]
    made[1::2] = [replace(request, temperature=0.9, top_p=0.95) for request in made[1::2]]
    return [replace(request, num_logprobs=3, ignore_eos=True) for request in made]


def rounds(engine: Engine, asked: list[Request]) -> list[Answer]:
    """Each of them alone, and all of them three times: what the others have evicted is asked for again."""
    return [engine.generate([request])[0] for _ in range(3) for request in asked]


def outputs(answers: list[Answer]) -> list[tuple[object, ...]]:
    return [answer.output for answer in answers]


@pytest.fixture(scope="module")
def wanted(plan: Path) -> list[tuple[object, ...]]:
    """Without a cache."""
    with Engine(plan, prefix_cache=False) as engine:
        return outputs(rounds(engine, conversations(500)))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_what_was_evicted_comes_back_the_same(
    plan: Path, wanted: list[tuple[object, ...]], tmp_path: Path, where: str
) -> None:
    asked = conversations(500)
    with Engine(plan, num_pages=16) as engine:
        assert outputs(rounds(engine, asked)) == wanted
        assert (engine.stats().num_slots, engine.stats().num_restored_tokens) == (0, 0)
    folder = tmp_path if where == "disk" else None
    with Engine(plan, num_pages=16, num_threads=2, offload_bytes=32 << 20, offload_folder=folder) as engine:
        found = rounds(engine, asked)
        assert outputs(found) == wanted
        again = found[5:]
        assert [answer.num_restored for answer in found[:5]] == [0] * 5
        assert [answer.num_cached for answer in again] == [
            (len(request.prompt) - 1) // 32 * 32 for _ in range(2) for request in asked
        ], "all that need not be computed"
        assert sum(answer.num_restored for answer in again) > 10 * 4 * 32
        assert all(0 <= answer.num_restored <= answer.num_cached for answer in again)
        stats = engine.stats()
        assert stats.num_restored_tokens == sum(answer.num_restored for answer in found)
        assert stats.num_pages_restored * 32 >= stats.num_restored_tokens
        assert stats.num_slots_held == stats.num_pages_kept, "each is copied once"
        assert stats.num_pages_broken == 0
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_a_small_tier_keeps_what_was_used_last(plan: Path, wanted: list[tuple[object, ...]]) -> None:
    page = bytes_of_page(plan)
    with Engine(plan, num_pages=16, offload_bytes=5 * page) as engine:
        assert outputs(rounds(engine, conversations(500))) == wanted
        stats = engine.stats()
        assert (stats.num_slots, stats.num_slots_held) == (5, 5)
        assert stats.num_pages_kept > 50


def bytes_of_page(plan: Path) -> int:
    """From what the engine says of one byte."""
    with (
        pytest.raises(EngineError, match="one page of 32 tokens takes ") as refused,
        Engine(plan, offload_bytes=1),
    ):
        pass
    return int(str(refused.value).rsplit(" ", 1)[1])


def file_of(folder: Path) -> int:
    """The tier's, opened once more."""
    for number in os.listdir("/proc/self/fd"):
        path = Path("/proc/self/fd", number)
        if path.is_symlink() and str(path.readlink()).startswith(str(folder)):
            return os.open(path, os.O_RDWR)
    raise FileNotFoundError(folder)


@pytest.mark.parametrize("damage", ["a byte of each page", "all of it", "its end"])
def test_what_came_back_changed_is_computed_again(
    plan: Path, wanted: list[tuple[object, ...]], tmp_path: Path, damage: str
) -> None:
    page = bytes_of_page(plan)
    with Engine(plan, num_pages=16, offload_bytes=40 * page, offload_folder=tmp_path) as engine:
        asked = conversations(500)
        found = [engine.generate([request])[0] for request in asked]
        file = file_of(tmp_path)
        assert os.fstat(file).st_mode & 0o7777 == 0o600
        assert os.fstat(file).st_size == 40 * page
        if damage == "its end":
            os.ftruncate(file, 3 * page)
        elif damage == "all of it":
            os.pwrite(file, bytes(40 * page), 0)
        else:
            for slot in range(40):
                at = slot * page + (slot * 997) % page
                os.pwrite(file, bytes([os.pread(file, 1, at)[0] ^ 4]), at)
        os.close(file)
        found += [engine.generate([request])[0] for request in asked]
        stats = engine.stats()
        assert stats.num_pages_broken >= 3
        assert MISS_BROKEN in {answer.miss for answer in found[5:]}
        found += [engine.generate([request])[0] for request in asked]
        assert outputs(found) == wanted


@pytest.mark.parametrize(("name", "num_pages"), [("mistral-window", 6), ("qwen3-some-layers-windowed", 22)])
def test_windows_come_back_too(name: str, num_pages: int, tmp_path: Path) -> None:
    """What a window reads behind a prefix comes back with what full attention reads of it, or neither."""
    reference(SPECS[name]).save_pretrained(tmp_path)
    path = plans.build(tmp_path, tmp_path / "plan.tsp", **PAGES, max_seqs=4)
    asked = conversations(330)
    with Engine(path, num_threads=1, prefix_cache=False) as engine:
        wanted = outputs(rounds(engine, asked))
    with Engine(path, num_pages=num_pages, offload_bytes=32 << 20) as engine:
        found = rounds(engine, asked)
        assert outputs(found) == wanted
        assert [answer.num_cached for answer in found[5:]] == [
            (len(request.prompt) - 1) // 32 * 32 for _ in range(2) for request in asked
        ]
        assert sum(answer.num_restored for answer in found) >= 10 * 2 * 32, "what a window reads"
        assert engine.stats().num_pages_broken == 0


def test_who_goes_away_meanwhile(plan: Path, wanted: list[tuple[object, ...]]) -> None:
    """Cancelled while its pages are on their way, or just after."""
    asked = conversations(500)
    with Engine(plan, num_pages=16, offload_bytes=32 << 20) as engine:
        assert outputs([engine.generate([request])[0] for request in asked]) == wanted[:5]
        for request in asked:
            number = engine.submit(request)
            engine.cancel(number)
            answers = {number: Answer()}
            while not answers[number].finish:
                engine.poll(answers)
        assert outputs([engine.generate([request])[0] for request in asked]) == wanted[5:10]
        stats = engine.stats()
        assert stats.num_pages_free + stats.num_pages_cached == stats.num_pages


def test_ranks_keep_their_parts(tmp_path: Path) -> None:
    """Of heads (tp), of layers (pp), and of sequences (dp)."""
    reference(plans.RANKED["qwen3"]).save_pretrained(tmp_path)
    torch.manual_seed(0)
    asked = [replace(request, prompt=request.prompt[:150]) for request in conversations(330)]
    with Engine(plans.build(tmp_path, tmp_path / "1.tsp", **PAGES), num_threads=1) as engine:
        alone = [answer.tokens for answer in rounds(engine, asked)]
    folder = tmp_path / "tier"
    folder.mkdir()
    for mesh in ({"tp": 2}, {"pp": 2}, {"dp": 2}):
        path = plans.build(tmp_path, tmp_path / f"{''.join(mesh)}.tsp", **PAGES, **mesh)
        options = {"num_pages": 8, "offload_bytes": 16 << 20, "offload_folder": folder}
        with ranks_of(path, 2, **options) as engine:  # type: ignore[arg-type]
            assert [answer.tokens for answer in rounds(engine, asked)] == alone, mesh
            assert engine.stats().num_restored_tokens > 5 * 32, mesh
            assert engine.stats().num_pages_broken == 0


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"offload_bytes": -1}, api.BAD_REQUEST, "offload_bytes is -1, wanted 0"),
        ({"offload_bytes": 1 << 20, "prefix_cache": False}, api.BAD_REQUEST, "but prefix_cache is 0"),
        ({"offload_folder": Path("/nowhere")}, api.BAD_REQUEST, "'/nowhere' but offload_bytes is 0"),
        (
            {"offload_bytes": 1 << 20, "offload_folder": Path("/nowhere")},
            api.IO,
            "'/nowhere' for evicted pages: No such",
        ),
        (
            {"offload_bytes": 1 << 20, "offload_folder": Path("/proc")},
            api.IO,
            "cannot make a file in '/proc'",
        ),
        ({"offload_bytes": 1 << 60}, api.NO_MEMORY, "evicted pages .*iB and the KV cache"),
    ],
)
def test_what_is_refused_at_start(plan: Path, options: dict[str, object], status: int, message: str) -> None:
    with pytest.raises(EngineError, match=message) as refused, Engine(plan, num_pages=16, **options):  # type: ignore[arg-type]
        pass
    assert refused.value.status == status
