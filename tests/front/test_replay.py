"""A server that records, and is killed; its run, once more."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Start


def replay(executable: Path, plan: Path, trace: Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON on standard output ({} if there is none), and standard error."""
    command = [str(executable), "replay", str(plan), str(trace), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.fixture
def trace(start: Start, tmp_path: Path) -> Path:
    """Of a server with few pages, killed at work: sampling, preemption, deadlines, disconnects."""
    file = tmp_path / "run.trace"
    server = start("--record", str(file), "--num-pages", "24", "--max-draft", "4", "--target-tpot-ms", "2")
    server.complete("The first of them.", max_tokens=40)
    for seed in range(4):
        server.complete("Another one.", max_tokens=20, temperature=0.9, seed=seed, ignore_eos=True)
    late = {"prompt": "late", "max_tokens": 400, "ignore_eos": True, "timeout": 0.001}
    assert server.post("/v1/completions", late)[0] == 504
    streams = [
        server.open_stream({"prompt": [5 + n] * 60, "max_tokens": 300, "temperature": 0.8}) for n in range(8)
    ]
    for stream in streams:
        assert stream.recv(1000)
    for stream in streams[::2]:
        stream.close()
    size = file.stat().st_size
    while file.stat().st_size < size + 4000:
        time.sleep(0.001)
    server.process.kill()
    server.process.wait()
    return file


def test_a_killed_run_is_the_same_again(executable: Path, plan: Path, trace: Path) -> None:
    assert trace.stat().st_mode & 0o777 == 0o600
    code, said, errors = replay(executable, plan, trace)
    assert code == 0, errors
    assert said["difference"] is None
    assert said["requests"] >= 14
    assert said["steps"] > 100
    assert said["output_tokens"] > 100

    whole = trace.read_bytes()
    trace.write_bytes(whole[:-5])
    code, cut, errors = replay(executable, plan, trace)
    assert code == 0, errors
    assert cut["bytes_cut_off"] > 0
    assert "not written whole" in errors

    trace.write_bytes(
        whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    )
    code, _, errors = replay(executable, plan, trace)
    assert code == 2
    assert f"'{trace}' is damaged" in errors


def test_what_cannot_be_replayed(
    executable: Path, plan: Path, plan_without_text: Path, start: Start, tmp_path: Path
) -> None:
    trace = tmp_path / "run.trace"
    server = start("--record", str(trace))
    server.complete([5, 6, 7], max_tokens=3)
    assert server.stop() == 0
    code, said, errors = replay(executable, plan, trace)
    assert (code, said["requests"], said["output_tokens"]) == (0, 1, 3), errors
    code, _, errors = replay(executable, plan_without_text, trace)
    assert code == 2
    assert "was recorded with another plan" in errors
    code, _, errors = replay(executable, plan, plan)
    assert code == 2
    assert "no trace" in errors

    command = [str(executable), "run", str(plan), "--port", "0", "--record", str(trace)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "is there already" in done.stderr
