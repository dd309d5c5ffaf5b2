"""Token ids and decoded texts equal Hugging Face tokenizers', text for text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from text_corpus import FULL, SEED, every_character, python_sources, random_strings
from text_vocabularies import KINDS, REAL
from tokenizers import Tokenizer

Compiled = Callable[[str], tuple[Path, Tokenizer]]
Lines = Callable[[str, Path, list[dict[str, Any]]], list[dict[str, Any]]]


def first_difference(texts: list[str], ours: list[list[int]], reference: list[list[int]]) -> str:
    """Empty if all are equal, else how many differ and where the first does."""
    assert len(texts) == len(ours) == len(reference)
    different = [i for i in range(len(texts)) if ours[i] != reference[i]]
    if not different:
        return ""
    i = different[0]
    at = next(
        (k for k, (a, b) in enumerate(zip(ours[i], reference[i], strict=False)) if a != b),
        min(len(ours[i]), len(reference[i])),
    )
    return (
        f"{len(different)} of {len(texts)} texts differ; the first, {texts[i][:200]!r}, at token {at}: "
        f"{ours[i][at : at + 8]} instead of {reference[i][at : at + 8]}"
    )


def corpus(kind: str) -> list[str]:
    sources = python_sources() if FULL or kind in REAL else python_sources()[:30]
    return ["", " ", "\n", "a", *sources, *random_strings(), *every_character()]


@pytest.mark.parametrize("kind", KINDS)
def test_ids(kind: str, compiled: Compiled, lines: Lines) -> None:
    folder, reference = compiled(kind)
    texts = corpus(kind)
    for add in (False, True):
        chosen = texts if not add else texts[:4] + random_strings()
        ours = [
            reply["ids"]
            for reply in lines("encode", folder, [{"text": t, "add_special_tokens": add} for t in chosen])
        ]
        theirs = [encoding.ids for encoding in reference.encode_batch_fast(chosen, add_special_tokens=add)]
        assert not first_difference(chosen, ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_as_text(kind: str, compiled: Compiled, lines: Lines) -> None:
    folder, reference = compiled(kind)
    texts = random_strings()
    plain = Tokenizer.from_str(reference.to_str())
    plain.encode_special_tokens = True
    ours = [
        reply["ids"]
        for reply in lines("encode", folder, [{"text": t, "split_special_tokens": True} for t in texts])
    ]
    theirs = [encoding.ids for encoding in plain.encode_batch_fast(texts, add_special_tokens=False)]
    assert not first_difference(texts, ours, theirs)
    special = [token.content for token in reference.get_added_tokens_decoder().values() if token.special]
    assert not special or any(token in text for token in special for text in texts), (
        "the texts must spell special tokens"
    )


def id_sequences(reference: Tokenizer) -> list[list[int]]:
    """Ids of texts, and ids at random: the latter make every kind of broken UTF-8."""
    rng = random.Random(SEED)
    size = max(reference.get_vocab().values()) + 1
    specials = list(reference.get_added_tokens_decoder())
    sequences = [encoding.ids for encoding in reference.encode_batch_fast(random_strings())]
    sequences += [encoding.ids for encoding in reference.encode_batch_fast(python_sources()[:40])]
    for _ in range(3_000 if FULL else 1_000):
        # Mostly low ids, where the bytes are.
        bound = rng.choice([300, size, size + 10])
        ids = [rng.randrange(bound) for _ in range(rng.randrange(30))]
        sequences.append(
            [rng.choice(specials) if specials and rng.random() < 0.1 else token for token in ids]
        )
    return sequences


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [False, True])
def test_decoded_text(kind: str, skip: bool, compiled: Compiled, lines: Lines) -> None:
    folder, reference = compiled(kind)
    sequences = id_sequences(reference)
    requests = [{"ids": ids, "skip_special_tokens": skip, "pieces": True} for ids in sequences]
    theirs = reference.decode_batch(sequences, skip_special_tokens=skip)
    for ids, reply, expected in zip(sequences, lines("decode", folder, requests), theirs, strict=True):
        assert reply["text"] == expected, ids
        assert "".join(reply["pieces"]) == expected
        assert len(reply["pieces"]) == len(ids) + 1


def test_pieces_are_whole_characters_and_come_at_once(compiled: Compiled, lines: Lines) -> None:
    folder, reference = compiled("qwen")
    ids = reference.encode("naïve 🧑‍🚀 日本語!").ids
    [reply] = lines("decode", folder, [{"ids": ids, "pieces": True}])
    assert "\ufffd" not in reply["text"]
    assert reply["text"] == "naïve 🧑‍🚀 日本語!"
    assert "" in reply["pieces"], "an emoji is several tokens"
    assert b"".join(map(bytes, reply["bytes"])).decode() == reply["text"]
    # Nothing that is complete is held back: what has come out is the longest valid start of the bytes so far.
    so_far, shown = b"", ""
    for piece, token in zip(reply["pieces"], reply["bytes"], strict=False):
        so_far, shown = so_far + bytes(token), shown + piece
        assert shown == so_far.decode(errors="ignore")


def test_a_continuation_keeps_its_leading_space(compiled: Compiled, lines: Lines) -> None:
    folder, reference = compiled("mistral_v1")
    ids = reference.encode("a time", add_special_tokens=False).ids
    replies = lines("decode", folder, [{"ids": ids}, {"ids": ids, "continues": True}])
    assert [reply["text"] for reply in replies] == ["a time", " a time"]


@pytest.mark.parametrize("kind", ["qwen", "llama3", "mistral_v1"])
def test_token_bytes(kind: str, compiled: Compiled, lines: Lines) -> None:
    """The bytes of tokens, put together, are the text."""
    folder, reference = compiled(kind)
    texts = [text for text in random_strings() if text and not text.startswith("\ufffd")]
    sequences = [encoding.ids for encoding in reference.encode_batch_fast(texts, add_special_tokens=False)]
    expected = reference.decode_batch(sequences, skip_special_tokens=False)
    for reply, text in zip(
        lines("decode", folder, [{"ids": ids, "pieces": True} for ids in sequences]), expected, strict=True
    ):
        joined = b"".join(map(bytes, reply["bytes"])).decode()
        assert joined == text or (kind == "mistral_v1" and joined == " " + text)
