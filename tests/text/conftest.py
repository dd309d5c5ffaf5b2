"""The compiled text of each checkpoint, and the commands that speak JSON lines."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from text_vocabularies import checkpoint
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
Lines = Callable[[str, Path, Iterable[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def tstext() -> Path:
    """The executable, built from what is there now."""
    command = [
        "cargo",
        "build",
        "--quiet",
        "--release",
        "--locked",
        "-p",
        "tsruntime-text",
        "--bin",
        "tstext",
    ]
    subprocess.run(command, cwd=ROOT / "tsruntime", check=True)
    return ROOT / "tsruntime" / "target" / "release" / "tstext"


@pytest.fixture(scope="session")
def lines(tstext: Path) -> Lines:
    """Runs one of the JSON-lines commands over requests."""

    def run(name: str, folder: Path, requests: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        text = "\n".join(json.dumps(request, ensure_ascii=False) for request in requests)
        result = subprocess.run([tstext, name, folder], input=text.encode(), capture_output=True, check=True)
        return [json.loads(line) for line in result.stdout.splitlines()]

    return run


@pytest.fixture(scope="session")
def compiled(
    tstext: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Tokenizer]]:
    """The compiled form of a kind of tokenizer, and its reference."""
    made: dict[str, tuple[Path, Tokenizer]] = {}

    def get(kind: str) -> tuple[Path, Tokenizer]:
        if kind not in made:
            source = checkpoint(kind)
            out = tmp_path_factory.mktemp(kind)
            subprocess.run([tstext, "compile", source, "-o", out], check=True)
            made[kind] = out, Tokenizer.from_file(str(source / "tokenizer.json"))
        return made[kind]

    return get
