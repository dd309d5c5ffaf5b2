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


def served(executable: Path, plan: Path, requests: list[dict[str, object]], *arguments: str) -> list[str]:
    """Which request ends first, second, ..., one at a time."""
    lines = "\n".join(json.dumps({"prompt": [1], "ignore_eos": True, **request}) for request in requests)
    command = [str(executable), "generate", str(plan), "--jsonl", "--max-seqs", "1", *arguments]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    _ready, *answers = done.stdout.strip().split("\n")
    order = [json.loads(answer)["id"] for answer in answers]
    assert len(order) == len(requests)
    return order


def test_a_tenant_with_many_requests_does_not_hold_up_another(executable: Path, plan: Path) -> None:
    many = [{"id": f"many {i}", "cache_salt": "many", "max_tokens": 300} for i in range(6)]
    order = served(executable, plan, [*many, {"id": "one", "cache_salt": "one", "max_tokens": 2}])
    assert order.index("one") < order.index("many 5"), "who came first does not go first for ever"


@pytest.mark.parametrize(("patience", "last"), [("0.001", False), ("10000", True)])
def test_a_lower_class_waits_as_long_as_patience_says(
    executable: Path, plan: Path, patience: str, last: bool
) -> None:
    urgent = [{"id": f"urgent {i}", "priority": -8, "max_tokens": 300} for i in range(6)]
    order = served(executable, plan, [*urgent, {"id": "one", "max_tokens": 2}], "--patience", patience)
    assert (order[-1] == "one") == last


def test_prompts_leave_decodes_their_time_per_token(start: Start) -> None:
    """A target that no step can keep: a prompt goes on by 16 tokens a step for as long as another decodes."""
    server, prompt = start("--target-tpot-ms", "0.001"), list(range(100, 900))
    for attempt in range(10):
        with server.open_stream(LONG) as stream:
            while b"data:" not in stream.recv(4096):
                pass
            before = server.metrics()["steps_total"]
            server.complete([attempt, *prompt], max_tokens=1)
            after = server.metrics()
        if after["num_requests_running"] == 1:  # it still decodes
            assert after["steps_total"] - before >= len(prompt) / 16
            return
        server.wait_idle()
    raise AssertionError("2,000 tokens were always made before a prompt of 800 was read")
