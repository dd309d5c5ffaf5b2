"""Training text for the demo model: the sources of the running interpreter's standard library.

`documents` gives the source files, `conversations` ChatML dialogues made from their functions,
`train_tokenizer` a byte-level BPE of the Qwen kind, and `Corpus` the token ids and the batches.
All of it depends only on the library's sources and a seed.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
import textwrap
import tokenize
import warnings
from pathlib import Path

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

END_OF_TEXT, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# As in Qwen3: single tokens, yet part of the visible text.
TOOL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
VOCAB_SIZE = 4096
# The pre-tokenizer of Qwen2 and Qwen3 (Apache-2.0 checkpoints; the pattern is part of the format).
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Tests repeat themselves, pydoc_data is one literal; the rest is not the library's own.
SKIPPED_DIRS = {"test", "tests", "idle_test", "site-packages", "__pycache__"} | {
    "pydoc_data",
    "_vendor",
    "_bundled",
}
MAX_CONVERSATION_CHARS = 1100
SYSTEM_PROMPT = "You are a helpful assistant."


def _is_code(text: str) -> bool:
    """False for tables (code pages, entity lists): mostly digits and punctuation, or no logic at all."""
    if "decoding_table = (" in text or "decoding_map = " in text:
        return False
    letters = sum(c.isalpha() for c in text)
    return letters > 0.45 * len(text) and re.search(r"^\s*(def|class|import|from) ", text, re.M) is not None


def documents() -> dict[str, str]:
    """Source text by path relative to the standard library, in sorted order, without tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for folder, dirs, files in os.walk(root):
        dirs[:] = sorted(d for d in dirs if d not in SKIPPED_DIRS and not d.startswith("config-"))
        for name in sorted(files):
            if not name.endswith(".py") or name.startswith("_sysconfigdata"):
                continue
            path = Path(folder, name)
            with tokenize.open(path) as f:
                text = f.read()
            if len(text) > 200 and _is_code(text):
                found[path.relative_to(root).as_posix()] = text
    return found


def is_validation(path: str) -> bool:
    """About one file in forty is held out, chosen by the hash of its path."""
    return hashlib.sha256(path.encode()).digest()[0] < 6


VERBS = """
Add Append Apply Call Check Close Compare Compute Convert Copy Create Decode Delete Determine Encode Find
Format Generate Get Handle Insert Iterate Load Make Open Parse Print Process Read Register Remove Replace
Return Run Send Set Split Start Test Update Wait Write
"""
THIRD_PERSON = {
    v: re.sub(r"ys$", "ies", v.lower() + ("es" if v.endswith("ss") else "s")) for v in VERBS.split()
}


def _third_person(docstring: str) -> str | None:
    """`Return the sum.` -> `returns the sum`: the first sentence, or None if it begins with no known verb."""
    sentence = re.split(r"\.\s|\n\s*\n|\.$", docstring.strip(), maxsplit=1)[0]
    words = " ".join(sentence.split()).split(" ", 1)
    verb = THIRD_PERSON.get(words[0]) or (
        words[0].lower() if words[0].lower() in THIRD_PERSON.values() else None
    )
    return f"{verb} {words[1]}" if verb and len(words) == 2 and len(words[1]) < 160 else None


def _requests(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> list[str]:
    """What a user could ask to get this function."""
    doc = ast.get_docstring(node)
    head_end = node.body[0].end_lineno if doc else node.body[0].lineno - 1
    head = textwrap.dedent("\n".join(lines[node.lineno - 1 : head_end])).rstrip()
    asks = [f"Complete this function:\n```python\n{head}\n```"]
    does = _third_person(doc) if doc else None
    if does:
        asks += [
            f"Write a function {node.name} that {does}.",
            f"Write a function that {does}.",
            f"Write a Python function `{node.name}` that {does}.",
        ]
    elif not node.name.startswith("__"):
        asks += [f"Write a function {node.name}.", f"Write a Python function called `{node.name}`."]
    return asks


def conversations(sources: dict[str, str], seed: int) -> list[str]:
    """ChatML dialogues for each short function: asked by its head, and by its name or what it does."""
    rng = np.random.default_rng(seed)
    found = []
    for text in sources.values():
        lines = text.expandtabs(8).split("\n")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if (
                not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                or node.body[0].lineno == node.lineno
            ):
                continue
            body = node.body[1:] if ast.get_docstring(node) else node.body
            source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            if not body or isinstance(body[0], ast.Pass) or len(source) > MAX_CONVERSATION_CHARS:
                continue
            asks = _requests(node, lines)
            for ask in [asks[0], *rng.permutation(asks[1:])[:1].tolist()]:
                system = SYSTEM_PROMPT if rng.random() < 0.15 else None
                found.append(chatml(ask, source, system))
    return found


def chatml(user: str, assistant: str, system: str | None = None) -> str:
    """One dialogue as the chat template renders it (train.py checks that they agree)."""
    turns = ([("system", system)] if system else []) + [("user", user), ("assistant", assistant)]
    return "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in turns)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE like Qwen's: NFC, its pre-tokenizer, all 256 bytes; special tokens come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(TOOL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TOOL_TOKENS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


class Corpus:
    """Token ids of the corpus and the batches made of them; a batch depends on the seed and its number."""

    def __init__(self, tokenizer: Tokenizer, seed: int, length: int, chat_share: float) -> None:
        self.seed, self.length, self.chat_share = seed, length, chat_share
        sources = documents()
        train = {p: t for p, t in sources.items() if not is_validation(p)}
        valid = {p: t for p, t in sources.items() if is_validation(p)}
        self.end = tokenizer.token_to_id(END_OF_TEXT)
        self.train = self._pack(tokenizer, list(train.values()), shuffle=True)[0]
        self.valid = self._pack(tokenizer, list(valid.values()))[0]
        self.valid_bytes = sum(len(t.encode()) for t in valid.values())
        dialogues = conversations(train, seed)
        np.random.default_rng(seed).shuffle(dialogues)
        self.chat, self.chat_starts = self._pack(tokenizer, dialogues)
        self.sizes = {
            "files_train": len(train),
            "files_validation": len(valid),
            "bytes_train": sum(len(t.encode()) for t in train.values()),
            "bytes_validation": self.valid_bytes,
            "tokens_train": len(self.train),
            "tokens_validation": len(self.valid),
            "conversations": len(dialogues),
            "tokens_conversations": len(self.chat),
        }

    def _pack(
        self, tokenizer: Tokenizer, texts: list[str], shuffle: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """All texts in one array of ids, each followed by the end-of-text token, and where each begins."""
        if shuffle:
            np.random.default_rng(self.seed).shuffle(texts)
        pieces = [[*e.ids, self.end] for e in tokenizer.encode_batch(texts)]
        starts = np.cumsum([0] + [len(p) for p in pieces[:-1]])
        return np.concatenate([np.asarray(p, np.int64) for p in pieces]), starts

    def batch(self, number: int, rows: int) -> np.ndarray:
        """ids [rows, length + 1] of batch `number`: code in a fresh order each epoch, or dialogues."""
        rng = np.random.default_rng([self.seed, number])
        out = np.empty((rows, self.length + 1), np.int64)
        per_epoch = len(self.train) // self.length - 2
        for row in range(rows):
            if rng.random() < self.chat_share:
                last = np.searchsorted(self.chat_starts, len(self.chat) - self.length - 1)
                at = self.chat_starts[rng.integers(last)]
                out[row] = self.chat[at : at + self.length + 1]
                continue
            epoch, index = divmod(number * rows + row, per_epoch)
            order = np.random.default_rng([self.seed, 1, epoch])
            offset = order.integers(self.length)
            at = offset + order.permutation(per_epoch)[index] * self.length
            out[row] = self.train[at : at + self.length + 1]
        return out

    def validation(self, windows: int) -> np.ndarray:
        """ids [windows, length + 1], evenly spread over the held-out files, or all there are."""
        most = (len(self.valid) - 1) // self.length
        picks = np.linspace(0, most - 1, min(windows, most)).astype(np.int64) * self.length
        return np.stack([self.valid[at : at + self.length + 1] for at in picks])
