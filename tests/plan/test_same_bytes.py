"""`tscompile build`, as a user runs it: the same bytes anywhere, a file that safetensors opens, and nothing
left by a failure."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoints
import plans
import pytest
from checkpoints import SPECS
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny-qwen3"
    return checkpoints.make(SPECS["qwen3-tied"], path)


def tscompile(
    *words: str | Path, cwd: Path, limit: Callable[[], None] | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tscompile.cli", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )


def test_two_builds_in_two_folders_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Another working folder, another copy of the checkpoint, another path, hash seed, time zone and
    umask."""
    plans = []
    for number, (seed, zone, mask) in enumerate((("1", "UTC", 0o022), ("2", "Asia/Tokyo", 0o077))):
        cwd = tmp_path / ("x" * (number + 1)) / "deep"
        copy = cwd / "model"
        copy.mkdir(parents=True)
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        words = ("build", "model" if number else copy, "--target", "cpu-avx2,cpu-avx512,cpu-amx", "-o")
        out = cwd / f"plan{number}.tsp"
        env = {"PYTHONHASHSEED": seed, "TZ": zone} | (
            {"XDG_CACHE_HOME": str(cwd / "cache")} if number else {}
        )
        ended = tscompile(*words, out, cwd=cwd, limit=lambda mask=mask: os.umask(mask) and None, **env)
        assert ended.returncode == 0, ended.stderr
        plans.append(out.read_bytes())
    assert plans[0] == plans[1]
    for unwanted in (str(tmp_path), str(ROOT), os.uname().nodename):
        assert unwanted.encode() not in plans[0]
    with safe_open(tmp_path / "x" / "deep" / "plan0.tsp", "pt") as file:
        manifest = json.loads(bytes(file.get_tensor("tsp/manifest").tolist()))
        assert manifest["targets"] == ["cpu-avx2", "cpu-avx512", "cpu-amx"]
        assert {"tsp/text/tokenizer", "tsp/text/template"} <= set(file.keys())
        assert file.get_tensor("layers.0.self_attn.q_norm.weight").shape == (64,)


def test_shards_do_not_show(folder: Path, tmp_path: Path) -> None:
    """The same tensors in one file or in many give the same plan."""
    shards = tmp_path / "shards"
    checkpoints.reference(SPECS["qwen3-tied"]).save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    whole = plans.build(folder, tmp_path / "whole.tsp", "bf16")
    for name in ("config.json", "generation_config.json"):
        assert (shards / name).read_bytes() == (folder / name).read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (shards / name).write_bytes((folder / name).read_bytes())
    assert plans.build(shards, tmp_path / "shards.tsp", "bf16").read_bytes() == whole.read_bytes()


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """A limit on a file's size stands for the disk: room for the kernels, not for the plan."""
    size = 400_000

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    (tmp_path / "out").mkdir()
    ended = tscompile(
        "build", folder, "-o", tmp_path / "out" / "plan.tsp", "--no-text", cwd=tmp_path, limit=limit
    )
    assert ended.returncode == 2, ended.stderr
    assert "error: " in ended.stderr
    assert "plan.tsp could not be written: File too large. The plan takes" in ended.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_build_keeps_the_plan_that_was_there(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.tsp"
    out.write_bytes(b"the old one")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "tokenizer.json").unlink()
    ended = tscompile("build", broken, "-o", out, cwd=tmp_path)
    assert ended.returncode == 2
    assert "has no tokenizer.json" in ended.stderr
    assert "--no-text" in ended.stderr
    assert out.read_bytes() == b"the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "plan.tsp"]
    ended = tscompile("build", broken, "-o", out, "--no-text", "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["bytes"] == out.stat().st_size
    assert "--no-text" in ended.stderr
    for command in ("inspect", "explain"):
        shown = tscompile(command, out, cwd=tmp_path)
        assert shown.returncode == 0, shown.stderr
        assert "Qwen3ForCausalLM" in shown.stdout or "mesh  tp=1" in shown.stdout
        assert isinstance(json.loads(tscompile(command, out, "--json", cwd=tmp_path).stdout), dict)
    out.write_bytes(out.read_bytes()[:-1])
    cut = tscompile("inspect", out, cwd=tmp_path)
    assert cut.returncode == 2
    assert "is not a whole plan" in cut.stderr
