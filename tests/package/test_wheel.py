"""The wheel: built, installed into an empty environment without any dependency, and served from."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [
        str(Path(sys.executable).parent / "maturin"),
        "build",
        "--release",
        "--locked",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("tscompile-*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-index", str(wheel)]
    subprocess.run(pip, check=True)
    return folder / "bin"


def clean_env() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}} | {
        "PATH": "/usr/bin:/bin"
    }


def test_serves_without_torch(environment: Path, demo_plan: Path) -> None:
    probe = "from importlib.util import find_spec as f; assert not f('torch'), 'torch is installed'"
    subprocess.run([str(environment / "python"), "-c", probe], check=True, env=clean_env())
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen(
        [str(environment / "tsruntime"), "run", str(demo_plan), "--port", str(port)], env=clean_env(), cwd="/"
    )
    try:
        base = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{base}/ready", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, "the server stopped"
                time.sleep(0.05)
        body = json.dumps({"model": demo_plan.stem, "prompt": "import os\n", "max_tokens": 8}).encode()
        request = urllib.request.Request(f"{base}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert answer["usage"]["completion_tokens"] >= 1
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


def test_python_package_generates(environment: Path, demo_plan: Path) -> None:
    code = (
        "import sys; from tsruntime import LLM\n"
        "with LLM(sys.argv[1]) as llm: (out,) = llm.generate(['import os\\n'], max_tokens=4, temperature=0)\n"
        "assert len(out['ids']) == 4 and isinstance(out['text'], str), out"
    )
    subprocess.run(
        [str(environment / "python"), "-c", code, str(demo_plan)], check=True, env=clean_env(), cwd="/"
    )


def test_compiler_says_what_it_needs(environment: Path, tmp_path: Path) -> None:
    """Without torch, `tscompile build` fails with one line that says how to install it."""
    command = [str(environment / "tscompile"), "build", str(tmp_path), "-o", str(tmp_path / "plan.tsp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_env(), cwd="/")
    assert done.returncode == 2
    assert "pip install" in done.stderr
    assert "tscompile[build]" in done.stderr
    assert "Traceback" not in done.stderr
