"""Texts for comparing tokenizers: Python's sources, and random strings that look for trouble."""

from __future__ import annotations

import os
import random
import sysconfig
from pathlib import Path

# The default run takes a seeded sample; TS_TEXT_FULL=1 takes everything, which keeps the reference busy.
FULL = os.environ.get("TS_TEXT_FULL") == "1"
SEED = 20261121

SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<s>",
    "</s>",
    "<unk>",
]
SPECIAL += ["[INST]", "[/INST]", "<think>", "<tool_call>", "<0x0A>", "<0xFF>"]
SPECIAL += ["<left>", "<right>", "<both>", "word", "sword", "normal", "<left>er", "ÿé"]
# Blocks of Unicode where scripts, marks, white space, digits and unassigned points meet.
STARTS = [
    0x00,
    0x20,
    0x80,
    0x300,
    0x370,
    0x590,
    0x900,
    0xF00,
    0x1100,
    0x1E00,
    0x2000,
    0x2070,
    0x2E80,
    0x3100,
    0x4E00,
]
STARTS += [
    0xA000,
    0xAC00,
    0xE000,
    0xF900,
    0xFB00,
    0x10000,
    0x11000,
    0x1D000,
    0x1E000,
    0x1F000,
    0x20000,
    0xE0000,
]
BLOCK = 0x400
PIECES = [
    " ",
    "  ",
    "    ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\u200d",
    "'s",
    "'LL",
    "'\u017f",
    "``",
]
PIECES += [
    "▁",
    "▁▁",
    "norm al",
    "é normal",
    "e\u0301 normal",
    " spaced ",
    "\n\n",
    "12345",
    "²³½",
    "ﬁ",
    "Å",
    "\u0301",
]
PIECES += ["한", "🧑‍🚀"]


def python_sources() -> list[str]:
    """The standard library's sources, or a sample of them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    if not FULL:
        paths = random.Random(SEED).sample(paths, 150)
    # Some test files of the library are deliberately not UTF-8.
    return [path.read_bytes().decode("utf-8", errors="replace") for path in paths]


def random_text(rng: random.Random) -> str:
    """Up to 60 characters or pieces, from one range of Unicode or from many."""
    favourites = rng.sample(STARTS, rng.choice([1, 2, 3]))
    text = []
    for _ in range(rng.randrange(60)):
        kind = rng.random()
        if kind < 0.15:
            text.append(rng.choice(PIECES))
        elif kind < 0.2:
            text.append(rng.choice(SPECIAL))
        elif kind < 0.21:
            point = rng.randrange(0x110000 - 0x800)
            text.append(chr(point if point < 0xD800 else point + 0x800))  # no surrogates
        elif kind < 0.3:
            text.append(chr(rng.randrange(128)))
        else:
            text.append(chr(rng.choice(favourites) + rng.randrange(BLOCK)))
    return "".join(text)


def random_strings() -> list[str]:
    """10,000 strings, or a fifth of them."""
    rng = random.Random(SEED)
    return [random_text(rng) for _ in range(10_000 if FULL else 2_000)]


def every_character() -> list[str]:
    """Every code point between letters, and between spaces."""
    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    step = 2_000
    chunks = [points[i : i + step] for i in range(0, len(points), step)]
    if not FULL:
        # All of the assigned planes' first parts: the rest is nearly empty.
        chunks = chunks[:70]
    return ["a".join(chunk) for chunk in chunks] + [" ".join(chunk) for chunk in chunks]
