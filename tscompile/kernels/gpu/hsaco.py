"""What a code object of an AMD GPU says of itself: its kernel's parameters, and what it takes.

It is an ELF file, whose note of the owner AMDGPU holds MessagePack: "amdhsa.kernels" lists of each kernel
its arguments' offsets and sizes in the kernarg segment, registers, spills and scratch (LLVM, "User Guide for
AMDGPU Backend", code object V5 metadata; MessagePack's specification).
"""

from __future__ import annotations

import struct
from typing import Any

from tscompile.errors import InternalError
from tscompile.kernels.gpu.cubin import Resources, sections

NT_AMDGPU_METADATA = 32
EM_AMDGPU = 224
MACHINES = {"gfx950": 0x4F}  # EF_AMDGPU_MACH: the low byte of e_flags


def kernel_of(code: bytes, symbol: str, arch: str) -> dict[str, Any]:
    """What the note says of the kernel. InternalError unless the code object is for `arch` and has it."""
    note = next((data for name, data in sections(code) if name == ".note"), b"")
    (machine,), (flags,) = struct.unpack_from("<H", code, 18), struct.unpack_from("<I", code, 48)
    found, wanted = (machine, flags & 0xFF), (EM_AMDGPU, MACHINES[arch])
    if found != wanted:
        raise InternalError(f"a code object for the machine {found}, wanted {wanted}, which is {arch}")
    for kernel in _metadata(note).get("amdhsa.kernels", []):
        if kernel[".name"] == symbol:
            return dict(kernel)
    raise InternalError(f"the code object has no kernel {symbol}")


def parameters(kernel: dict[str, Any]) -> list[tuple[int, int]]:
    """(offset, bytes) of each parameter in the kernarg segment, in order; what HIP's runtime would fill in
    ("hidden") too."""
    return [(arg[".offset"], arg[".size"]) for arg in kernel[".args"]]


def resources(kernel: dict[str, Any]) -> Resources:
    """registers: vector registers of both kinds, which share one file."""
    return Resources(
        kernel[".vgpr_count"],
        kernel[".private_segment_fixed_size"],
        4 * (kernel[".vgpr_spill_count"] + kernel[".sgpr_spill_count"]),
        (),
    )


def _metadata(note: bytes) -> dict[str, Any]:
    at = 0
    while at + 12 <= len(note):
        name_bytes, size, kind = struct.unpack_from("<III", note, at)
        name = note[at + 12 : at + 12 + name_bytes]
        at += 12 + -(-name_bytes // 4) * 4
        if kind == NT_AMDGPU_METADATA and name == b"AMDGPU\0":
            found, _ = unpack(note, at)
            return dict(found)
        at += -(-size // 4) * 4
    raise InternalError("a code object without AMDGPU metadata")


# MessagePack: first byte -> of numbers, struct's letter; of texts and containers, the letter of the length.
_NUMBERS = dict(zip(range(0xCA, 0xD4), "fdBHIQbhiq", strict=True))
_TEXTS = {0xD9: "B", 0xDA: "H", 0xDB: "I"}
_CONTAINERS = {
    0xDC: ("H", 1),
    0xDD: ("I", 1),
    0xDE: ("H", 2),
    0xDF: ("I", 2),
}  # items each: an array 1, a map 2
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def unpack(data: bytes, at: int = 0) -> tuple[Any, int]:
    """(the value that begins at byte `at`, where the next one does). InternalError for binary and extension
    types, which no metadata has."""

    def number(letter: str) -> tuple[Any, int]:
        return struct.unpack_from(f">{letter}", data, at + 1)[0], at + 1 + struct.calcsize(letter)

    first = data[at]
    if first < 0x80:
        return first, at + 1
    if first >= 0xE0:
        return first - 0x100, at + 1
    if first in _CONSTANTS:
        return _CONSTANTS[first], at + 1
    if first in _NUMBERS:
        return number(_NUMBERS[first])
    if 0xA0 <= first < 0xC0 or first in _TEXTS:
        size, at = (first & 0x1F, at + 1) if first < 0xC0 else number(_TEXTS[first])
        return data[at : at + size].decode(), at + size
    if first < 0xA0:
        each = 1 if first >= 0x90 else 2
        num, at = first & 0x0F, at + 1
    elif first in _CONTAINERS:
        letter, each = _CONTAINERS[first]
        num, at = number(letter)
    else:
        raise InternalError(f"metadata with a MessagePack type 0x{first:02x}")
    items = []
    for _ in range(num * each):
        item, at = unpack(data, at)
        items.append(item)
    return (items, at) if each == 1 else (dict(zip(items[::2], items[1::2], strict=True)), at)
