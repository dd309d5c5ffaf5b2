"""Classes, deadlines and who is served next, as clients see it."""

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from front_server import Server

Start = Callable[..., Server]
LONG = {"prompt": [1], "max_tokens": 2000, "ignore_eos": True, "temperature": 0}


def test_a_deadline_that_passes_is_an_error_that_says_how_far_it_came(start: Start) -> None:
    server = start()
    request = urllib.request.Request(
        server.base + "/v1/completions",
        json.dumps(LONG | {"timeout": 0.05}).encode(),
        {"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 504
    assert refused.value.headers["x-should-retry"] == "false"
    body = json.load(refused.value)["error"]
    assert body["code"] == "timeout"
    assert body["message"].startswith("the request's timeout of 0.050 s is over: ")
    assert server.wait_idle() < 5
    assert server.complete([1], max_tokens=2, timeout=60, priority=-8)["usage"]["completion_tokens"] == 2


def test_a_stream_past_its_deadline_ends_with_the_error(start: Start) -> None:
    server = start()
    stream = server.open_stream(LONG | {"timeout": 0.2})
    with stream.makefile("rb") as lines:
        error = next(line for line in lines if line.startswith(b'data: {"error"'))
    last = json.loads(error.removeprefix(b"data: "))
    assert last["error"]["code"] == "timeout"
    assert "of at most 2000 tokens were made" in last["error"]["message"]


def test_a_tenant_with_many_requests_does_not_hold_up_another(executable: Path, plan: Path) -> None:
    many = [{"id": f"many {i}", "cache_salt": "many", "max_tokens": 300} for i in range(6)]
    one = {"id": "one", "cache_salt": "one", "max_tokens": 2}
    lines = "\n".join(json.dumps({"prompt": [1], "ignore_eos": True, **r}) for r in [*many, one])
    command = [str(executable), "generate", str(plan), "--jsonl", "--max-seqs", "1"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    _ready, *answers = done.stdout.strip().split("\n")
    order = [json.loads(answer)["id"] for answer in answers]
    assert len(order) == 7
    assert order.index("one") < order.index("many 5"), "who came first does not go first for ever"
