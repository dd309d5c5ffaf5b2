"""A lockfile of kernels: of the configurations that `select` offers, the one that a device found quickest.

Text, to be kept with a model's other sources: a line an entry, JSON, sorted; lines that begin with # are left
alone. tests/gpu/lease.py writes it where there is a GPU, `tscompile build --kernels-lock FILE` replays it.

    {"bucket":"T=8","config":"linear rows=16 ...","date":"2026-11-22","device":"NVIDIA H200","kernel":"linear
     args=x,weight,out rows=T ...","target":"sm_90a","us":12.5}

kernel: a description (tscompile/kernels/desc.py); bucket: the largest step that it is for; us: what a launch
took. An entry of a kernel or a bucket that a build does not have is for other builds. One whose
configuration is not offered, or does not fit, is an error: what is built would not be what was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tscompile import canonical
from tscompile.errors import CompileError
from tscompile.kernels.desc import KernelDesc
from tscompile.kernels.gpu.spec import Rows

HEAD = "# Kernels that a device has measured: tscompile build --kernels-lock THIS_FILE\n"
FIELDS = ("bucket", "config", "date", "device", "kernel", "target", "us")
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Entry:
    """A line. us: microseconds of a launch of `config`."""

    target: str
    kernel: str
    bucket: str
    config: str
    us: float
    device: str
    date: str

    @property
    def key(self) -> Key:
        return self.target, self.kernel, self.bucket


def bucket_of(made: KernelDesc, rows: Rows) -> str:
    """What of a step's size a kernel depends on: "T=8", or "T=8 S=4"."""
    dim = getattr(made, "rows", "")
    return f"{dim}={rows.of(dim)}" if dim else f"T={rows.tokens} S={rows.seqs}"


class Lockfile:
    """The entries of a file, by target, kernel and bucket. used: those that a build has asked for."""

    def __init__(self, path: Path, lines: Iterable[tuple[int, Entry]] = ()) -> None:
        """lines: entries with their line numbers. CompileError if two have one key."""
        self.path = path
        self.entries: dict[Key, tuple[int, Entry]] = {}
        self.used: set[Key] = set()
        for number, entry in lines:
            if (other := self.entries.setdefault(entry.key, (number, entry))[0]) != number:
                raise CompileError(
                    f"{path}:{number}: line {other} has an entry for this target, kernel and bucket already: "
                    "keep one of them"
                )

    @classmethod
    def read(cls, path: Path) -> Lockfile:
        """CompileError, with the line's number, for what is no entry."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CompileError(f"--kernels-lock {path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise CompileError(f"--kernels-lock {path} is not text: it is no lockfile of kernels") from None
        numbered = enumerate(text.splitlines(), 1)
        return cls(
            path,
            [(i, _entry(line, f"{path}:{i}")) for i, line in numbered if line.strip() and line[0] != "#"],
        )

    def find(self, target: str, made: KernelDesc, rows: Rows) -> Entry | None:
        """What was measured of a kernel in a bucket."""
        key = (target, made.text, bucket_of(made, rows))
        if key not in self.entries:
            return None
        self.used.add(key)
        return self.entries[key][1]

    def where(self, entry: Entry) -> str:
        return f"{self.path}:{self.entries[entry.key][0]}"


def text_of(entries: Iterable[Entry]) -> str:
    """The file's text: of entries with the same key, the last."""
    kept = {entry.key: entry for entry in entries}
    lines = sorted(canonical.dumps(asdict(entry)).decode() for entry in kept.values())
    return HEAD + "".join(f"{line}\n" for line in lines)


def _entry(line: str, where: str) -> Entry:
    def wrong(what: str) -> CompileError:
        return CompileError(
            f"{where}: {what}; wanted a JSON object with {', '.join(FIELDS)}: measure again, or leave it out"
        )

    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise wrong("no JSON") from None
    if not isinstance(found, dict) or sorted(found) != list(FIELDS):
        raise wrong(f"has {', '.join(sorted(found))}" if isinstance(found, dict) else "no object")
    us = found["us"]
    texts = all(isinstance(found[name], str) for name in FIELDS if name != "us")
    if not texts or isinstance(us, bool) or not isinstance(us, (int, float)) or not 0 < us < math.inf:
        raise wrong("a value of another kind: us is a positive number, the rest are texts")
    return Entry(**found)
