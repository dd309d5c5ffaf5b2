"""A large vocabulary is ready, and a long prompt encoded, in the time that is promised: CPU time."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from text_corpus import python_sources
from tokenizers import Tokenizer

READY_MS_MAX = 100
ENCODE_50K_MS_MAX = 30


def cpu_ms(command: list[str | Path], text: str) -> float:
    """User and system time of one run; the least of five."""
    runs = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            command, input=json.dumps({"text": text}), text=True, stdout=subprocess.DEVNULL, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        runs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(runs) * 1e3


@pytest.mark.parametrize("kind", ["qwen", "llama3", "mistral_v1", "mistral_v3"])
def test_cpu_time(kind: str, tstext: Path, compiled: Callable[[str], tuple[Path, Tokenizer]]) -> None:
    folder, reference = compiled(kind)
    # 200 KB are about 50,000 tokens of Python.
    text = "".join(python_sources())[:200_000]
    tokens = len(reference.encode(text).ids)
    ready_ms = cpu_ms([tstext, "encode", folder], "")
    total_ms = cpu_ms([tstext, "encode", folder], text)
    assert ready_ms < READY_MS_MAX
    assert (total_ms - ready_ms) * 50_000 / tokens < ENCODE_50K_MS_MAX
