"""The official client against a real server: whole and streamed, sync and async."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import openai
import pytest
from front_server import Server
from openai.types.chat import ChatCompletionMessageParam

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Write a function that reads a file."}
]
PROMPT = "def read(path):\n"


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    model = client.models.list().data[0]
    assert model.id == "demo"
    assert model.object == "model"
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"


def test_chat_whole_and_streamed_say_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=24, temperature=0)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in {"stop", "length"}
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 24
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    stream = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_completion_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert finishes[-1] == choice.finish_reason
    assert set(finishes[:-1]) == {None}
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completion_whole_and_streamed_say_the_same(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt=PROMPT, max_tokens=32, temperature=0, echo=True)
    assert whole.choices[0].text.startswith(PROMPT)
    assert whole.choices[0].finish_reason == "length"
    stream = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=32, temperature=0, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_async_streams_run_together(server: Server) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.base}/v1", api_key="none") as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=40, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(f"x{i} = [") for i in range(12)))

    together = asyncio.run(run())
    alone = [server.complete(f"x{i} = [", max_tokens=40)["choices"][0]["text"] for i in range(12)]
    assert together == alone


def test_a_list_of_prompts_and_n(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt=["import ", "class A", PROMPT], n=2, max_tokens=8, seed=5, temperature=1
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    texts = [choice.text for choice in answer.choices]
    assert texts[0] != texts[1], "the samples of one prompt differ"
    alone = client.completions.create(model="demo", prompt=PROMPT, n=2, max_tokens=8, seed=5, temperature=1)
    assert [choice.text for choice in alone.choices] == texts[4:], "company changes nothing"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 48


def test_ids_are_prompts_too(client: openai.OpenAI, server: Server) -> None:
    status, tokens = server.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True})
    assert status == 200
    assert tokens["count"] == len(tokens["tokens"])
    assert "".join(tokens["token_strs"]) == PROMPT
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}) == (200, {"prompt": PROMPT})
    by_text = client.completions.create(model="demo", prompt=PROMPT, max_tokens=8, temperature=0)
    by_ids = client.completions.create(
        model="demo", prompt=[tokens["tokens"], tokens["tokens"]], max_tokens=8, temperature=0
    )
    assert {choice.text for choice in by_ids.choices} == {by_text.choices[0].text}


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        best = token.top_logprobs[0]
        assert (token.token, token.logprob) == (best.token, best.logprob), "greedy takes the best"
        assert token.bytes == list(token.token.encode())
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1 + 1e-6
    assert "".join(token.token for token in logprobs.content) == answer.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=2, stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]  # type: ignore[union-attr]
    text = "".join(choice.text for choice in choices)
    parts = [choice.logprobs for choice in choices if choice.logprobs is not None]
    tokens = [token for part in parts for token in part.tokens or []]
    offsets = [offset for part in parts for offset in part.text_offset or []]
    assert "".join(tokens) == text
    assert [text[at : at + len(token)] for at, token in zip(offsets, tokens, strict=True)] == tokens
    for part in parts:
        for token, logprob, top in zip(
            part.tokens or [], part.token_logprobs or [], part.top_logprobs or [], strict=True
        ):
            assert top[token] == logprob == max(top.values())


def test_stop_strings(client: openai.OpenAI) -> None:
    plain = (
        client.completions.create(model="demo", prompt=PROMPT, max_tokens=48, temperature=0).choices[0].text
    )
    stop = plain[10:14]
    expected = plain[: plain.index(stop)]
    for kwargs in ({"stop": stop}, {"stop": ["\0never", stop, "nor this"]}):
        answer = client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=48, temperature=0, **kwargs
        ).choices[0]
        assert (answer.text, answer.finish_reason) == (expected, "stop")
        stream = client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=48, temperature=0, stream=True, **kwargs
        )
        chunks = [chunk.choices[0] for chunk in stream]
        assert "".join(chunk.text for chunk in chunks) == expected
        assert chunks[-1].finish_reason == "stop"
    kept = client.completions.create(
        model="demo",
        prompt=PROMPT,
        max_tokens=48,
        temperature=0,
        stop=stop,
        extra_body={"include_stop_str_in_output": True},
    )
    assert kept.choices[0].text == expected + stop


def test_sampling_fields_reach_the_engine(client: openai.OpenAI, server: Server) -> None:
    def text(**fields: object) -> str:
        return str(server.complete(PROMPT, **{"max_tokens": 24, **fields})["choices"][0]["text"])

    assert text(temperature=1, seed=1) == text(temperature=1, seed=1) != text(temperature=1, seed=2)
    assert text(temperature=1) != text(temperature=1), "a request without a seed gets a new one"
    assert text(temperature=2, seed=3, top_k=1) == text() == text(temperature=2, seed=3, top_p=0)
    assert text(temperature=2, seed=3, min_p=1) == text()
    assert text(repetition_penalty=1.5) != text()
    assert text(frequency_penalty=2) != text()
    (first,) = server.post("/tokenize", {"prompt": text(max_tokens=1)})[1]["tokens"]
    assert text(logit_bias={str(first): -100}) != text()
    assert text(stop_token_ids=[first]) == "", "a stop token ends the output and is not shown"
    assert server.complete(PROMPT, stop_token_ids=[first])["choices"][0]["finish_reason"] == "stop"


def test_end_tokens(server: Server) -> None:
    end = server.post("/tokenize", {"prompt": "<|im_end|>"})[1]["tokens"]
    assert len(end) == 1, "a control token is one token"
    bias = {str(end[0]): 100}
    answer = server.complete(PROMPT, logit_bias=bias, max_tokens=5)
    assert answer["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    assert answer["usage"]["completion_tokens"] == 1
    ignored = {"logit_bias": bias, "max_tokens": 3, "ignore_eos": True}
    answer = server.complete(PROMPT, **ignored)
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("", 3)
    answer = server.complete(PROMPT, skip_special_tokens=False, **ignored)
    assert answer["choices"][0]["text"] == "<|im_end|>" * 3


def test_usage_tells_cached_tokens(client: openai.OpenAI) -> None:
    prompt = "# cached\n" + "value = compute(first, second)\n" * 40
    cached = []
    for _ in range(2):
        usage = client.completions.create(model="demo", prompt=prompt, max_tokens=2).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
        assert usage.prompt_tokens > 200
    assert cached[0] == 0
    assert cached[1] is not None
    assert cached[1] >= 64


def test_a_salt_keeps_tenants_apart_and_a_miss_is_explained(client: openai.OpenAI) -> None:
    prompt = "# salted\n" + "value = compute(first, second)\n" * 40

    def usage(salt: str | None, text: str = prompt) -> dict[str, Any]:
        extra = {} if salt is None else {"cache_salt": salt}
        answer = client.completions.create(model="demo", prompt=text, max_tokens=2, extra_body=extra)
        assert answer.usage is not None
        return answer.usage.model_dump()["prompt_tokens_details"]

    assert usage("one") == {**usage("two"), "cached_tokens": 0, "cache_miss": {"reason": "new", "token": 0}}
    again = usage("one")
    assert again["cached_tokens"] >= 64
    assert "cache_miss" not in again
    assert usage(None)["cached_tokens"] == 0
    changed = usage("one", prompt[:500] + "X" + prompt[501:])
    assert changed["cache_miss"]["reason"] == "new"
    assert changed["cached_tokens"] <= changed["cache_miss"]["token"] < again["cached_tokens"] + 64
    with pytest.raises(openai.BadRequestError) as empty:
        usage("")
    assert empty.value.param == "cache_salt"


def test_errors_arrive_as_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="demo", messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"
    assert "from 0 to 2" in bad.value.message
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="demo", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert tools.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt="word " * 3000, max_tokens=1)
    assert long.value.code == "context_length_exceeded"
    assert "2048" in long.value.message
