"""Clients that come in crowds, leave early or stop reading cost only themselves."""

from __future__ import annotations

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Start
from front_server import Server, head

LONG = {"max_tokens": 2000}
NUM_IDLE = 1000


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        part = connection.recv(65536)
        assert part, f"closed after {data[-300:]!r}"
        data += part
    return data


@pytest.mark.parametrize("n", [1, 4])
def test_a_stream_whose_client_leaves_is_cancelled_at_once(server: Server, n: int) -> None:
    before = server.metrics()
    connection = server.open_stream({**LONG, "n": n})
    read_until(connection, b'"text":')
    connection.close()
    assert server.wait_idle() < 1
    made = server.metrics()["generation_tokens_total"] - before["generation_tokens_total"]
    assert 0 < made < 2000 * n, "the rest was never computed"


def test_a_whole_answer_whose_client_leaves_is_cancelled_at_once(server: Server) -> None:
    before = server.metrics()
    body = json.dumps({"prompt": [1], "ignore_eos": True, **LONG}).encode()
    connection = server.connect()
    connection.sendall(head("/v1/completions", len(body)) + body)
    while server.metrics()["generation_tokens_total"] == before["generation_tokens_total"]:
        time.sleep(0.005)
    connection.close()
    assert server.wait_idle() < 1
    assert server.metrics()["generation_tokens_total"] - before["generation_tokens_total"] < 2000


def test_a_stop_string_ends_the_work_too(server: Server) -> None:
    before = server.metrics()
    first = server.complete([1], max_tokens=1, ignore_eos=True)["choices"][0]["text"]
    assert first
    answer = server.complete([1], ignore_eos=True, stop=first[0], **LONG)
    assert answer["choices"][0]["text"] == ""
    assert server.wait_idle() < 1
    assert server.metrics()["generation_tokens_total"] - before["generation_tokens_total"] < 1000


def test_a_thousand_idle_streams_cost_no_thread_each(start: Start) -> None:
    server = start("--max-queue", "2000")
    server.complete([1], max_tokens=1)
    threads, memory = server.threads(), server.resident_bytes()
    streams = [server.open_stream(LONG) for _ in range(NUM_IDLE)]
    for stream in streams:
        assert b"200 OK" in read_until(stream, b"\r\n\r\n")
    metrics = server.metrics()
    assert metrics["num_requests_running"] + metrics["num_requests_waiting"] > NUM_IDLE / 2
    more = [name for name in server.threads() if name != "ts-blocking"]
    assert len(more) <= len(threads), f"{threads} became {server.threads()}"
    assert server.threads().count("ts-blocking") <= 2
    assert server.resident_bytes() - memory < NUM_IDLE * 100_000
    # Others are told to wait or served; nobody hangs.
    assert server.get("/health") == (200, {"status": "ok"})
    for stream in streams:
        stream.close()
    assert server.wait_idle() < 5
    assert server.complete([1], max_tokens=2)["usage"]["completion_tokens"] == 2


def test_a_full_queue_says_come_back(start: Start) -> None:
    server = start("--max-queue", "4", "--max-seqs", "1")
    streams = [server.open_stream(LONG) for _ in range(5)]
    statuses = [read_until(stream, b"\r\n\r\n") for stream in streams]
    deadline = time.monotonic() + 20
    status, answer = 200, None
    while status == 200 and time.monotonic() < deadline:
        extra = server.open_stream(LONG)
        streams.append(extra)
        statuses.append(read_until(extra, b"\r\n\r\n"))
        status = int(statuses[-1].split(b" ")[1])
        answer = statuses[-1]
    assert status == 429, answer
    assert re.search(rb"\r\nretry-after: [1-9][0-9]*\r\n", statuses[-1].lower())
    for stream in streams:
        stream.close()
    assert server.wait_idle() < 5
    server.complete([1], max_tokens=1)


def test_a_client_that_stops_reading_is_dropped_and_costs_only_itself(start: Start) -> None:
    server = start("--write-timeout", "1")
    before = server.resident_bytes()
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", server.port))
    # Some 30 MB of answer, of which nobody takes a byte.
    body = json.dumps(
        {"prompt": [1], "ignore_eos": True, "stream": True, "n": 8, "logprobs": 20, **LONG}
    ).encode()
    slow.sendall(head("/v1/completions", len(body)) + body)
    begun = time.monotonic()
    for i in range(5):
        assert server.complete(f"x{i} =", max_tokens=8)["usage"]["completion_tokens"] == 8
    assert time.monotonic() - begun < 20
    deadline = time.monotonic() + 60
    while num_connections(server) > 0:
        assert time.monotonic() < deadline, "the client was never dropped"
        time.sleep(0.1)
    assert server.wait_idle() < 20
    assert server.resident_bytes() - before < 200 << 20
    slow.close()


def num_connections(server: Server) -> int:
    """Established connections to the server's port that the server still holds."""
    port = f":{server.port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(1 for line in lines if line.split()[1].endswith(port) and line.split()[3] == "01")


def test_load(server: Server) -> None:
    """Many clients at once get what each of them gets alone."""
    requests: list[dict[str, Any]] = [
        {
            "prompt": f"def f{i}(a, b):\n" + "    a += b\n" * (i % 7),
            "max_tokens": 4 + i % 29,
            "temperature": (i % 3) / 2,
            "seed": i,
            "n": 1 + i % 2,
        }
        for i in range(48)
    ]
    before = server.metrics()["request_success_total"]

    def texts(request: dict[str, Any]) -> list[str]:
        status, answer = server.post("/v1/completions", request)
        assert status == 200, answer
        return [choice["text"] for choice in answer["choices"]]

    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(texts, requests))
    assert together == [texts(request) for request in requests]
    sequences = sum(request["n"] for request in requests)
    assert server.metrics()["request_success_total"] - before == 2 * sequences
