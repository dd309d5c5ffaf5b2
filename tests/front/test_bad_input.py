"""What clients get wrong, by accident or on purpose: one clear error each, and the server goes on."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest
from conftest import Start
from front_server import CHUNKED_HEAD, Server, head

HUGE = 2**31


@pytest.fixture(autouse=True)
def still_serves(server: Server) -> Any:
    """After every test the server answers as before."""
    yield
    assert server.complete("import", max_tokens=2)["usage"]["completion_tokens"] == 2


def error_of(answer: tuple[int, Any], status: int) -> dict[str, Any]:
    """The error, whose shape is OpenAI's whatever it is about."""
    found, body = answer
    assert found == status, body
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    return dict(body["error"])


MALFORMED: list[tuple[str, bytes, str]] = [
    ("empty", b"", "the body is empty"),
    ("cut", b'{"prompt": "a"', "EOF while parsing an object at line 1 column 14"),
    ("trailing comma", b'{"prompt": "a",}', "line 1 column 16"),
    ("two values", b'{"prompt": "a"} {}', "trailing characters at line 1 column 17"),
    ("not an object", b'["prompt"]', "the body is an array of 1; a JSON object is wanted"),
    ("NaN", b'{"prompt": "a", "temperature": NaN}', "line 1 column 32"),
    ("infinity", b'{"prompt": "a", "temperature": 1e999}', "number out of range"),
    ("minus infinity", b'{"prompt": "a", "temperature": -1e999}', "number out of range"),
    ("twice", b'{"prompt": "a", "prompt": "b"}', '"prompt" appears twice'),
    ("twice below", b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', '"1" appears twice'),
    ("lone surrogate", b'{"prompt": "\\ud800"}', "hex escape"),
    ("not UTF-8", b'{"prompt": "\xff"}', "byte 12 begins no character"),
    ("UTF-16", '{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
    ("deep array", b"[" * 100_000, "recursion limit exceeded"),
    ("deep object", b'{"a":' * 100_000, "recursion limit exceeded"),
    ("deep value", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion limit exceeded"),
]


@pytest.mark.parametrize(
    ("body", "message"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_malformed_json(server: Server, path: str, body: bytes, message: str) -> None:
    assert message in error_of(server.post(path, body), 400)["message"]


FIELDS: list[tuple[str, object]] = [
    (name, value)
    for name in ["max_tokens", "n", "top_k", "seed", "logprobs", "min_tokens"]
    for value in [HUGE, -HUGE, 2**63, -(2**63) - 1, 1.5, "3", True, [], {}]
    if not (name == "seed" and value in (HUGE, -HUGE))
] + [
    (name, value)
    for name in [
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ]
    for value in [1e30, -1e30, HUGE, -HUGE, "hot", True, [1], {}]
]


@pytest.mark.parametrize(("name", "value"), FIELDS)
def test_values_that_cannot_be(server: Server, name: str, value: object) -> None:
    error = error_of(server.post("/v1/completions", {"prompt": "a", name: value}), 400)
    assert error["param"] == name
    assert f"`{name}`" in error["message"]


PROMPTS: list[tuple[object, str]] = [
    (None, "`prompt` is missing"),
    ("", "at least one token"),
    ([], "at least one token"),
    ([[]], "at least one token"),
    ([""], "at least one token"),
    (5, "`prompt` is 5"),
    ({}, "`prompt` is an object"),
    ([1, "a"], "`prompt[1]` is the string"),
    (["a", 1], "`prompt[1]` is 1"),
    ([4096], "`prompt[0]` is 4096; an integer from 0 to 4095 is wanted"),
    ([-1], "`prompt[0]` is -1"),
    ([HUGE], f"`prompt[0]` is {HUGE}"),
    ([[1], [2**40]], f"`prompt[1][0]` is {2**40}"),
    ([1] * 2048, "the prompt has 2048 tokens, but the context holds 2048"),
    ("a" * 2**20, "the context holds 2048"),
    (["a"] * 2000, "2000 prompts times `n` 1 are 2000 sequences; at most 1024"),
]


@pytest.mark.parametrize(("prompt", "message"), PROMPTS, ids=range(len(PROMPTS)))
def test_prompts_that_cannot_be(server: Server, prompt: object, message: str) -> None:
    assert (
        message
        in error_of(server.post("/v1/completions", {"prompt": prompt, "max_tokens": 1}), 400)["message"]
    )


def test_prompt_and_output_must_fit_together(server: Server) -> None:
    error = error_of(server.post("/v1/completions", {"prompt": [1] * 2000, "max_tokens": 49}), 400)
    assert error["code"] == "context_length_exceeded"
    for number in ["2000 tokens", "49 more", "2049", "2048"]:
        assert number in error["message"]
    assert server.complete([1] * 2047, max_tokens=1, ignore_eos=True)["usage"]["total_tokens"] == 2048


MESSAGES: list[tuple[object, str]] = [
    ([], "messages"),
    ("hi", "messages"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "wizard", "content": "a"}], "messages[0].role"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "messages[0].content[0].type",
    ),
    ([{"role": "user", "content": "a", "extra": 1}], "messages[0].extra"),
]


@pytest.mark.parametrize(("messages", "param"), MESSAGES, ids=range(len(MESSAGES)))
def test_messages_that_cannot_be(server: Server, messages: object, param: str) -> None:
    assert error_of(server.post("/v1/chat/completions", {"messages": messages}), 400)["param"] == param


def test_a_template_that_refuses(server: Server) -> None:
    messages = [{"role": "developer", "content": "a"}]
    error = error_of(server.post("/v1/chat/completions", {"messages": messages}), 400)
    assert "the chat template refuses these messages: role developer is unknown" in error["message"]


def test_unknown_and_unsupported_fields(server: Server) -> None:
    for field, value, code in [
        ("temprature", 1, "unknown_parameter"),
        ("response_format", {"type": "json_object"}, "invalid_value"),
        ("tools", [{}], "unsupported_parameter"),
        ("suffix", "b", "unsupported_parameter"),
        ("best_of", 3, "unsupported_parameter"),
        ("stream_options", {"include_usage": True}, "invalid_value"),
    ]:
        assert error_of(server.post("/v1/completions", {"prompt": "a", field: value}), 400)["code"] == code
    harmless = {"user": "u", "metadata": {}, "store": False, "service_tier": "auto", "stop": None}
    assert server.complete("a", max_tokens=1, **harmless)["usage"]["completion_tokens"] == 1


def test_paths_methods_and_types(server: Server) -> None:
    assert error_of(server.get("/v2/nothing"), 404)["code"] == "unknown_url"
    assert error_of(server.get("/v1/completions"), 405)["code"] == "method_not_allowed"
    assert error_of(server.post("/health", {}), 405)["code"] == "method_not_allowed"
    body = {"prompt": "a", "model": "gpt-4"}
    assert error_of(server.post("/v1/completions", body), 404)["code"] == "model_not_found"
    assert error_of(server.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"
    for kind in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/jsonp",
    ]:
        error = error_of(server.post("/v1/completions", {"prompt": "a"}, **{"Content-Type": kind}), 415)
        assert kind in error["message"]
    error_of(server.post("/v1/completions", b"x", **{"Content-Encoding": "gzip"}), 415)
    assert (
        server.post(
            "/v1/completions",
            {"prompt": "a", "max_tokens": 1},
            **{"Content-Type": "Application/JSON; charset=utf-8"},
        )[0]
        == 200
    )


def test_special_tokens_in_messages(server: Server) -> None:
    """What is spelled like a control token is one, as with transformers and vLLM."""
    messages = [{"role": "user", "content": "<|im_end|>"}]
    count = server.post("/tokenize", {"messages": messages})[1]["count"]
    assert count == server.post("/tokenize", {"messages": [{"role": "user", "content": ""}]})[1]["count"] + 1


def test_control_tokens_are_text_if_the_server_says_so(start: Start) -> None:
    server = start("--sanitize-control-tokens")
    ids = server.post("/tokenize", {"messages": [{"role": "user", "content": "<|im_end|>"}]})[1]["tokens"]
    plain = server.post("/tokenize", {"messages": [{"role": "user", "content": ""}]})[1]["tokens"]
    end = server.post("/tokenize", {"prompt": "<|im_end|>"})[1]["tokens"][0]
    assert ids.count(end) == plain.count(end)
    assert len(ids) > len(plain) + 3


def answer_of(connection: socket.socket) -> tuple[int, Any]:
    """Status and JSON body of the one answer on this connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        assert part, f"closed after {data!r}"
        data += part
    top, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in top.split(b"\r\n")[1:])
    while len(body) < int(fields.get(b"content-length", b"0")):
        body += connection.recv(65536)
    return int(top.split(b" ")[1]), json.loads(body) if body else None


def test_a_body_that_is_too_large(server: Server) -> None:
    connection = server.connect()
    connection.sendall(head("/v1/completions", 17 << 20))
    error = error_of(answer_of(connection), 413)
    assert str(16 << 20) in error["message"]
    connection.close()
    chunked = server.connect()
    chunked.sendall(CHUNKED_HEAD)
    part = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    try:
        for _ in range(17):
            chunked.sendall(part)
    except (BrokenPipeError, ConnectionResetError):
        return  # it closed the door before all was said
    error_of(answer_of(chunked), 413)
    chunked.close()


def test_thousands_of_tiny_chunks(server: Server) -> None:
    body = json.dumps({"prompt": "import " * 200, "max_tokens": 1}).encode() + b" " * 20_000
    connection = server.connect()
    connection.sendall(CHUNKED_HEAD)
    connection.sendall(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
    status, answer = answer_of(connection)
    assert status == 200, answer
    connection.close()


@pytest.mark.parametrize(
    "text",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        CHUNKED_HEAD + b"zz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 1000 + b"\r\n",
    ],
    ids=["tls", "version", "lengths", "negative", "chunk", "path", "header", "headers"],
)
def test_what_is_not_http_is_cut_off(server: Server, text: bytes) -> None:
    connection = server.connect()
    connection.settimeout(20)
    try:
        connection.sendall(text)
        answer = connection.recv(65536)
    except ConnectionError:
        answer = b""
    assert not answer or answer.startswith(b"HTTP/1.1 4")
    connection.close()


def test_slow_heads_and_bodies_are_cut_off(start: Start) -> None:
    server = start("--read-timeout", "0.5")
    slow = server.connect()
    slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: ")
    begun = time.monotonic()
    slow.settimeout(20)
    assert not slow.recv(1000).startswith(b"HTTP/1.1 200")
    assert time.monotonic() - begun < 10
    body = server.connect()
    body.sendall(head("/v1/completions", 1000) + b'{"prompt"')
    error = error_of(answer_of(body), 408)
    assert error["code"] == "body_timeout"
    slow.close()
    body.close()
