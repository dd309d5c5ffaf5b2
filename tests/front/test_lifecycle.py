"""From the first bind to the last drained stream."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import Start
from front_server import Server


def fails(executable: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a command that says one line and leaves."""
    done = subprocess.run(
        [str(executable), *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "panicked" not in done.stderr
    return done.returncode, done.stderr


def test_one_line_says_where_and_how_soon(server: Server) -> None:
    assert server.line.startswith("tsruntime: ")
    assert f"http://127.0.0.1:{server.port}/v1" in server.line
    assert server.get("/ready") == (200, {"status": "ready"})
    assert server.get("/version") == (200, {"version": "0.1.0"})


def test_a_port_in_use(executable: Path, plan: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, error = fails(executable, "run", str(plan), "--port", str(port))
    assert code == 4
    assert f"cannot listen on 127.0.0.1:{port}" in error
    assert "--port" in error


def test_plans_that_cannot_be_served(executable: Path, plan: Path, tmp_path: Path) -> None:
    data = plan.read_bytes()
    for name, content in {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "flipped": data[:1000] + bytes([data[1000] ^ 1]) + data[1001:],
        "text": b"hello " * 1000,
    }.items():
        path = tmp_path / f"{name}.tsp"
        path.write_bytes(content)
        code, error = fails(executable, "run", str(path), "--port", "0")
        assert code == 3, error
        assert str(path) in error
    code, error = fails(executable, "generate", str(tmp_path / "none.tsp"), "-p", "a")
    assert code in {1, 3}
    assert "none.tsp" in error
    code, error = fails(executable, "run", str(plan), "--port", "0", "--target", "cpu-none")
    assert code in {2, 3}
    assert "cpu-none" in error


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while part := connection.recv(65536):
        data += part
        if b"[DONE]" in data:
            break
    return data


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(start: Start, number: signal.Signals) -> None:
    server = start()
    assert (
        server.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        )[0]
        == 200
    )
    stream = server.open_stream({"max_tokens": 1500})
    begun = stream.recv(65536)
    assert b"200 OK" in begun
    server.process.send_signal(number)
    deadline = time.monotonic() + 10
    while "draining" not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for status, answer in [server.get("/ready"), server.post("/v1/completions", {"prompt": "a"})]:
        assert (status, answer["error"]["code"]) == (503, "draining")
    assert server.get("/health")[0] == 200
    data = begun + read_all(stream)
    assert b"[DONE]" in data, "the running stream was finished"
    assert data.count(b'"finish_reason":"length"') == 1
    assert server.process.wait(10) == 0


def test_a_drain_has_an_end(start: Start) -> None:
    server = start("--drain-timeout", "0.2", "--max-seqs", "1")
    streams = [server.open_stream({"max_tokens": 2000, "n": 8}) for _ in range(4)]
    for stream in streams:
        assert stream.recv(1000)
    begun = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begun < 5
    assert re.search(r"\d requests were still running and are cut off", server.log.read_text())


def test_a_second_signal_ends_at_once(start: Start) -> None:
    server = start("--max-seqs", "1")
    streams = [server.open_stream({"max_tokens": 2000, "n": 8}) for _ in range(4)]
    for stream in streams:
        assert stream.recv(1000)
    server.process.send_signal(signal.SIGTERM)
    while "draining" not in server.log.read_text():
        time.sleep(0.005)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(5) == 128 + signal.SIGINT


def test_api_keys(start: Start) -> None:
    server = start("--api-key", "first", TSRUNTIME_API_KEY="unused: the flag wins")
    body = {"prompt": "a", "max_tokens": 1}
    for headers in [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic first"},
        {"X-Api-Key": "first"},
    ]:
        for status, answer in [
            server.post("/v1/completions", body, **headers),
            server.get("/v1/models", **headers),
        ]:
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert server.post("/v1/completions", body, Authorization="Bearer first")[0] == 200
    for path in ["/health", "/ready", "/version"]:
        assert server.get(path)[0] == 200
    assert server.metrics()["http_requests_total"] > 0
    several = start(TSRUNTIME_API_KEY="one,two")
    for key in ["one", "two"]:
        assert several.get("/v1/models", Authorization=f"Bearer {key}")[0] == 200
    assert several.get("/v1/models", Authorization="Bearer one,two")[0] == 401


def test_names(start: Start) -> None:
    server = start("--served-model-name", "first", "--served-model-name", "org/second")
    assert [card["id"] for card in server.get("/v1/models")[1]["data"]] == ["first", "org/second"]
    assert server.get("/v1/models/org/second")[1]["id"] == "org/second"
    for name, status in [("first", 200), ("org/second", 200), ("demo", 404), ("", 404)]:
        assert server.post("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 1})[0] == status


def test_metrics(server: Server) -> None:
    before = server.metrics()
    server.complete("import os\n", max_tokens=5, ignore_eos=True)
    after = server.metrics()
    grew = {name: after[name] - before.get(name, 0) for name in after}
    assert grew["generation_tokens_total"] == 5
    assert grew["request_generation_tokens_sum"] == 5
    assert grew["prompt_tokens_total"] == grew["request_prompt_tokens_sum"] > 0
    assert grew["request_success_total"] == 1
    for name in ["time_to_first_token", "e2e_request_latency", "request_time_per_output_token"]:
        assert grew[f"{name}_seconds_count"] == 1
        assert grew[f"{name}_seconds_sum"] > 0
    assert grew["inter_token_latency_seconds_count"] == 4
