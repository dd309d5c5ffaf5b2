"""A server under test, driven over HTTP and raw sockets."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


class Server:
    """A running `tsruntime run`, ready for requests; `log` has what it says on standard error."""

    def __init__(self, executable: Path, plan: Path, log: Path, *arguments: str, **environment: str) -> None:
        self.log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [str(executable), "run", str(plan), "--port", "0", *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | environment,
            )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().decode()
        found = re.search(r"ready at http://[\d.]+:(\d+)/v1 after (\d+) ms", self.line)
        assert found, f"{self.line}{log.read_text()}"
        self.port = int(found[1])
        self.base = f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self._send(urllib.request.Request(self.base + path, headers=headers))

    def post(self, path: str, body: object, **headers: str) -> tuple[int, Any]:
        """`body` is JSON to be, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | headers
        return self._send(urllib.request.Request(self.base + path, data, headers))

    def complete(self, prompt: object, **fields: object) -> Any:
        status, answer = self.post("/v1/completions", {"prompt": prompt, "temperature": 0, **fields})
        assert status == 200, answer
        return answer

    def _send(self, request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def open_stream(self, fields: dict[str, object]) -> socket.socket:
        """A connection on which a streamed completion has been asked for; nothing of the answer is read."""
        body = json.dumps({"prompt": [1], "ignore_eos": True, "stream": True, **fields}).encode()
        connection = self.connect()
        connection.sendall(head("/v1/completions", len(body)) + body)
        return connection

    def metrics(self) -> dict[str, float]:
        """Every sample by its name, labels dropped; samples of one name are summed."""
        with urllib.request.urlopen(self.base + "/metrics", timeout=60) as response:
            text = response.read().decode()
        samples: dict[str, float] = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name = line.split("{")[0].removeprefix("tsruntime:")
                samples[name] = samples.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
        return samples

    def wait_idle(self, timeout_s: float = 10.0) -> float:
        """Until no sequence runs or waits; the seconds that it took."""
        start = time.monotonic()
        while time.monotonic() < start + timeout_s:
            metrics = self.metrics()
            if metrics["num_requests_running"] == 0 == metrics["num_requests_waiting"]:
                return time.monotonic() - start
            time.sleep(0.01)
        raise AssertionError(f"still busy after {timeout_s} s: {metrics}")

    def threads(self) -> list[str]:
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sorted((task / "comm").read_text().strip() for task in tasks)

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]

    def stop(self, timeout_s: float = 60.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


CHUNKED_HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def head(path: str, content_length: int) -> bytes:
    """The head of a POST of JSON."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {content_length}\r\n\r\n"
    ).encode()
