"""Reads plan.tsp, and refuses what the engine refuses (csrc/plan.cpp): each CompileError says where, and
both numbers."""

from __future__ import annotations

import hashlib
import itertools
import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tscompile import canonical
from tscompile.errors import CompileError
from tscompile.plan import ALIGN, DTYPE_BYTES, MANIFEST, METADATA, SCHEMA, SEAL, kind_of

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 100_000_000
MAX_RANKS = 256


@dataclass(frozen=True)
class Located:
    """An entry: bytes begin..end of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Plan:
    """A mapped plan, checked but for the weights' hashes (`verify_weights` checks those). entries: in order
    of data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size < 8:
                    raise self._wrong(f"it has {self.size} bytes, not even the 8 of the header's length")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CompileError(f"{path} cannot be read: {error.strerror}") from None
        self.entries = {entry.name: entry for entry in self._header()}
        self._check_order()
        self._check_seal()
        self.manifest: dict[str, Any] = self.json(MANIFEST)
        self._check_manifest()
        for name in self.entries:
            if name not in (MANIFEST, SEAL) and kind_of(name) != "weight":
                self._check_hash(name)

    def bytes(self, name: str) -> memoryview:
        """An entry's bytes. CompileError if there is none of that name."""
        entry = self._entry(name)
        return memoryview(self._map)[entry.begin : entry.end]

    def json(self, name: str) -> Any:
        """An entry of canonical JSON."""
        return canonical.loads(bytes(self.bytes(name)), f"{self.path}: {name}")

    def tensor(self, name: str) -> Tensor:
        """A weight as it is stored, over the mapped file."""
        import torch  # only here: to inspect a plan needs none

        entry = self._entry(name)
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}[entry.dtype]
        return torch.frombuffer(self.bytes(name), dtype=dtype).view(entry.shape)

    def verify_weights(self) -> None:
        for name in self.entries:
            if kind_of(name) == "weight":
                self._check_hash(name)

    def _entry(self, name: str) -> Located:
        if name not in self.entries:
            raise self._wrong(f"it has no entry {name!r}")
        return self.entries[name]

    def _wrong(self, what: str) -> CompileError:
        return CompileError(f"{self.path} is not a whole plan: {what}")

    def _header(self) -> list[Located]:
        length = int.from_bytes(self._map[:8], "little")
        if length > min(MAX_HEADER_BYTES, self.size - 8):
            raise self._wrong(
                f"the header's length is {length} bytes, but {self.size - 8} follow, and 10^8 is the most"
            )
        self.data = 8 + length
        text = self._map[8 : self.data]
        spaces = len(text) - len(text.rstrip(b" "))
        if self.data % ALIGN or spaces >= ALIGN:
            raise self._wrong(
                f"data begins at byte {self.data} after {spaces} spaces, wanted the next multiple of {ALIGN}"
            )
        table = canonical.loads(text[: len(text) - spaces], f"{self.path}: the header")
        if not isinstance(table, dict):
            raise self._wrong("the header is no object")
        metadata = table.pop("__metadata__", None)
        if metadata != METADATA:
            found = metadata.get("tsp_schema") if isinstance(metadata, dict) else None
            raise self._wrong(f"__metadata__ is {str(metadata)[:100]}, wanted {METADATA}" + _age(found))
        located = sorted(
            (self._locate(name, item) for name, item in table.items()), key=lambda e: (e.begin, e.end)
        )
        at = self.data
        for entry in located:
            if entry.begin != at:
                raise self._wrong(
                    f"{entry.name!r} begins at byte {entry.begin}, wanted {at}: a hole or an overlap"
                )
            at = entry.end
        if at != self.size:
            raise self._wrong(f"the data ends at byte {at}, the file at {self.size}")
        return located

    def _locate(self, name: str, item: Any) -> Located:
        if not isinstance(item, dict) or sorted(item) != ["data_offsets", "dtype", "shape"]:
            raise self._wrong(f"the header's {name!r} is not of dtype, shape and data_offsets")
        dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
        if dtype not in DTYPE_BYTES:
            raise self._wrong(f"{name!r} has dtype {dtype!r}, wanted {', '.join(DTYPE_BYTES)}")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise self._wrong(f"{name!r} has shape {str(shape)[:80]} and offsets {str(offsets)[:80]}")
        wanted = DTYPE_BYTES[dtype]
        for dim in shape:
            wanted *= dim
        if offsets[1] - offsets[0] != wanted:
            raise self._wrong(
                f"{name!r} of {dtype}{shape} takes {wanted} bytes, its offsets {offsets[1] - offsets[0]}"
            )
        return Located(name, dtype, tuple(shape), self.data + offsets[0], self.data + offsets[1])

    def _check_order(self) -> None:
        """Weights first and whole lines of 64 bytes, the seal last."""
        weights_over = False
        for entry in self.entries.values():
            weight = kind_of(entry.name) == "weight"
            if weight and (weights_over or entry.begin % ALIGN or entry.end % ALIGN):
                raise self._wrong(
                    f"the weight {entry.name!r} is at {entry.begin} to {entry.end}: not aligned, or not first"
                )
            if not weight and (entry.dtype != "U8" or len(entry.shape) != 1):
                raise self._wrong(f"{entry.name!r} is {entry.dtype}{list(entry.shape)}, wanted U8 of one dim")
            weights_over |= not weight
        if not self.entries or list(self.entries)[-1] != SEAL or MANIFEST not in self.entries:
            raise self._wrong(f"wanted {MANIFEST!r}, and {SEAL!r} last")

    def _check_seal(self) -> None:
        found = hashlib.sha256(self._map[: self.data] + bytes(self.bytes(MANIFEST))).digest()
        if found != bytes(self.bytes(SEAL)):
            seal = bytes(self.bytes(SEAL)).hex()
            raise self._wrong(
                f"header or manifest is damaged: their SHA-256 is {found.hex()}, the seal says {seal}"
            )

    def _check_manifest(self) -> None:
        manifest = self.manifest
        wanted = ["entries", "mesh", "model", "producer", "schema", "targets"]
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA or sorted(manifest) != wanted:
            raise self._wrong("the manifest is of another schema")
        self._check_mesh(manifest["mesh"])
        self._check_model(manifest["model"])
        self._check_entries(manifest["entries"])
        self._check_shards(manifest["mesh"])
        self._check_targets(manifest["targets"])

    def _check_mesh(self, mesh: Any) -> None:
        """Axes of different names, [name, size] each."""
        axes = mesh if isinstance(mesh, list) else []
        plain = all(
            isinstance(axis, list)
            and len(axis) == 2
            and isinstance(axis[0], str)
            and re.fullmatch("[a-z_]{1,15}", axis[0])
            and type(axis[1]) is int
            and axis[1] >= 1
            for axis in axes
        )
        if not plain or not 1 <= len(axes) <= 8 or len({name for name, _ in axes}) != len(axes):
            raise self._wrong(f"the manifest's mesh is {str(mesh)[:80]}, wanted [name, size] of each axis")
        if (ranks := math.prod(size for _, size in axes)) > MAX_RANKS:
            raise self._wrong(f"the manifest's mesh has {ranks} ranks, at most {MAX_RANKS} can run together")

    def _check_model(self, model: Any) -> None:
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            raise self._wrong("the manifest's model has no name")
        vocab_size: Any = model.get("vocab_size")
        ends: Any = model.get("eos_token_ids")
        for key in ("vocab_size", "max_context"):
            if type(model.get(key)) is not int or model[key] < 1:
                raise self._wrong(f"the manifest's {key} is {model.get(key)!r}, wanted a positive integer")
        if not _are_sizes(ends) or any(end >= vocab_size for end in ends):
            raise self._wrong(f"eos_token_ids is {str(ends)[:80]}, wanted ids below {vocab_size}")

    def _check_entries(self, entries: Any) -> None:
        """The manifest lists just what the header has, and a hash for each."""
        if not isinstance(entries, dict) or not all(isinstance(item, dict) for item in entries.values()):
            raise self._wrong("the manifest's entries are no objects")
        listed = {
            name: {"dtype": e.dtype, "shape": list(e.shape), "bytes": e.end - e.begin, "kind": kind_of(name)}
            for name, e in self.entries.items()
            if name not in (MANIFEST, SEAL)
        }
        found = {name: {k: v for k, v in item.items() if k != "sha256"} for name, item in entries.items()}
        for name in sorted(listed.keys() | found.keys()):
            if listed.get(name) != found.get(name):
                raise self._wrong(
                    f"{name!r} is {listed.get(name)} in the header, {found.get(name)} in the manifest"
                )
            digest = entries[name].get("sha256")
            if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
                raise self._wrong(f"the SHA-256 of {name!r} is {digest!r}, wanted 64 hexadecimal digits")

    def _check_shards(self, mesh: list[tuple[str, int]]) -> None:
        """A weight that is sharded has an entry a coordinate of its axes, all alike: some rank would miss
        what is not there."""
        shards: dict[str, list[Located]] = {}
        for name, entry in self.entries.items():
            if "@" in name and kind_of(name) == "weight":
                shards.setdefault(name.partition("@")[0], []).append(entry)
        for weight, entries in shards.items():
            axes = re.findall("([a-z_]+)=", entries[0].name.partition("@")[2])
            sizes = [[f"{axis}={at}" for at in range(size)] for axis, size in mesh if axis in axes]
            wanted = {f"{weight}@{','.join(coords)}" for coords in itertools.product(*sizes) if coords}
            found = {entry.name for entry in entries}
            if wanted != found:
                missing = ", ".join(sorted(wanted ^ found)[:3])
                raise self._wrong(
                    f"of the shards of {weight!r}, the mesh {mesh} and the entries differ: {missing}"
                )
            if len({(entry.dtype, entry.shape) for entry in entries}) > 1:
                raise self._wrong(f"the shards of {weight!r} are not of one dtype and shape")

    def _check_targets(self, targets: Any) -> None:
        names = targets if isinstance(targets, list) else []
        plain = all(isinstance(name, str) and re.fullmatch("[a-z0-9_-]{1,31}", name) for name in names)
        if not names or not plain or len(set(names)) != len(names):
            raise self._wrong(f"the manifest's targets are {str(targets)[:80]}, wanted different names")
        for kind in ("program", "kernels"):
            wanted = {f"tsp/{kind}/{name}" for name in names}
            found = {name for name in self.entries if kind_of(name) == kind}
            if wanted != found:
                raise self._wrong(f"its targets are {', '.join(names)}, but it has {sorted(found)}")

    def _check_hash(self, name: str) -> None:
        found, wanted = hashlib.sha256(self.bytes(name)).hexdigest(), self.manifest["entries"][name]["sha256"]
        if found != wanted:
            raise self._wrong(f"{name!r} is damaged: its SHA-256 is {found}, the manifest says {wanted}")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _age(schema: Any) -> str:
    if isinstance(schema, str) and schema.isdigit() and len(schema) < 9 and int(schema) != SCHEMA:
        return ": update tscompile" if int(schema) > SCHEMA else ": rebuild the plan with this tscompile"
    return ""
