"""text: the checkpoint's tokenizer and chat template, compiled to what the front loads fastest.

Takes build.checkpoint. Gives build.text. The Rust crate that will serve the text compiles it; then both are
compared with their references on a corpus, and the first text that differs fails the build.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tscompile.build import Build
from tscompile.errors import CompileError
from tscompile.textcheck import Tool, compare


def run(build: Build) -> None:
    folder = build.checkpoint.folder
    if build.options.no_text:
        build.notes.append("note: built with --no-text: the plan takes and gives token ids only")
        return
    if not (folder / "tokenizer.json").is_file():
        raise CompileError(
            f"{folder} has no tokenizer.json: add it (transformers' save_pretrained writes it), or build "
            "with --no-text for a plan that takes and gives token ids only"
        )
    # what the text compiler and the references read
    for pattern in ("*.json", "*.jinja", "additional_chat_templates/*.jinja"):
        for path in sorted(folder.glob(pattern)):
            build.checkpoint.inside(str(path.relative_to(folder)))
    tool = Tool()
    with tempfile.TemporaryDirectory(prefix="tscompile-") as temporary:
        blobs = Path(temporary)
        tool.compile(folder, blobs)
        counts = compare(tool, folder, blobs)
        for name in ("tokenizer", "template"):
            data = (blobs / name).read_bytes()
            if data:
                build.text[f"tsp/text/{name}"] = data
    chats = f"{counts['chats']} chats" if "tsp/text/template" in build.text else "no chat template"
    build.notes.append(
        f"text: as its references on {counts['texts']:,} texts, {counts['decoded']:,} lists of ids, {chats}"
    )
