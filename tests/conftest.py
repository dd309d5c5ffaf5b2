"""What the Python tests share: helpers importable from any folder, one plan built per session and kind, the
engine's library."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS / "runtime"), str(TESTS / "models"), str(TESTS.parent)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/passes/golden anew")
    parser.addoption("--cases", type=int, default=2000, help="how many random modules are placed")
    parser.addoption("--first-case", type=int, default=0, help="the first one's seed")


@pytest.fixture(scope="session")
def demo_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint, compiled for this machine."""
    path = tmp_path_factory.mktemp("plan") / "demo.tsp"
    command = [
        sys.executable,
        "-m",
        "tscompile.cli",
        "build",
        str(TESTS.parent / "artifacts/demo"),
        "-o",
        str(path),
    ]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path
