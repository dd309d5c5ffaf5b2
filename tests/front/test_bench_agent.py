"""`tsruntime bench agent` against a server of ours: what it reports is what the server saw."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from front_server import Server

SMALL = ["--first", "300", "--next", "40", "--output", "8", "--system", "100", "--turns", "3", "--think", "0"]


def bench(executable: Path, server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(executable), "bench", "agent", *arguments]
    if "--url" not in arguments:
        command += ["--url", f"{server.base}/v1"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def report(executable: Path, server: Server, *arguments: str) -> Any:
    done = bench(executable, server, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sessions_are_served_and_counted(executable: Path, server: Server, tmp_path: Path) -> None:
    before = server.metrics()
    svg = tmp_path / "a.svg"
    found = report(executable, server, *SMALL, "--concurrency", "1,3", "--svg", str(svg))
    after = server.metrics()
    one, three = found["levels"]
    assert [(level["concurrency"], level["turns"]) for level in (one, three)] == [(1, 3), (3, 9)]
    assert (one["failed"], three["failed"], three["failure"]) == (0, 0, None)
    assert (one["output_tokens"], three["output_tokens"]) == (24, 72)
    # two prompts more, of one token each, to learn how many characters make a token
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 24 + 72 + 2
    # 300, then 300 + 48 + ..., about: the text is made from characters
    assert 3 * 300 < one["prompt_tokens"] < 3 * 500
    assert 0.4 < one["prefix_hit_rate"] < 1, "each turn finds the one before it"
    for level in (one, three):
        assert 0 < level["first_token_ms"]["p50"] <= level["first_token_ms"]["p99"]
        assert level["tokens_per_s_user"] > 0 < level["tokens_per_s_device"]
    marks = [element.tag for element in ElementTree.parse(svg).iter() if element.tag.endswith("circle")]
    assert len(marks) == 2


def test_a_trace_is_replayed_and_compared(executable: Path, server: Server, tmp_path: Path) -> None:
    trace, first = tmp_path / "trace.jsonl", tmp_path / "first.json"
    turns = [{"session": "a", "content": "def f(x):", "output_tokens": 5}]
    turns += [{"session": name, "think_s": 0.01, "input_tokens": 20, "output_tokens": 4} for name in "ba"]
    trace.write_text("\n".join(map(json.dumps, turns)))
    found = report(executable, server, "--trace", str(trace), "--concurrency", "2")
    assert (found["levels"][0]["turns"], found["levels"][0]["output_tokens"]) == (3, 13)
    first.write_text(json.dumps(found | {"name": "the first server"}))
    svg = tmp_path / "both.svg"
    report(executable, server, *SMALL, "--concurrency", "1", "--compare", str(first), "--svg", str(svg))
    assert "the first server" in svg.read_text()


def test_failures_are_told(executable: Path, server: Server, tmp_path: Path) -> None:
    done = bench(executable, server, "--first", "5000", "--concurrency", "1")
    assert done.returncode == 1
    assert "the context holds 2048" in done.stderr
    for arguments, code, words in [
        (["--url", "ftp://x"], 2, "wanted http://"),
        (["--url", "http://127.0.0.1:1/v1"], 1, "refused"),
        (["--model", "none"], 1, "does not exist"),
        (["--trace", str(tmp_path / "none")], 2, "No such file"),
        (["--turns", "5-2"], 2, "wanted turns"),
    ]:
        done = bench(executable, server, *arguments)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr
