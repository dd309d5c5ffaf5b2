"""What the Python tests share: helpers importable from any folder, one plan built per session and kind, the
engine's library."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS / "runtime"), str(TESTS / "models"), str(TESTS.parent)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/passes/golden anew, to be reviewed")
