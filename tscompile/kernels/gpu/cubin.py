"""What a cubin says of itself, read from the file: its kernel's parameters. And what ptxas says of it.

A cubin is an ELF file; `.nv.info.<kernel>` is a list of attributes, (format u8, attribute u8, size u16) and,
of format 4, `size` bytes. EIATTR_KPARAM_INFO has 12 of them: index u32, ordinal u16, offset u16, and a word
whose bits from 18 on are the parameter's bytes. `cuobjdump -elf` shows the same (tests/gpu).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from tscompile.errors import InternalError

KPARAM_INFO = 0x17
SIZED = 4  # the format whose value has a size of its own


class Resources(NamedTuple):
    """Of a kernel: registers a thread; bytes of stack and of spills a thread; other words of ptxas."""

    registers: int
    stack: int
    spills: int
    warnings: tuple[str, ...]


def parameters(cubin: bytes, symbol: str) -> list[tuple[int, int]]:
    """(offset, bytes) of each parameter, in order."""
    found = {}
    info = next((data for name, data in sections(cubin) if name == f".nv.info.{symbol}"), None)
    if info is None:
        raise InternalError(f"the cubin has no kernel {symbol}")
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        if form == SIZED:
            if attribute == KPARAM_INFO:
                _, ordinal, offset, word = struct.unpack_from("<IHHI", info, at + 4)
                found[ordinal] = (offset, word >> 18)
            at += size
        at += 4
    return [found[ordinal] for ordinal in sorted(found)]


def sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each section of a little-endian ELF64 file."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise InternalError("machine code that is no ELF64 file")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", elf, table + i * entry) for i in range(count)]
    start = heads[names][4]
    for name, kind, _, _, offset, size in heads:
        end = elf.index(b"\0", start + name)
        yield elf[start + name : end].decode(), b"" if kind == 8 else elf[offset : offset + size]  # 8: NOBITS


def resources(said: str) -> Resources:
    """Of the output of `ptxas -v` for one kernel."""

    def number(pattern: str) -> int:
        match = re.search(pattern, said)
        if match is None:
            raise InternalError(f"ptxas says nothing like {pattern!r}: {said}")
        return int(match[1])

    stack, stores, loads = (
        number(rf"(\d+) bytes {what}") for what in ("stack frame", "spill stores", "spill loads")
    )
    lines = [line.strip() for line in said.splitlines()]
    warnings = tuple(
        line for line in lines if re.search(r"\b(warning|error)\b|\bC\d{4}\b", line, re.IGNORECASE)
    )
    return Resources(number(r"Used (\d+) registers"), stack, stores + loads, warnings)
