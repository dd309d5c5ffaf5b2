"""text: the comparison passes on what is right, and finds what is wrong."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from plan_graphs import build

from tscompile import corpus
from tscompile.errors import CompileError
from tscompile.passes import text
from tscompile.textcheck import Tool, around, compare, shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    checkpoints.tokenizer().save_pretrained(path)
    return path


class Wrong(Tool):
    """A text compiler with a fault: `change` spoils one kind of reply."""

    def __init__(self, what: str, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
        super().__init__()
        self.what, self.change = what, change

    def ask(self, what: str, blobs: Path, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        replies = super().ask(what, blobs, requests)
        if what == self.what:
            for request, reply in zip(requests, replies, strict=True):
                self.change(request, reply)
        return replies


def test_text_becomes_entries_of_the_plan(tmp_path: Path) -> None:
    made = build(tmp_path)
    checkpoints.tokenizer().save_pretrained(tmp_path)
    text.run(made)
    assert sorted(made.text) == ["tsp/text/template", "tsp/text/tokenizer"]
    assert all(made.text.values())
    assert made.notes[0].startswith("text: as its references on 3,")
    again = tmp_path / "again"
    Tool().compile(tmp_path, again)
    assert {f"tsp/text/{path.name}": path.read_bytes() for path in again.iterdir()} == made.text


def encode_wrong(request: dict[str, Any], reply: dict[str, Any]) -> None:
    if request["text"].startswith("Съешь"):
        reply["ids"][5] += 1


def decode_wrong(request: dict[str, Any], reply: dict[str, Any]) -> None:
    reply["text"] = reply["text"].replace("\ufffd", "?")


def render_wrong(request: dict[str, Any], reply: dict[str, Any]) -> None:
    if request["add_generation_prompt"] and "text" in reply:
        reply["text"] = reply["text"].removesuffix("\n")


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        (
            "encode",
            encode_wrong,
            r"differs from Hugging Face's \(text \d+ of 3,?\d+, add_special_tokens=False\): '\\u0421\\u044a.*"
            r"\n  ids 0 to 12:\n  theirs \[.*\]\n  ours   \[",
        ),
        ("decode", decode_wrong, r"decodes \[[\d, ]+\] .*unlike Hugging Face's:\n  theirs '.*ufffd"),
        ("render", render_wrong, r'renders unlike transformers: {"messages": .*\n  theirs .*assistant\\n'),
    ],
)
def test_a_difference_is_shown(folder: Path, tmp_path: Path, what: str, change: Any, message: str) -> None:
    tool = Wrong(what, change)
    tool.compile(folder, tmp_path)
    with pytest.raises(CompileError, match=message):
        compare(tool, folder, tmp_path)


def test_a_checkpoint_without_tokenizer(tmp_path: Path) -> None:
    made = build(tmp_path)
    with pytest.raises(CompileError, match=r"has no tokenizer\.json: .* or build with --no-text"):
        text.run(made)
    made.options = replace(made.options, no_text=True)
    text.run(made)
    assert made.text == {}
    assert "--no-text" in made.notes[0]


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    made = build(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CompileError, match=r"text cannot be compiled: .*tokenizer\.json"):
        text.run(made)


def test_a_link_that_leaves_the_checkpoint(tmp_path: Path) -> None:
    made = build(tmp_path / "checkpoint")
    checkpoints.tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / "checkpoint" / name).symlink_to(tmp_path / name)
        with pytest.raises(CompileError, match="is a link that leaves the checkpoint's folder"):
            text.run(made)
        (tmp_path / "checkpoint" / name).unlink()
        (tmp_path / "checkpoint" / name).write_bytes((tmp_path / name).read_bytes())
    text.run(made)


def test_no_text_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TSRUNTIME", str(tmp_path / "none"))
    with pytest.raises(CompileError, match=r"was not found \(looked for .*/none\): install the wheel"):
        Tool()


def test_the_corpus_is_large_mixed_and_the_same_every_time() -> None:
    texts = corpus.texts(["<|im_end|>"])
    assert texts == corpus.texts(["<|im_end|>"])
    assert len(texts) > 3000
    assert "a<|im_end|>b" in texts
    points = {point for text in texts for point in text}
    assert len(points) > 10_000
    assert not any(0xD800 <= ord(point) <= 0xDFFF for point in points)
    ids = corpus.id_lists(50)
    assert ids == corpus.id_lists(50)
    assert {i for some in ids for i in some} == set(range(50))
    assert len(corpus.chats()) > 70


def test_around_and_shown() -> None:
    theirs, ours = "[3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]", "[3, 4, 5, 6, 7, 8, 99]"
    wanted = f"  ids 3 to 16:\n  theirs {theirs}\n  ours   {ours}"
    assert around(list(range(20)), [*range(9), 99]) == wanted
    assert around([1], {"error": "x"}) == "  theirs [1]\n  ours   {'error': 'x'}"
    assert len(shown("é" * 1000)) < 420
