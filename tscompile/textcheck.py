"""Compares a compiled tokenizer and chat template with their references: Hugging Face tokenizers, and jinja2
as transformers applies it. Nothing of the checkpoint is executed; jinja2 runs templates in its sandbox, as
transformers does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tscompile import corpus
from tscompile.errors import CompileError, InternalError

ROOT = Path(__file__).resolve().parents[1]
SECONDS_MAX = 600  # of one run of the text compiler; a few are usual
SHOWN_IDS = 6  # around the first that differs


class Tool:
    """The text compiler: `tsruntime text`, or `tstext`, which is that alone."""

    def __init__(self) -> None:
        """Finds it: $TSRUNTIME; else beside this Python; else what cargo built in a clone."""
        named = os.environ.get("TSRUNTIME")
        scripts = {Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))}
        places = [Path(named)] if named else [folder / "tsruntime" for folder in sorted(scripts)]
        if not named:
            built = [ROOT / "tsruntime" / "target" / kind for kind in ("release", "debug")]
            places += [folder / name for folder in built for name in ("tsruntime", "tstext")]
        found = next((place for place in places if os.access(place, os.X_OK) and place.is_file()), None)
        if found is None:
            looked = ", ".join(map(str, places))
            raise CompileError(
                f"tsruntime, which compiles tokenizers, was not found (looked for {looked}): install the "
                "wheel, or run `make build` in a clone, or set TSRUNTIME"
            )
        self.command = [str(found), *(["text"] if found.name != "tstext" else [])]

    def compile(self, checkpoint: Path, out: Path) -> None:
        """Writes out/tokenizer and out/template (empty without one). CompileError with what the compiler
        said."""
        self._run(["compile", str(checkpoint), "-o", str(out)], "")
        if not (out / "tokenizer").is_file():
            raise CompileError(f"{' '.join(self.command)} compiled no tokenizer: it is not of this version")

    def ask(self, what: str, blobs: Path, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """encode, decode or render: a reply a request."""
        asked = "".join(json.dumps(request) + "\n" for request in requests)
        lines = self._run([what, str(blobs)], asked).removesuffix("\n").split("\n") if requests else []
        if len(lines) != len(requests):
            raise InternalError(
                f"{' '.join(self.command)} {what} gave {len(lines)} replies to {len(requests)} requests"
            )
        return [json.loads(line) for line in lines]

    def _run(self, arguments: list[str], stdin: str) -> str:
        command = [*self.command, *arguments]
        try:
            ended = subprocess.run(
                command, input=stdin.encode(), capture_output=True, check=False, timeout=SECONDS_MAX
            )
        except subprocess.TimeoutExpired:
            raise CompileError(f"{' '.join(command)} did not end within {SECONDS_MAX} s") from None
        if ended.returncode != 0:
            said = ended.stderr.decode(errors="replace").strip().removeprefix("error: ")
            raise CompileError(
                f"the checkpoint's text cannot be compiled: {said or f'status {ended.returncode}'}"
            )
        return ended.stdout.decode()


def compare(tool: Tool, checkpoint: Path, blobs: Path) -> dict[str, int]:
    """Encodes, decodes and renders the corpus both ways. How many of each were compared. CompileError with
    the first that differs."""
    from transformers import PreTrainedTokenizerFast

    loaded = PreTrainedTokenizerFast.from_pretrained(checkpoint, local_files_only=True)
    reference = loaded.backend_tokenizer
    added = [token.content for token in reference.get_added_tokens_decoder().values()]
    texts = corpus.texts(added)
    ids = compare_encoding(tool, blobs, reference, texts)
    ids += corpus.id_lists(reference.get_vocab_size())
    compare_decoding(tool, blobs, reference, ids)
    counts = {"texts": len(texts), "decoded": len(ids), "chats": 0}
    if (blobs / "template").stat().st_size:
        counts["chats"] = compare_rendering(tool, blobs, loaded, corpus.chats())
    elif loaded.chat_template:
        raise InternalError("the checkpoint has a chat template, but the text compiler found none")
    return counts


def compare_encoding(tool: Tool, blobs: Path, reference: Any, texts: Sequence[str]) -> list[list[int]]:
    """The reference's ids of each text, with special tokens and without."""
    wanted = []
    for special in (False, True):
        replies = tool.ask("encode", blobs, [{"text": text, "add_special_tokens": special} for text in texts])
        encoded = reference.encode_batch(list(texts), add_special_tokens=special)
        for number, (text, reply, theirs) in enumerate(zip(texts, replies, encoded, strict=True), 1):
            if reply.get("ids") != theirs.ids:
                at = f"text {number} of {len(texts)}, add_special_tokens={special}"
                raise CompileError(
                    f"the compiled tokenizer differs from Hugging Face's ({at}): {shown(text)}\n"
                    + around(theirs.ids, reply.get("ids", reply))
                )
        wanted += [theirs.ids for theirs in encoded]
    return wanted


def compare_decoding(tool: Tool, blobs: Path, reference: Any, id_lists: Sequence[Sequence[int]]) -> None:
    """At once, and (with special tokens skipped) token by token as a stream is."""
    for skip in (False, True):
        requests = [{"ids": ids, "skip_special_tokens": skip, "pieces": skip} for ids in id_lists]
        decoded = reference.decode_batch([list(ids) for ids in id_lists], skip_special_tokens=skip)
        for ids, reply, theirs in zip(id_lists, tool.ask("decode", blobs, requests), decoded, strict=True):
            if reply.get("text") != theirs:
                raise CompileError(
                    f"the compiled tokenizer decodes {list(ids)[:40]} (skip_special_tokens={skip}) unlike "
                    f"Hugging Face's:\n  theirs {shown(theirs)}\n  ours   {shown(reply.get('text', reply))}"
                )


def compare_rendering(tool: Tool, blobs: Path, loaded: Any, chats: Sequence[dict[str, Any]]) -> int:
    """How many chats the template took. Where transformers raises because the template said so, ours must;
    where it raises for another reason, there is nothing to compare with."""
    from jinja2.exceptions import TemplateError

    compared = 0
    for chat, reply in zip(chats, tool.ask("render", blobs, chats), strict=True):
        rest = {key: chat[key] for key in ("tools", "add_generation_prompt")} | chat["kwargs"]
        try:
            theirs = loaded.apply_chat_template(chat["messages"], tokenize=False, **rest)
        except TemplateError as error:
            if type(error) is not TemplateError:  # subclasses are jinja2's own complaints
                continue
            theirs = None
        except Exception:
            continue
        compared += 1
        ours = reply.get("text")
        if ours == theirs:
            continue
        said = shown(ours) if ours is not None else reply
        raise CompileError(
            f"the compiled chat template renders unlike transformers: {json.dumps(chat)}\n"
            f"  theirs {shown(theirs) if theirs is not None else 'an error of the template'}\n  ours   {said}"
        )
    return compared


def shown(text: Any) -> str:
    """Escaped, and cut in the middle if long."""
    escaped = ascii(text)
    return escaped if len(escaped) <= 400 else f"{escaped[:200]} ... {escaped[-200:]}"


def around(theirs: Sequence[int], ours: Any) -> str:
    """Both lists of ids around the first that differs."""
    if not isinstance(ours, list):
        return f"  theirs {list(theirs)[:40]}\n  ours   {ours}"
    pairs = zip(theirs, ours, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(theirs), len(ours)))
    start, stop = max(first - SHOWN_IDS, 0), first + SHOWN_IDS + 1
    return f"  ids {start} to {stop}:\n  theirs {list(theirs)[start:stop]}\n  ours   {ours[start:stop]}"
