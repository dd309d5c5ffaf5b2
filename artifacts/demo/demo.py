"""Serve a plan, stream one chat answer and one completion over HTTP, and say how fast. Standard library only.

python artifacts/demo/demo.py artifacts/demo.tsp
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

CHAT = "Complete this function:\n```python\ndef read_lines(path):\n```"
SAMPLING = {"max_tokens": 160, "temperature": 0.7, "top_p": 0.9, "seed": 7}
CODE = 'class Queue:\n    """A first-in, first-out queue."""\n\n    def __init__(self, maxsize=0):\n'


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_ready(base: str, server: subprocess.Popen[bytes], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"the server stopped with exit code {server.returncode}")
        try:
            urllib.request.urlopen(f"{base}/ready", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.005)
    sys.exit(f"the server was not ready within {timeout_s:.0f} s")


def stream(url: str, body: dict[str, object]) -> Iterator[dict[str, object]]:
    """The JSON chunks of a server-sent event stream."""
    request = urllib.request.Request(
        url,
        json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        for line in response:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                yield json.loads(line[6:])


def show(title: str, url: str, body: dict[str, object]) -> None:
    print(f"\n\033[1m{title}\033[0m\n")
    start = time.perf_counter()
    first = None
    tokens = 0
    for chunk in stream(url, body):
        for choice in chunk["choices"]:  # type: ignore[attr-defined]
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            if text:
                first = first or time.perf_counter()
                print(text, end="", flush=True)
        if chunk.get("usage"):
            tokens = chunk["usage"]["completion_tokens"]  # type: ignore[index]
    end = time.perf_counter()
    first = first or end
    rate = (tokens - 1) / (end - first) if tokens > 1 else 0.0
    print(f"\n\n  {tokens} tokens, first after {(first - start) * 1e3:.1f} ms, then {rate:.0f} tokens/s")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: demo.py plan.tsp")
    plan = Path(sys.argv[1])
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    executable = Path(sys.executable).parent / "tsruntime"
    start = time.perf_counter()
    command = [str(executable), "run", str(plan), "--port", str(port), "--served-model-name", plan.stem]
    server = subprocess.Popen(command)
    try:
        wait_ready(base, server)
        print(f"ready {(time.perf_counter() - start) * 1e3:.0f} ms after the process was started, at {base}")
        show(
            "POST /v1/completions",
            f"{base}/v1/completions",
            {"model": plan.stem, "prompt": CODE, **SAMPLING},
        )
        print(f"\n\033[2m{CHAT}\033[0m")
        show(
            "POST /v1/chat/completions",
            f"{base}/v1/chat/completions",
            {"model": plan.stem, "messages": [{"role": "user", "content": CHAT}], **SAMPLING},
        )
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    print("\nNext: .venv/bin/tsruntime run artifacts/demo.tsp")


if __name__ == "__main__":
    main()
