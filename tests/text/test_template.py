"""Rendered prompts equal transformers', for the chat templates that models are published with."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from text_chats import CHATS
from text_vocabularies import checkpoint, published_templates
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

Lines = Callable[[str, Path, list[dict[str, Any]]], list[dict[str, Any]]]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
# Wrong here, and why: a build from such a checkpoint fails its comparison.
KNOWN = {
    "meetkai-functionary-medium-v3.1.jinja": "adds a string to one marked safe, which escapes HTML in Jinja2",
    "CohereForAI-c4ai-command-r-plus-tool_use.jinja": "reads schema.items, in Python a method",
}


class Raised(str):
    """The message of a template's `raise_exception`."""


def reference(template: str, chat: dict[str, Any]) -> str | Raised | None:
    """What `apply_chat_template(tokenize=False)` does, without a tokenizer.

    None where Python itself raises, as for an attribute of None: then there is nothing to equal.
    """
    messages = [{k: v for k, v in message.items() if v is not None} for message in chat["messages"]]
    options = {"add_generation_prompt": chat["add_generation_prompt"], **TOKENS, **chat["kwargs"]}
    try:
        return render_jinja_template([messages], tools=chat["tools"], chat_template=template, **options)[0][0]
    except jinja2.exceptions.TemplateError as error:
        return Raised(error.message) if type(error) is jinja2.exceptions.TemplateError else None
    except Exception:
        return None


def difference(reply: dict[str, Any], expected: str | Raised) -> str:
    """Empty if the reply is what was expected, else where it differs."""
    if isinstance(expected, Raised):
        equal = reply.get("error") == {"kind": "raised", "message": str(expected)}
        return "" if equal else f"{str(reply)[:300]} instead of the exception {str(expected)!r}"
    if "error" in reply:
        return f"{reply['error']} instead of {expected[:200]!r}"
    ours = reply["text"]
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b),
        min(len(ours), len(expected)),
    )
    if ours == expected:
        return ""
    return f"after {expected[max(at - 60, 0) : at]!r}: {ours[at : at + 80]!r}, not {expected[at : at + 80]!r}"


def compile_template(tstext: Path, folder: Path, template: str, source: Path, tokens: dict[str, str]) -> Path:
    """The compiled text of a checkpoint with this template."""
    folder.mkdir()
    shutil.copy(source / "tokenizer.json", folder)
    config = {**tokens, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    subprocess.run([tstext, "compile", folder, "-o", folder / "out"], check=True)
    return folder / "out"


@pytest.mark.parametrize("name", sorted(published_templates()))
def test_prompts(name: str, tstext: Path, lines: Lines, tmp_path: Path) -> None:
    template = published_templates()[name]
    folder = compile_template(tstext, tmp_path / "checkpoint", template, checkpoint("odd_digits"), TOKENS)
    replies = lines("render", folder, list(CHATS.values()))
    expected = [reference(template, chat) for chat in CHATS.values()]
    assert any(isinstance(prompt, str) for prompt in expected)
    compared = [
        (name, reply, prompt)
        for name, reply, prompt in zip(CHATS, replies, expected, strict=True)
        if prompt is not None
    ]
    wrong = [f"{name}: {text}" for name, reply, prompt in compared if (text := difference(reply, prompt))]
    assert bool(wrong) == (name in KNOWN), "\n".join(wrong)


LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
FAMILIES = [
    ("qwen", "Qwen-Qwen3-0.6B.jinja", {"eos_token": "<|im_end|>"}),
    ("qwen", "Qwen-Qwen2.5-7B-Instruct.jinja", {"eos_token": "<|im_end|>"}),
    ("llama3", "meta-llama-Llama-3.1-8B-Instruct.jinja", LLAMA3),
    ("llama3", "meta-llama-Llama-3.2-3B-Instruct.jinja", LLAMA3),
    ("mistral_v3", "mistralai-Mistral-Nemo-Instruct-2407.jinja", {"bos_token": "<s>", "eos_token": "</s>"}),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[1])
def test_prompt_ids(
    family: tuple[str, str, dict[str, str]], tstext: Path, lines: Lines, tmp_path: Path
) -> None:
    """From messages to ids, with the family's own vocabulary; and no message can spell a control token."""
    kind, name, tokens = family
    template, source = published_templates()[name], checkpoint(kind)
    folder = compile_template(tstext, tmp_path / "checkpoint", template, source, tokens)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"), chat_template=template, **tokens
    )
    control = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    chats = {name: chat for name, chat in CHATS.items() if type(reference(template, chat)) is str}
    plain = lines("render", folder, [{**chat, "ids": True} for chat in chats.values()])
    clean = lines("render", folder, [{**chat, "ids": True, "sanitize": True} for chat in chats.values()])
    shown = lines("decode", folder, clean)
    for (chat_name, chat), ids, cleaned, text in zip(chats.items(), plain, clean, shown, strict=True):
        options = {
            "tools": chat["tools"],
            "add_generation_prompt": chat["add_generation_prompt"],
            **chat["kwargs"],
        }
        assert ids["ids"] == tokenizer.apply_chat_template(chat["messages"], return_dict=False, **options), (
            chat_name
        )
        theirs = tokenizer.apply_chat_template(
            chat["messages"], return_dict=False, sanitize_control_tokens=True, **options
        )
        # The reference encodes piece by piece what lies between marked tokens, so words may be cut otherwise.
        assert text["text"] == tokenizer.decode(theirs), chat_name
        assert [id for id in cleaned["ids"] if id in control] == [id for id in theirs if id in control], (
            chat_name
        )


def test_no_template(tstext: Path, lines: Lines, tmp_path: Path) -> None:
    subprocess.run([tstext, "compile", checkpoint("odd_digits"), "-o", tmp_path], check=True)
    assert (tmp_path / "template").read_bytes() == b""
    [reply] = lines("render", tmp_path, [CHATS["hello"]])
    assert reply["error"]["kind"] == "none"
    assert "no chat template" in reply["error"]["message"]


def test_bad_requests_are_answered(tstext: Path, compiled: Callable[[str], tuple[Path, Any]]) -> None:
    """A line that cannot be read costs only itself."""
    folder, _ = compiled("odd_digits")
    requests = [
        b"",
        b"{",
        b'{"text": 1}',
        b'{"text": "a", "typo": 1}',
        b'{"text": "\\ud800"}',
        b'"\xff"',
        b"[" * 100_000,
    ]
    result = subprocess.run(
        [tstext, "encode", folder],
        input=b"\n".join([*requests, b'{"text": "a"}']),
        capture_output=True,
        check=True,
    )
    replies = [json.loads(line) for line in result.stdout.splitlines()]
    assert [reply["error"]["kind"] for reply in replies[:-1]] == ["request"] * len(requests)
    assert replies[-1]["ids"]
