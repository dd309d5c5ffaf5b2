"""Plans of several ranks, run by as many processes of the engine, answer as a plan of one rank does: greedy
tokens and log probabilities, every family."""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import engine as api
import plans
import pytest
import torch
from checkpoints import SPECS, reference
from engine import Answer, Engine, Request

from tscompile.kernels.host import best_target
from tscompile.passes import propagate
from tscompile.reader import Plan

RANK = """
import ctypes, sys
sys.path.insert(0, {folder!r})
import engine
plan, error = engine.Plan({plan!r}), engine._Error()
options = engine._Options(ctypes.sizeof(engine._Options), ctypes.sizeof(engine._Event), 1)
options.rank, options.rendezvous, options.rank_timeout_ms = {rank}, {name!r}, 60000
status = engine.library().ts_rank_run(plan.handle, ctypes.byref(options), ctypes.byref(error))
sys.exit(error.message.decode() if status else 0)
"""


@contextmanager
def ranks_of(plan: Path, num_ranks: int, **options: int) -> Iterator[Engine]:
    """Rank 0's engine, over processes for the others, which must end well."""
    name = f"test-{uuid.uuid4().hex[:16]}".encode()
    folder = str(Path(api.__file__).parent)
    scripts = [
        RANK.format(folder=folder, plan=str(plan), rank=rank, name=name) for rank in range(1, num_ranks)
    ]
    others = [
        subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
        for script in scripts
    ]
    pids = (ctypes.c_int32 * num_ranks)(0, *(process.pid for process in others))
    try:
        with Engine(plan, rendezvous=name, rank_pids=pids, **{"num_threads": 1, **options}) as engine:
            yield engine
        assert [process.wait(60) for process in others] == [0] * len(others)
    finally:
        for process in others:
            process.kill()


def answers(engine: Engine, prompts: list[list[int]]) -> list[Answer]:
    return engine.generate(
        [Request(prompt, max_tokens=24, ignore_eos=True, num_logprobs=333) for prompt in prompts]
    )


@pytest.mark.parametrize("family", plans.RANKED)
def test_tokens_are_those_of_one_rank(family: str, tmp_path: Path) -> None:
    reference(plans.RANKED[family]).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(333, (length,), generator=generator).tolist() for length in (37, 5, 50, 1)]
    found = {}
    for ranks in (1, 2, 4):
        path = plans.build(tmp_path, tmp_path / f"{ranks}.tsp", "f32", tp=ranks, page_size=32, max_tokens=64)
        if ranks == 1:
            with Engine(path, num_threads=1) as engine:
                found[ranks] = answers(engine, prompts)
        else:
            with ranks_of(path, ranks) as engine:
                found[ranks] = answers(engine, prompts)
    for ranks in (2, 4):
        assert [answer.tokens for answer in found[ranks]] == [answer.tokens for answer in found[1]]
        for one, several in zip(found[1], found[ranks], strict=True):
            for row, (tokens, values) in enumerate(one.top):
                theirs = dict(zip(*several.top[row], strict=True))
                assert all(abs(theirs[t] - v) < 1e-3 for t, v in zip(tokens, values, strict=True))


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama-mha", {"tp": 4}),
        ("qwen3-moe", {"dp": 2, "ep": 2}),
        ("deepseek-routed", {"dp": 2, "tp": 2}),
    ],
)
def test_tokens_in_parts(
    name: str, mesh: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where moving costs nothing values go from tokens to features and back, whatever the tokens' number."""
    reference(SPECS[name]).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(500, (length,), generator=generator).tolist() for length in (37, 5, 1)]
    asked = [Request(prompt, max_tokens=16, ignore_eos=True) for prompt in prompts]
    with Engine(plans.build(tmp_path, tmp_path / "1.tsp", page_size=32), num_threads=1) as engine:
        wanted = [answer.tokens for answer in engine.generate(asked)]
    monkeypatch.setattr(propagate, "prices_of", lambda _: plans.prices(1e-8, 1e12))
    path = plans.build(tmp_path, tmp_path / "several.tsp", page_size=32, **mesh)
    moved = {launch["collective"] for launch in plans.launches(path) if launch.get("parts") == "tokens"}
    assert {"all_gather", "reduce_scatter", "all_to_all"} <= moved
    with ranks_of(path, 4) as engine:
        assert [answer.tokens for answer in engine.generate(asked)] == wanted


@pytest.mark.parametrize(
    ("name", "mesh", "fewest"),
    [
        ("qwen3-moe", {"ep": 2}, 0),
        ("qwen3-moe", {"ep": 2}, 9),
        ("qwen3-moe", {"dp": 2, "ep": 2}, 0),
        ("deepseek-routed", {"dp": 2}, 0),
        ("deepseek-routed", {"ep": 4}, 0),
    ],
)
def test_rows_of_experts_move(
    name: str, mesh: dict[str, int], fewest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From their tokens' ranks to those of their experts and back, in steps of as many tokens or more; ranks
    without any."""
    reference(SPECS[name]).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(500, (length,), generator=generator).tolist() for length in (37, 5, 1, 70)]
    asked = [Request(prompt, max_tokens=16, ignore_eos=True) for prompt in prompts]
    sizes = {"page_size": 32, "max_tokens": 64, "max_seqs": 6}
    with Engine(plans.build(tmp_path, tmp_path / "1.tsp", **sizes), num_threads=1) as engine:
        wanted = [answer.tokens for answer in engine.generate(asked)]
    slow = plans.prices(1e-4, 1e12)
    monkeypatch.setattr(
        propagate, "prices_of", lambda at: slow if 1 <= at.tokens < fewest else plans.rows_free()
    )
    path = plans.build(tmp_path, tmp_path / "several.tsp", **sizes, **mesh)
    launches = plans.launches(path)
    moves = [launch["to"] for launch in launches if launch.get("collective") == "ragged_all_to_all"]
    routes = [launch for launch in launches if launch.get("kernel", "").startswith("sort_routes")]
    assert moves == ["experts", "tokens"] * (len(routes) // (2 if fewest else 1))
    with ranks_of(path, math.prod(mesh.values())) as engine:
        assert [answer.tokens for answer in engine.generate(asked)] == wanted
        assert [engine.generate([one])[0].tokens for one in asked[:2]] == wanted[:2]


STAGED = {**plans.RANKED, **{name: SPECS[name] for name in ("qwen3-moe", "deepseek-routed")}}


@pytest.mark.parametrize("family", STAGED)
def test_stages(family: str, tmp_path: Path) -> None:
    """Each with its own layers' weights and caches; llama's table is read by the first stage and the last."""
    reference(STAGED[family]).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(333, (length,), generator=generator).tolist() for length in (37, 5, 50, 1)]
    asked = [Request(prompt, max_tokens=16, ignore_eos=True) for prompt in prompts]
    sizes, one = {"page_size": 32, "max_tokens": 64}, tmp_path / "1.tsp"
    with Engine(plans.build(tmp_path, one, **sizes), num_threads=1) as engine:
        wanted = [answer.tokens for answer in engine.generate(asked)]
    entries = set(Plan(one).entries)
    for mesh in ({"pp": 2}, {"pp": 2, "tp": 2}):
        path = plans.build(tmp_path, tmp_path / f"{'-'.join(mesh)}.tsp", **sizes, **mesh)
        if "tp" not in mesh:  # nothing is there twice, but a table that is read in two layouts
            assert set(Plan(path).entries) - entries <= {"embed_tokens.weight.pp-stage1"}
        with ranks_of(path, 2 ** len(mesh), kv_bytes=1 << 20) as engine:
            assert [answer.tokens for answer in engine.generate(asked)] == wanted, mesh
            # a rank has the caches of its own layers alone
            program = Plan(path).json(f"tsp/program/{best_target()}")
            layers = {(x["stage"], a["kv"]) for x in plans.launches(path) for a in x["args"] if "kv" in a}
            most = max(Counter(stage for stage, _ in layers).values())
            assert most < len(layers) == len(program["kv"]["layers"])
            assert engine.stats().num_pages == (1 << 20) // (most * program["kv"]["page_bytes"])


RANK_OF_MPI = """
import ctypes, json, os, sys
sys.path.insert(0, {folder!r})
import engine
from pathlib import Path
rank = int(os.environ["PMI_RANK"])
options = dict(num_threads=1, num_pages=5, prefix_cache=True, offload_bytes=8 << 20, ranks_here=1)
options["mpi_library"] = {mpi!r}
if rank == 0:
    with engine.Engine(Path({plan!r}), **options) as started:
        rounds = []
        for shift in (0, 1, 2, 0):
            prompts = [[token + shift for token in prompt] for prompt in {prompts}]
            asked = [engine.Request(prompt, max_tokens=16, ignore_eos=True) for prompt in prompts]
            rounds.append([answer.tokens for answer in started.generate(asked)])
        print(json.dumps([rounds[0], rounds[-1], started.stats().num_pages_restored]))
    sys.exit()
plan, error, given = engine.Plan({plan!r}), engine._Error(), engine._Options()
given.size, given.event_size = ctypes.sizeof(engine._Options), ctypes.sizeof(engine._Event)
for name, value in dict(options, rank=rank).items():
    setattr(given, name, value)
status = engine.library().ts_rank_run(plan.handle, ctypes.byref(given), ctypes.byref(error))
sys.exit(error.message.decode() if status else 0)
"""


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("qwen3", {"pp": 2, "tp": 2}),
        ("llama", {"dp": 2}),
        ("deepseek-routed", {"cp": 2, "pp": 2}),
        ("qwen3-moe", {"dp": 2, "ep": 2}),
    ],
)
def test_over_mpi(family: str, mesh: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on several hosts, where only ranks that exchange something speak; experts' rows move, and pages run
    out and come back from the second tier."""
    reference(STAGED[family]).save_pretrained(tmp_path)
    prompts = [list(range(5, 42)), [9], list(range(300, 320)), list(range(90, 190)), list(range(7, 38))]
    asked = [Request(prompt, max_tokens=16, ignore_eos=True) for prompt in prompts]
    with Engine(plans.build(tmp_path, tmp_path / "1.tsp", page_size=32), num_threads=1) as engine:
        wanted = [answer.tokens for answer in engine.generate(asked)]
    if "ep" in mesh:
        monkeypatch.setattr(propagate, "prices_of", lambda _: plans.rows_free())
    path = plans.build(tmp_path, tmp_path / "several.tsp", page_size=32, **mesh)
    moves = [launch for launch in plans.launches(path) if launch.get("collective") == "ragged_all_to_all"]
    assert bool(moves) == ("ep" in mesh)
    mpi = f"{sys.prefix}/lib/libmpi_abi.so.1".encode()
    folder = str(Path(api.__file__).parent)
    script = RANK_OF_MPI.format(folder=folder, mpi=mpi, plan=str(path), prompts=prompts)
    num_ranks = str(math.prod(mesh.values()))
    words = [f"{sys.prefix}/bin/mpiexec", "-n", num_ranks, sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    *rounds, num_restored = json.loads(done.stdout)
    assert rounds == [wanted, wanted]
    assert num_restored > 0, "pages that were evicted come back, on every rank"


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-routed"])
def test_experts_over_ranks(name: str, tmp_path: Path) -> None:
    """Sharded within, and shared out whole."""
    reference(SPECS[name]).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(500, (length,), generator=generator).tolist() for length in (37, 5, 1)]
    asked = [Request(prompt, max_tokens=16, ignore_eos=True) for prompt in prompts]
    with Engine(plans.build(tmp_path, tmp_path / "1.tsp"), num_threads=1) as engine:
        wanted = [answer.tokens for answer in engine.generate(asked)]
    for mesh in ({"tp": 2}, {"ep": 2}, {"ep": 2, "tp": 2}):
        path = plans.build(tmp_path, tmp_path / f"{'-'.join(mesh)}.tsp", **mesh)
        with ranks_of(path, 2 ** len(mesh)) as engine:
            assert [answer.tokens for answer in engine.generate(asked)] == wanted, mesh


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama-gqa-tied", {"dp": 2}),
        ("qwen3-moe", {"dp": 2}),
        ("qwen3-moe", {"dp": 2, "ep": 2}),
        ("deepseek-routed", {"dp": 2, "tp": 2}),
    ],
)
def test_sequences_over_ranks(name: str, mesh: dict[str, int], tmp_path: Path) -> None:
    """Each owner's sequences and their cache on its own ranks; more of them than run at once, of which some
    share a prefix, and pages run out."""
    reference(SPECS[name]).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(500, (length,), generator=generator).tolist() for length in (37, 5, 1, 64, 33, 2)
    ]
    prompts += [prompts[3][:50] + prompts[1], prompts[0] + prompts[1]]
    asked = [Request(prompt, max_tokens=16, ignore_eos=True) for prompt in prompts]
    sizes = {"page_size": 32, "max_tokens": 64, "max_seqs": 6}
    with Engine(plans.build(tmp_path, tmp_path / "1.tsp", **sizes), num_threads=1) as engine:
        wanted = [answer.tokens for answer in engine.generate(asked)]
    path = plans.build(tmp_path, tmp_path / "several.tsp", **sizes, **mesh)
    with ranks_of(path, math.prod(mesh.values()), num_pages=5) as engine:
        assert [answer.tokens for answer in engine.generate(asked)] == wanted
        assert engine.stats().num_pages == 2 * 5
