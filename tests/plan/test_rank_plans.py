"""Plans of several ranks compute what a plan of one does: their own kernels and programs, by an
executor that shares nothing with the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import plans
import pytest
import torch
from checkpoints import SPECS, reference
from rank_executor import RankExecutor
from test_variants import VARIANTS, write

from tscompile.explain import explain, explain_text
from tscompile.interpret import Sequences
from tscompile.kernels.host import best_target
from tscompile.passes import propagate
from tscompile.reader import Plan

PAGE_SIZE, NUM_PAGES, STEPS = 32, 16, 12


def greedy(
    path: Path, prompts: dict[str, list[int]], owners: int = 1
) -> tuple[list[list[int]], list[np.ndarray]]:
    """Prompts one step after the other, each beside the decodes of those before; then all decode. Tokens, and
    logits, a list a step, in the prompts' order. owners: ranks that share the sequences out."""
    executor = RankExecutor(path, best_target(), NUM_PAGES // owners)
    sequences, given, tokens, logits = Sequences(PAGE_SIZE, PAGE_SIZE * NUM_PAGES, owners), {}, [], []
    for step in range(STEPS):
        names = list(prompts)[: step + 1]
        new = {name: given[name] if name in given else prompts[name] for name in names}
        ranks = executor.run(sequences.batch(new))
        assert all(rank.tobytes() == ranks[0].tobytes() for rank in ranks), "all ranks have the same bits"
        rows = sorted(names, key=lambda name: sequences.owner[name])  # as the batch has them
        logits.append(ranks[0][[rows.index(name) for name in names]])
        tokens.append(logits[-1].argmax(-1).tolist())
        given = {name: [token] for name, token in zip(names, tokens[-1], strict=True)}
    return tokens, logits


def test_tokens_are_those_of_one_rank(tmp_path: Path) -> None:
    """Of one family: tests/runtime/test_rank_tokens.py runs all of them, by the engine."""
    reference(plans.RANKED["mistral"]).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(3)
    prompts = {
        name: torch.randint(333, (length,), generator=generator).tolist()
        for name, length in (("a", 37), ("b", 5), ("c", 50))
    }
    found = {}
    for ranks in (1, 2, 4):
        path = plans.build(
            tmp_path, tmp_path / f"{ranks}.tsp", "f32", tp=ranks, page_size=PAGE_SIZE, max_tokens=64
        )
        found[ranks] = greedy(path, prompts)
    for ranks in (2, 4):
        assert found[ranks][0] == found[1][0]
        for one, several in zip(found[1][1], found[ranks][1], strict=True):
            assert np.abs(several - one).max() <= 1e-4 * np.abs(one).max()


@pytest.mark.parametrize(
    ("name", "mesh"), [("mistral-window", {"tp": 4}), ("deepseek-routed", {"ep": 2, "tp": 2})]
)
def test_tokens_in_parts(
    name: str, mesh: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where moving tokens costs nothing norms and more run on a part of them, whatever their number."""
    reference(SPECS[name]).save_pretrained(tmp_path)
    prompts = {"a": list(range(40)), "b": [60, 59, 3]}
    one = greedy(plans.build(tmp_path, tmp_path / "1.tsp", page_size=PAGE_SIZE), prompts)
    monkeypatch.setattr(propagate, "prices_of", lambda _: plans.prices(1e-8, 1e12))
    path = plans.build(tmp_path, tmp_path / "several.tsp", page_size=PAGE_SIZE, **mesh)
    launches = plans.launches(path)
    assert any("tokens" in launch for launch in launches)
    assert {"all_gather", "reduce_scatter"} <= {
        x["collective"] for x in launches if x.get("parts") == "tokens"
    }
    several = greedy(path, prompts)
    assert several[0] == one[0]
    for whole, parts in zip(one[1], several[1], strict=True):
        assert np.abs(parts - whole).max() <= 1e-4 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("mistral-window", {"dp": 2, "tp": 2}),
        ("qwen3-moe", {"dp": 2, "ep": 2}),
        ("deepseek-routed", {"dp": 2}),
    ],
)
def test_sequences_shared_out(name: str, mesh: dict[str, int], tmp_path: Path) -> None:
    """Each rank has the cache of its own sequences; at first only one has any."""
    reference(SPECS[name]).save_pretrained(tmp_path)
    prompts = {"a": list(range(40)), "b": [60, 59, 3], "c": list(range(9, 70))}
    one = greedy(plans.build(tmp_path, tmp_path / "1.tsp", page_size=PAGE_SIZE), prompts)
    path = plans.build(tmp_path, tmp_path / "several.tsp", page_size=PAGE_SIZE, verify=True, **mesh)
    launches = plans.launches(path)
    attention = [launch for launch in launches if "attention_" in launch.get("kernel", "")]
    assert attention
    assert all(launch["tokens"] == "dp" for launch in attention)
    several = greedy(path, prompts, owners=2)
    assert several[0] == one[0]
    for whole, parts in zip(one[1], several[1], strict=True):
        assert np.abs(parts - whole).max() <= 1e-4 * np.abs(whole).max()


def test_rows_of_experts_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's rows go to the ranks of their experts, and come back."""
    reference(SPECS["qwen3-moe"]).save_pretrained(tmp_path)
    prompts = {"a": list(range(40)), "b": [60, 59, 3], "c": list(range(9, 70))}
    one = greedy(plans.build(tmp_path, tmp_path / "1.tsp", page_size=PAGE_SIZE), prompts)
    monkeypatch.setattr(propagate, "prices_of", lambda _: plans.rows_free())
    sizes = {"page_size": PAGE_SIZE, "dp": 2, "ep": 2}
    path = plans.build(tmp_path, tmp_path / "several.tsp", verify=True, **sizes)
    launches = plans.launches(path)
    moves = [launch["to"] for launch in launches if launch.get("collective") == "ragged_all_to_all"]
    assert moves
    assert moves == ["experts", "tokens"] * (len(moves) // 2)
    report = explain(path)
    told = [row for row in report["steps"][-1]["collectives"] if row["collective"] == "ragged_all_to_all"]
    one_row = next(launch["run"] * launch["top"] for launch in launches if "top" in launch) * 4
    assert {b["bytes"] for row in told for b in row["buckets"] if b["tokens"] == 8} == {8 * one_row}
    assert "; ragged ones as if every expert had as many rows" in explain_text(report)
    several = greedy(path, prompts, owners=2)
    assert several[0] == one[0]
    for whole, parts in zip(one[1], several[1], strict=True):
        assert np.abs(parts - whole).max() <= 1e-4 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama-gqa-tied", {"pp": 4}),
        ("qwen3-moe", {"pp": 2, "ep": 2}),
        ("deepseek-routed", {"pp": 2, "dp": 2}),
    ],
)
def test_stages(name: str, mesh: dict[str, int], tmp_path: Path) -> None:
    """Each launch is of one stage, but for the sends between them; a layer's cache is on one."""
    reference(SPECS[name]).save_pretrained(tmp_path)
    prompts = {"a": list(range(40)), "b": [60, 59, 3], "c": list(range(9, 70))}
    one = greedy(plans.build(tmp_path, tmp_path / "1.tsp", page_size=PAGE_SIZE), prompts)
    path = plans.build(tmp_path, tmp_path / "several.tsp", page_size=PAGE_SIZE, verify=True, **mesh)
    for bucket in Plan(path).json(f"tsp/program/{best_target()}")["buckets"]:
        launches = bucket["launches"]
        assert {launch["stage"] for launch in launches if "kernel" in launch} == set(range(mesh["pp"]))
        sends = [(x["src"], x["dst"]) for x in launches if x.get("collective") == "send"]
        assert sends == [*((i, i + 1) for i in range(mesh["pp"] - 1)), (mesh["pp"] - 1, 0)]
    several = greedy(path, prompts, owners=mesh.get("dp", 1))
    assert several[0] == one[0]
    for whole, parts in zip(one[1], several[1], strict=True):
        assert np.abs(parts - whole).max() <= 1e-4 * np.abs(whole).max()
    explains_stages(path, mesh["pp"], sends)


def explains_stages(path: Path, num_stages: int, sends: list[tuple[int, int]]) -> None:
    report = explain(path)
    kv = Plan(path).json(f"tsp/program/{best_target()}")["kv"]
    assert [row["stage"] for row in report["stages"]] == list(range(num_stages))
    assert sum(row["layers"] for row in report["stages"]) == len(kv["layers"])
    weights = {w["weight"]: w["stages"] for w in report["weights"]}
    assert all(stages for stages in weights.values())
    assert weights["rope_table"] == [row["stage"] for row in report["stages"] if row["layers"]]
    assert weights["embed_tokens.weight"][0] == 0
    for step in report["steps"]:
        told = [(c["src"], c["dst"]) for c in step["collectives"] if c["collective"] == "send"]
        assert sorted(told) == sorted(sends)
    text = explain_text(report)
    assert "they work one after the other, so a step is their sum" in text
    assert all(f"send {src} -> {dst}" in text for src, dst in sends)
    assert "weights: a rank holds up to " in text


def test_a_user_model_with_its_vocabulary_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where links cost nothing all weights are sharded, the embedding's table too, by rows."""
    model, _ = write(VARIANTS["parallel attention and MLP, one norm"][0], tmp_path)
    prompts = {"a": list(range(40)), "b": [60, 59, 3]}
    found = {}
    for ranks in (1, 2):
        path = tmp_path / f"{ranks}.tsp"
        monkeypatch.setattr(propagate, "prices_of", lambda _: plans.prices(1e-9, 1e13))
        plans.build(tmp_path, path, "f32", model=model, tp=ranks, page_size=PAGE_SIZE)
        found[ranks] = greedy(path, prompts)
    assert {"rank.tp@tp=0", "rank.tp@tp=1"} <= Plan(path).entries.keys()
    assert found[2][0] == found[1][0]
    for one, several in zip(found[1][1], found[2][1], strict=True):
        assert np.abs(several - one).max() <= 1e-4 * np.abs(one).max()
