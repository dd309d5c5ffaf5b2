"""`tsruntime generate`, `bench`, `text`, and the Python package over them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from front_server import Server

import tsruntime
from tsruntime import LLM, RequestError, RuntimeFailure

PROMPT = "def read(path):\n"


def run(executable: Path, *arguments: str, stdin: str = "") -> str:
    done = subprocess.run(
        [str(executable), *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def generate(executable: Path, plan: Path, *arguments: str) -> Any:
    return json.loads(run(executable, "generate", str(plan), *arguments, "--json"))


def test_help_has_examples_and_exit_codes(executable: Path) -> None:
    assert "Exit codes" in run(executable, "--help")
    for command in ["run", "generate", "bench"]:
        assert "Examples:" in run(executable, command, "--help")
    assert run(executable, "--version") == "tsruntime 0.1.0\n"


def test_generate_text(executable: Path, plan: Path) -> None:
    text = run(executable, "generate", str(plan), "-p", PROMPT, "--max-tokens", "12")
    assert text == generate(executable, plan, "-p", PROMPT, "--max-tokens", "12")["text"] + "\n"


def test_generate_json(executable: Path, plan: Path) -> None:
    answer = generate(executable, plan, "-p", PROMPT, "--max-tokens", "12", "--ignore-eos")
    assert list(answer) == ["prompt_ids", "ids", "text", "finish_reason", "logprobs", "timing"]
    assert len(answer["ids"]) == 12
    assert answer["finish_reason"] == "length"
    assert answer["logprobs"] is None
    assert answer["timing"]["first_token_ms"] > 0
    ids = ",".join(map(str, answer["prompt_ids"]))
    again = generate(executable, plan, "--ids", ids, "--max-tokens", "12", "--ignore-eos", "--threads", "1")
    assert again["ids"] == answer["ids"]


def test_generate_with_all_logprobs(executable: Path, plan: Path) -> None:
    answer = generate(
        executable, plan, "--ids", "5,6,7", "--max-tokens", "2", "--logprobs", "4096", "--ignore-eos"
    )
    for token, own, tops in zip(answer["ids"], answer["token_logprobs"], answer["logprobs"], strict=True):
        assert sorted(id for id, _ in tops) == list(range(4096))
        assert tops[0] == [token, own]
        values = [value for _, value in tops]
        assert values == sorted(values, reverse=True)
        assert math.isclose(sum(map(math.exp, values)), 1, rel_tol=1e-4)


def test_generate_chat_and_sampling(executable: Path, plan: Path, server: Server) -> None:
    answer = generate(
        executable, plan, "--chat", "-p", "hi", "--max-tokens", "8", "--temperature", "1", "--seed", "3"
    )
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 1, "seed": 3}
    served = server.post("/v1/chat/completions", body)[1]["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == (
        served["message"]["content"],
        served["finish_reason"],
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ids", "4096"], "`prompt[0]` is 4096"),
        (["-p", ""], "at least one token"),
        (["-p", "a", "--temperature", "9"], "`temperature` is 9.0"),
        (["-p", "a", "--max-tokens", "9999"], "the context holds 2048"),
        (["-p", "a", "--json", "--logprobs", "4097"], "from 0 to 4096"),
        (["-p", "a", "--stop-token-id", "5000"], "`stop_token_ids[0]` is 5000"),
    ],
)
def test_generate_refuses(executable: Path, plan: Path, arguments: list[str], said: str) -> None:
    command = [str(executable), "generate", str(plan), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_a_plan_without_text(executable: Path, plan: Path, plan_without_text: Path) -> None:
    """Token ids in, the same token ids out as with text."""
    arguments = ["--ids", "5,6,7", "--max-tokens", "6", "--ignore-eos", "--logprobs", "2"]
    answer = generate(executable, plan_without_text, *arguments)
    with_text = generate(executable, plan, *arguments)
    assert answer["text"] == ""
    assert (answer["ids"], answer["logprobs"]) == (with_text["ids"], with_text["logprobs"])
    for text in (["-p", "a"], ["-p", "a", "--chat"]):
        command = [str(executable), "generate", str(plan_without_text), *text]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "built without a tokenizer: send token ids" in done.stderr


def test_a_reader_that_leaves_is_no_error(executable: Path, plan: Path) -> None:
    command = f"'{executable}' generate '{plan}' -p 'import ' --max-tokens 500 --ignore-eos | head -c 10"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 0


def test_lines(executable: Path, plan: Path) -> None:
    lines = [
        {"id": "a", "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "ignore_eos": True},
        {"id": 2, "prompt": [1, 2, 3], "max_tokens": 3, "logprobs": 2, "ignore_eos": True},
        {"id": {"x": 1}, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
        {"id": "bad", "prompt": "a", "temperature": "hot"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "\nnot json\n"
    ready, *answers = map(
        json.loads, run(executable, "generate", str(plan), "--jsonl", stdin=text).splitlines()
    )
    assert ready["context"] == 2048
    by_id = {json.dumps(answer.pop("id")): answer for answer in answers}
    assert set(by_id) == {'"a"', "2", '{"x": 1}', '"bad"', "null"}
    assert len(by_id['"a"']["ids"]) == 5
    assert len(by_id["2"]["logprobs"][0]) == 2
    assert by_id['"bad"']["error"]["param"] == "temperature"
    assert "not valid JSON" in by_id["null"]["error"]["message"]


def test_bench(executable: Path, plan: Path) -> None:
    sizes = ["--prompt", "64", "--decode", "8", "--batch", "4", "--repeat", "2"]
    report = json.loads(run(executable, "bench", str(plan), *sizes, "--threads", "1", "--json"))
    names = ["prefill_tokens_per_s", "decode_tokens_per_s", "start_ms", "first_token_ms", "resident_bytes"]
    assert all(report[name] > 0 for name in names)
    assert report["first_token_ms"] > report["start_ms"]
    assert (report["threads"], report["batch"]) == (1, 4)
    assert "tokens/s" in run(executable, "bench", str(plan), *sizes)
    too_long = [str(executable), "bench", str(plan), "--prompt", "2048", "--decode", "8"]
    done = subprocess.run(too_long, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "2056 tokens, but the context holds 2048" in done.stderr


def test_text_is_the_text_crates_command(executable: Path) -> None:
    done = subprocess.run([str(executable), "text"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "encode DIR" in done.stderr


# ---- the Python package ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def found(executable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package under test finds the executable under test."""
    monkeypatch.setenv("PATH", str(executable.parent), prepend=":")


def test_the_executable_is_found(executable: Path) -> None:
    assert tsruntime.find_executable().samefile(executable)
    done = subprocess.run(
        [sys.executable, "-m", "tsruntime", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "tsruntime 0.1.0\n"


def test_llm(plan: Path, server: Server) -> None:
    prompts = [f"x{i} = " for i in range(300)]
    with LLM(plan, threads=1, max_seqs=16) as llm:
        assert (llm.vocab_size, llm.context) == (4096, 2048)
        answers = llm.generate(prompts, max_tokens=3, temperature=0)
        assert len(answers) == 300
        assert answers[7]["text"] == server.complete("x7 = ", max_tokens=3)["choices"][0]["text"]
        (one,) = llm.generate("x7 = ", max_tokens=3, temperature=0)
        assert one["ids"] == answers[7]["ids"]
        (by_ids,) = llm.generate(one["prompt_ids"], max_tokens=3, temperature=0, logprobs=1)
        assert by_ids["ids"] == one["ids"] == [top[0][0] for top in by_ids["logprobs"]]
        (chat,) = llm.chat([{"role": "user", "content": "hi"}], max_tokens=2)
        assert len(chat["ids"]) <= 2
        assert llm.generate([]) == []
        with pytest.raises(RequestError, match=r"request 0: `temperature` is an array") as error:
            llm.generate(["a", "b"], max_tokens=1, temperature=[1])
        assert (error.value.index, error.value.param) == (0, "temperature")


def test_llm_errors(plan: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailure, match=r"none\.tsp"):
        LLM(tmp_path / "none.tsp")
    with LLM(plan) as llm:
        with pytest.raises(RequestError) as error:
            llm.generate(["fine", "not fine " * 3000], max_tokens=1)
        assert (error.value.index, error.value.param) == (1, "prompt")
        for unsayable in [{"temperature": float("nan")}, {"stop": "\ud800"}]:
            with pytest.raises(ValueError, match=r"not JSON compliant|surrogates not allowed"):
                llm.generate(["fine"], **unsayable)
        assert len(llm.generate(["fine"], max_tokens=1)) == 1, "it goes on"
