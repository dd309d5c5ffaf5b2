"""Writes plan.tsp, a safetensors file (ARCHITECTURE.md, "The plan"). tscompile/reader.py reads it.

Weights are made, hashed and written one at a time: all shapes are known beforehand, so the header goes first
and the whole model is never in memory. The file appears under its name complete or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tscompile import canonical
from tscompile.errors import CompileError, InternalError
from tscompile.mesh import Mesh

SCHEMA = 3
ALIGN = 64  # bytes: where the data begins, and so every weight
MANIFEST, SEAL = "tsp/manifest", "tsp/seal"
DTYPE_BYTES = {"U8": 1, "BF16": 2, "F32": 4}
METADATA = {"format": "tsp", "tsp_schema": str(SCHEMA)}

Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class Entry:
    """One entry to write. `data` is called once, when the entry's turn comes, and gives its bytes in
    pieces."""

    name: str
    dtype: str  # safetensors' word
    shape: tuple[int, ...]
    data: Callable[[], Iterable[bytes | memoryview]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def kind(self) -> str:
        return kind_of(self.name)


def blob(name: str, data: bytes) -> Entry:
    """A reserved entry of known bytes."""
    return Entry(name, "U8", (len(data),), lambda: (data,))


def kind_of(name: str) -> str:
    """The manifest's word for an entry: its name decides."""
    for kind in ("program", "kernels", "text"):
        if name.startswith(f"tsp/{kind}/"):
            return kind
    return "report" if name.startswith("tsp/") else "weight"


def write(
    path: Path,
    entries: Sequence[Entry],
    *,
    model: Mapping[str, Any],
    mesh: Mesh,
    targets: Sequence[str],
    producer: Mapping[str, Any],
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes the plan of `entries` to `path`, replacing what is there only once all is on the disk.

    CompileError if the file system refuses, naming the bytes wanted and free; then nothing is left and what
    was at `path` still is. InternalError if an entry gives other bytes than its shape says."""
    entries = sorted(entries, key=lambda entry: entry.kind != "weight")  # weights first; stable
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "mesh": mesh.axes,
        "model": dict(model),
        "producer": dict(producer),
        "targets": list(targets),
        "entries": {
            e.name: {
                "dtype": e.dtype,
                "shape": e.shape,
                "bytes": e.num_bytes,
                "sha256": "0" * 64,
                "kind": e.kind,
            }
            for e in entries
        },
    }
    if len(manifest["entries"]) != len(entries):
        raise InternalError("two entries of a plan have one name")
    manifest_bytes = len(canonical.dumps(manifest))  # a hash has 64 digits, whatever they are
    head = header(
        [*entries, Entry(MANIFEST, "U8", (manifest_bytes,), tuple), Entry(SEAL, "U8", (32,), tuple)]
    )
    total = len(head) + sum(e.num_bytes for e in entries) + manifest_bytes + 32
    with replacing(path, total) as fd:
        done = write_all(fd, head)
        for entry in entries:
            digest, before = hashlib.sha256(), done
            for piece in entry.data():
                digest.update(piece)
                done += write_all(fd, piece)
                progress(done, total)
            if done - before != entry.num_bytes:
                raise InternalError(
                    f"{entry.name} gave {done - before} bytes, its shape says {entry.num_bytes}"
                )
            manifest["entries"][entry.name]["sha256"] = digest.hexdigest()
        last = canonical.dumps(manifest)
        done += write_all(fd, last + hashlib.sha256(head + last).digest())
        assert done == total
        progress(done, total)


def header(entries: Sequence[Entry]) -> bytes:
    """The file up to its data: length, canonical JSON, spaces to a multiple of 64."""
    offset = 0
    table: dict[str, Any] = {"__metadata__": METADATA}
    for entry in entries:
        if entry.kind == "weight" and entry.num_bytes % ALIGN:
            raise InternalError(
                f"the weight {entry.name} has {entry.num_bytes} bytes, wanted a multiple of {ALIGN}"
            )
        end = offset + entry.num_bytes
        table[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (offset, end)}
        offset = end
    text = canonical.dumps(table)
    text += b" " * (-(8 + len(text)) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def write_all(fd: int, data: bytes | memoryview) -> int:
    """Writes all of `data`; its size in bytes."""
    view = memoryview(data).cast("B")
    left = view
    while left:
        left = left[os.write(fd, left) :]
    return len(view)


@contextmanager
def replacing(path: Path, num_bytes: int) -> Iterator[int]:
    """A new file of `num_bytes`, its space reserved, that takes the name `path` at the end of the block. On
    any exception it is removed instead. CompileError for what the file system says."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise CompileError(f"{path} cannot be written: {error.strerror}") from None
    try:
        try:
            reserve(fd, num_bytes)
            yield fd
            os.fsync(fd)
            os.replace(temporary, path)
        finally:
            os.close(fd)
        sync_folder(path.parent)
    except OSError as error:
        raise CompileError(no_room(path, num_bytes, error)) from None
    finally:
        temporary.unlink(missing_ok=True)


def reserve(fd: int, num_bytes: int) -> None:
    """Finds out about a full disk before the work, where the file system can tell."""
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` outlast a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def no_room(path: Path, num_bytes: int, error: OSError) -> str:
    free = shutil.disk_usage(path.parent).free
    return (
        f"{path} could not be written: {error.strerror}. The plan takes {num_bytes:,} bytes, {free:,} are "
        "free there: make room, or choose another place with -o. Nothing was left behind"
    )
