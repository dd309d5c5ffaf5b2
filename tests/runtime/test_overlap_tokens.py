"""Collectives in two launches, with kernels between, run by processes of the engine: greedy tokens are those
of one rank, and every bit is that of the same collectives at once."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import engine as api
import plans
import pytest
import torch
from checkpoints import SPECS, reference
from engine import Engine, Request
from test_rank_tokens import RANK_OF_MPI, ranks_of

from tscompile.explain import explain, explain_text
from tscompile.passes import propagate
from tscompile.price import Prices

SIZES = {"page_size": 32, "max_tokens": 64}


def at_once(prices: Prices) -> Prices:
    """Where nothing can be hidden."""
    link = dataclasses.replace(prices.topology.host, beside=frozenset())
    return dataclasses.replace(prices, topology=dataclasses.replace(prices.topology, host=link))


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(333, (length,), generator=generator).tolist() for length in lengths]


def phases(path: Path) -> Counter[str]:
    """Of a plan's launches; each start is followed by kernels, and then by its finish."""
    launches = plans.launches(path)
    for index, launch in enumerate(launches):
        if launch.get("phase") == "start":
            after = launches[index + 1 :]
            finish = next(i for i, other in enumerate(after) if other.get("phase") == "finish")
            assert (after[finish]["op"], after[finish]["args"]) == (launch["op"], launch["args"][-1:])
            assert finish > 0
            assert all("kernel" in other for other in after[:finish])
    return Counter(launch.get("phase", "") for launch in launches)


SHARDED = plans.prices(1e-8, 1e12)
# The model, its ranks, at which prices, and how many collectives at least are in two launches.
CASES: dict[str, tuple[str, dict[str, int], Prices, int]] = {
    "tp": ("deepseek-routed", {"tp": 2}, SHARDED, 10),
    "ep, rows move": ("deepseek-routed", {"ep": 2}, plans.rows_free(), 10),
    "dp tp": ("deepseek-routed", {"dp": 2, "tp": 2}, SHARDED, 10),
    "cp": ("qwen3-moe", {"cp": 2}, plans.prices(1e-8, 1e12), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_one_rank(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, mesh, prices, fewest = CASES[case]
    reference(SPECS[name]).save_pretrained(tmp_path)
    asked = [
        Request(prompt, max_tokens=12, ignore_eos=True, num_logprobs=20) for prompt in prompts_of((37, 5, 1))
    ]
    with Engine(plans.build(tmp_path, tmp_path / "1.tsp", **SIZES), num_threads=1) as engine:
        wanted = [answer.tokens for answer in engine.generate(asked)]
    found: dict[str, Any] = {}
    for how, these in (("split", prices), ("whole", at_once(prices))):
        monkeypatch.setattr(propagate, "prices_of", lambda _, these=these: these)
        path = plans.build(tmp_path, tmp_path / f"{how}.tsp", **SIZES, **mesh)
        count = phases(path)
        assert count["start"] == count["finish"]
        assert count["start"] >= fewest if how == "split" else not count["start"]
        report = explain(path)
        told = [row for part in report["steps"] for row in part["overlaps"]]
        assert sum(row["count"] for row in told if row["beside"]) == count["start"]
        assert all(bool(row["beside"]) != bool(row["why_not"]) for row in told)
        assert explain_text(report).count("overlap: in a step of") == len(report["steps"])
        with ranks_of(path, math.prod(mesh.values()), num_threads=2 if mesh == {"tp": 2} else 1) as engine:
            answers = [engine.generate([each])[0] for each in asked]
        assert [answer.tokens for answer in answers] == wanted
        found[how] = [answer.top for answer in answers]
    assert found["split"] == found["whole"]


def test_over_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages travel while kernels run."""
    reference(SPECS["deepseek-routed"]).save_pretrained(tmp_path)
    prompts = prompts_of((40, 1, 9))
    asked = [Request(prompt, max_tokens=16, ignore_eos=True) for prompt in prompts]
    with Engine(plans.build(tmp_path, tmp_path / "1.tsp", **SIZES), num_threads=1) as engine:
        wanted = [answer.tokens for answer in engine.generate(asked)]
    monkeypatch.setattr(propagate, "prices_of", lambda _: plans.prices(1e-8, 1e12))
    path = plans.build(tmp_path, tmp_path / "2.tsp", **SIZES, dp=2)
    assert phases(path)["start"] >= 4
    mpi = f"{sys.prefix}/lib/libmpi_abi.so.1".encode()
    folder = str(Path(api.__file__).parent)
    script = RANK_OF_MPI.format(folder=folder, mpi=mpi, plan=str(path), prompts=prompts)
    words = [f"{sys.prefix}/bin/mpiexec", "-n", "2", sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, last, _ = json.loads(done.stdout)
    assert first == last == wanted
