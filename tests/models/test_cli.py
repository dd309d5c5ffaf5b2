"""The command line: exit statuses, one message an error, nothing left half-made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import SPECS, reference
from test_variants import VARIANTS, write

from tscompile import check, cli, pipeline
from tscompile.errors import InternalError


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
        f"{tmp_path}/config.json: architectures is ['OddForCausalLM']; known are LlamaForCausalLM, "
        "MistralForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM. For another model write a model file and "
        "give it first: tscompile build my_model.py --weights DIR"
    )


def test_remote_code_never_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint with auto_map and Python files beside it: they are neither imported nor needed."""
    reference(SPECS["qwen3-tied"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("evil", "modeling_qwen3", "tokenization_qwen3"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    error_of(
        capsys, "build", tmp_path, "--tp", 2, "-o", tmp_path / "p.tsp"
    )  # ends after fuse: no plan of two ranks yet
    assert not (tmp_path / "ran").exists()


def test_dump_writes_every_pass_and_the_receipts(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(
        capsys, "build", checkpoint, "--tp", 2, "--dump", tmp_path / "d", "--verify", "-o", tmp_path / "p.tsp"
    )
    assert message.startswith(
        "--tp 2: the model was placed for 2 ranks, but kernels and plans of more than one rank cannot"
    )
    names = sorted(path.name for path in (tmp_path / "d").iterdir())
    assert names == [f"{i:02d}-{name}.txt" for i, name in enumerate(pipeline.UP_TO_FUSE, 1)] + [
        "receipts.txt"
    ]
    assert (
        "qkv at layers.0.self_attn.attention.out (models/qwen3.py:41): matched"
        in (tmp_path / "d" / "receipts.txt").read_text()
    )
    assert not (tmp_path / "p.tsp").exists()


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


def test_verify_finds_a_pass_that_changes_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_interpret import captured

    path, _ = write(VARIANTS["plain"][0], tmp_path)
    build = captured(tmp_path, model=path)
    assert check.verify_build(build)["max_difference"] < 1e-5
    scale = next(op for group in build.graph.groups() for op in group.body if op.kind == "attention")
    scale.attrs["scale"] = 0.1
    with pytest.raises(
        InternalError, match=r"--verify: logits differ by .* of the largest, wanted at most 1e-04"
    ):
        check.verify_build(build)


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
