"""The command line: exit statuses, one message an error, nothing left half-made."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SPECS, reference
from test_variants import VARIANTS, write

from tscompile import check, cli, pipeline
from tscompile.errors import InternalError
from tscompile.mesh import Mesh
from tscompile.ops.base import REGISTRY


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    reference(SPECS["qwen3-tied"]).save_pretrained(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """(status, stdout, stderr without progress)."""
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, "".join(line for line in err.splitlines(True) if "tscompile:" in line)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("tscompile: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("tscompile: error: ").rstrip()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["build", "--help"], ["inspect", "--help"], ["explain", "--help"], ["--version"]],
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert "tscompile" in capsys.readouterr().out


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from tscompile import cli; cli.main(['build', '--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "{t}/none"], "{t}/none does not exist: give a model file, or a checkpoint's folder"),
        (["build", "{t}/m.py"], "{t}/m.py is a model file: add --weights and the checkpoint's folder"),
        (
            ["build", "{t}/m.py", "--weights", "{t}/none"],
            "{t}/none is not a folder: give the checkpoint's folder, with config.json in it",
        ),
        (["build", "{t}"], "{t}/config.json cannot be read: No such file or directory"),
        (
            ["build", "{c}", "--weights", "{c}"],
            "{c} is a checkpoint's folder, so --weights {c} has no place: give one of them",
        ),
        (["build", "{c}", "-o", "{t}/no/plan.tsp"], "-o {t}/no/plan.tsp: there is no folder {t}/no"),
        (["build", "{c}", "-o", "{t}"], "-o {t}: is a folder"),
        (
            ["build", "{c}", "--max-context", "100000", "-o", "{t}/p"],
            "models/qwen3.py:34: --max-context 100000 is more than config.json allows:",
        ),
        (["inspect", "{t}/none.tsp"], "{t}/none.tsp cannot be read: No such file or directory"),
        (["explain", "{t}/m.py"], "{t}/m.py"),
    ],
)
def test_user_errors(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.py").write_text("")
    filled = [argument.format(t=tmp_path, c=checkpoint) for argument in arguments]
    assert error_of(capsys, *filled).startswith(message.format(t=tmp_path, c=checkpoint))
    assert [path.name for path in tmp_path.iterdir()] == ["m.py"]


@pytest.mark.parametrize(
    "option",
    [["--tp", "0"], ["--tp", "x"], ["--page-size", "-3"], ["--dtype", "int8"], ["--max-context", "1e9"]],
)
def test_options_out_of_range(
    option: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["build", str(checkpoint), *option])
    assert stop.value.code == 2
    assert f"argument {option[0]}" in capsys.readouterr().err


def test_unknown_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["OddForCausalLM"], "auto_map": {"AutoModel": "evil.py"}})
    )
    assert error_of(capsys, "build", tmp_path) == (
        f"{tmp_path}/config.json: architectures is ['OddForCausalLM']; known are DeepseekV3ForCausalLM, "
        "KimiK2ForCausalLM, LlamaForCausalLM, MistralForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM. For "
        "another model write a model file and give it first: tscompile build my_model.py --weights DIR"
    )


def test_remote_code_never_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint with auto_map and Python files beside it: they are neither imported nor needed."""
    reference(SPECS["qwen3-tied"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("evil", "modeling_qwen3", "tokenization_qwen3"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    status, _, err = run(capsys, "build", tmp_path, "--tp", 2, "--no-text", "-o", tmp_path / "p.tsp")
    assert status == 0, err
    assert not (tmp_path / "ran").exists()


def test_dump_writes_every_pass_and_the_receipts(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--no-text", "--dump", tmp_path / "d", "--verify", "--json", "-o", tmp_path / "p.tsp")
    status, out, err = run(capsys, "build", checkpoint, "--tp", 2, "--target", "cpu-avx2", *words)
    assert status == 0, err
    names = sorted(path.name for path in (tmp_path / "d").iterdir())
    wanted = [f"{i:02d}-{name}" for i, name in enumerate(pipeline.ALL, 1)]
    smaller = [int(name.split("-")[-2]) for name in names if name.startswith(f"{wanted[-1]}-up-to-")]
    assert smaller, "two ranks take small steps and large ones alike: wanted a bucket for each"
    placed = wanted[pipeline.ALL.index("propagate") :]
    buckets = [f"{name}-up-to-{tokens}-tokens" for name in placed for tokens in smaller]
    dumped = sorted(f"{name}.txt" for name in (*wanted, *buckets, "receipts"))
    assert names == sorted([*dumped, "program-cpu-avx2.json"])
    receipts = (tmp_path / "d" / "receipts.txt").read_text()
    assert "qkv at layers.0.self_attn.attention.out (models/qwen3.py:41): matched" in receipts
    summary = json.loads(out)
    assert summary["verify"]["ranks"] == summary["ranks"] == 2
    assert 0 < summary["verify"]["max_difference"] < 3e-2
    report = json.loads(run(capsys, "inspect", tmp_path / "p.tsp", "--json")[1])
    assert report["verify"] == {k: v for k, v in summary["verify"].items() if k != "max_difference"}
    assert "verified  at build: 2 ranks of the fused graph" in run(capsys, "inspect", tmp_path / "p.tsp")[1]


def test_a_model_file_that_does_not_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = write({"MLP": "return self.down(torch.softmax(self.up(x), -1))"}, tmp_path)
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "softmax" in text)
    message = error_of(capsys, "build", path, "--weights", tmp_path, "-o", tmp_path / "p.tsp")
    assert message.startswith(
        f"mine.py:{line}: the function softmax is not supported. Supported functions and methods: "
    )
    assert not (tmp_path / "p.tsp").exists()


def test_our_bugs_are_called_so(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(build: Any) -> None:
        raise InternalError("the graph is upside down")

    monkeypatch.setattr("tscompile.passes.precision.run", broken)
    status, out, err = run(capsys, "build", checkpoint)
    assert (status, out) == (70, "")
    assert "tscompile: internal error: the graph is upside down" in err
    monkeypatch.setenv("TSCOMPILE_TRACEBACK", "1")
    with pytest.raises(InternalError):
        cli.main(["build", str(checkpoint)])


def test_verify_finds_a_pass_that_changes_the_model(tmp_path: Path) -> None:
    from test_interpret import captured

    path, _ = write(VARIANTS["plain"][0], tmp_path)
    build = captured(tmp_path, model=path)
    report, difference = check.verify_build(build)
    assert difference < 1e-5
    assert report["verified"]
    scale = next(op for group in build.graph.groups() for op in group.body if op.kind == "attention")
    scale.attrs["scale"] = 0.1
    message = (
        r"--verify: in step 1 of 5, \d+ tokens, as of up to 512, the logits of rank 0 of mesh\(tp=1\) differ "
        "by .* of the largest, wanted at most 1e-4"
    )
    with pytest.raises(InternalError, match=message):
        check.verify_build(build)


def test_verify_finds_one_rank_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_interpret import captured

    reference(SPECS["llama-mha"]).save_pretrained(tmp_path)
    build = captured(tmp_path, tp=2)
    assert check.verify_build(build)[0]["ranks"] == 2

    def wrong(ranks: list[list[torch.Tensor]], *_: object) -> list[torch.Tensor]:
        first, *others = (term for (term,) in ranks)
        return [sum(others, first), *others]

    own = dataclasses.replace(REGISTRY["all_reduce"], across=wrong)
    monkeypatch.setitem(REGISTRY, "all_reduce", own)
    with pytest.raises(InternalError, match=r"the logits of rank \d of mesh\(tp=2\) differ"):
        check.verify_build(build)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_steps_that_verify_runs(ranks: int) -> None:
    """Token counts that do not divide, prefills and decodes mixed, several sequences."""
    mesh = Mesh((("dp", 2), ("tp", ranks // 2)) if ranks > 4 else (("tp", ranks),))
    batches = check.random_steps(mesh, 100, 32, 4096)
    counts = [batch.query_start.diff().tolist() for batch in batches]
    assert len(counts) == check.STEPS
    assert max(len(each) for each in counts) == 3
    assert all(ranks == 1 or sum(each) % ranks for each in counts)
    assert any(1 in each and max(each) > 8 for each in counts)
    assert all(len(batch.logit_rows) == len(each) for batch, each in zip(batches, counts, strict=True))
    short = check.random_steps(mesh, 100, 32, 3)
    assert max(int(batch.context_len.max()) for batch in short) <= 3


def test_terminated_while_writing_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM in the middle of a build: exit status 143, and neither a plan nor its temporary file."""
    script = (
        "import os, signal, sys\n"
        "from tscompile import cli, plan\n"
        "plan.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    demo = Path(__file__).resolve().parents[2] / "artifacts/demo"
    command = [
        sys.executable,
        "-c",
        script,
        "build",
        str(demo),
        "--no-text",
        "-o",
        str(tmp_path / "plan.tsp"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    assert not list(tmp_path.iterdir())
