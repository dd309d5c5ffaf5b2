"""What clients see when the engine gives a request up, or is shut down beneath it. The plan's model has a
token whose embedding is not a number: once a sequence holds it, its logits are not finite."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import openai
import plans
import pytest
import torch
from conftest import Start
from front_server import Server
from safetensors.torch import load_file, save_file

POISON, GOOD = 300, 301
TO_POISON = {"max_tokens": 8, "logit_bias": {str(POISON): 100}}


@pytest.fixture(scope="module")
def poisoned(executable: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = checkpoints.make(checkpoints.SPECS["llama-mha"], tmp_path_factory.mktemp("poisoned"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    plan = plans.build(folder, folder / "plan.tsp", no_text=False)
    server = Server(executable, plan, folder / "log")
    yield server
    server.process.kill()
    server.process.wait()


def test_a_whole_answer(poisoned: Server) -> None:
    status, answer = poisoned.post("/v1/completions", {"prompt": [5, 6], **TO_POISON})
    assert status == 500
    assert answer["error"]["type"] == "server_error"
    assert "not finite" in answer["error"]["message"]


def test_a_stream_ends_with_an_error_after_what_was_there(poisoned: Server) -> None:
    body = {"prompt": [5, 6], "stream": True, **TO_POISON}
    connection = poisoned.open_stream(body)
    data = b""
    while part := connection.recv(65536):
        data += part
        if data.endswith(b"0\r\n\r\n"):
            break
    events = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
    assert json.loads(events[0])["choices"][0]["finish_reason"] is None
    assert "not finite" in json.loads(events[-1])["error"]["message"]
    assert b"[DONE]" not in data


def test_the_official_client_raises(poisoned: Server) -> None:
    client = openai.OpenAI(base_url=f"{poisoned.base}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        model="plan",
        messages=[{"role": "user", "content": "a"}],
        max_tokens=8,
        logit_bias={str(POISON): 100},
        stream=True,
    )
    with pytest.raises(openai.APIError, match="not finite"):
        list(stream)


def test_the_others_are_served(poisoned: Server) -> None:
    """The same answer before and after; a poisoned prompt fails each time."""
    prompt = [7] * 100
    asked = {"max_tokens": 8, "ignore_eos": True, "logit_bias": {str(GOOD): 1}}
    before = poisoned.complete(prompt, **asked)["choices"][0]["text"]
    for bad in ([*prompt, POISON, *prompt], [POISON] * 200):
        assert poisoned.post("/v1/completions", {"prompt": bad, "max_tokens": 1})[0] == 500
    assert poisoned.complete(prompt, **asked)["choices"][0]["text"] == before
    status, answer = poisoned.post("/v1/completions", {"prompt": [POISON] * 200, "max_tokens": 1})
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert poisoned.wait_idle() < 1


def test_a_stream_that_a_drain_cuts_off_is_told(start: Start) -> None:
    server = start("--drain-timeout", "0.2", "--max-seqs", "1")
    streams = [server.open_stream({"max_tokens": 2000, "n": 8}) for _ in range(2)]
    data = [stream.recv(1000) for stream in streams]
    assert server.stop() == 0
    for begun, stream in zip(data, streams, strict=True):
        rest = b""
        while part := stream.recv(65536):
            rest += part
        events = [line[6:] for line in (begun + rest).split(b"\n") if line.startswith(b"data: ")]
        error = json.loads(events[-1])["error"]
        assert error["code"] == "draining"
