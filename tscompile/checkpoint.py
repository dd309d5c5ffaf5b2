"""A Hugging Face checkpoint's folder: config.json and safetensors shards, checked whole before anything is
read, mapped lazily.

Nothing in it is executed: `auto_map` and other remote code are ignored, pickles are refused.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tscompile.errors import CompileError

# safetensors' word -> torch, and bytes an element. What else the format knows is refused where a weight wants
# it.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
SIZES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
MAX_HEADER_BYTES = 100_000_000  # the safetensors crate's own limit
MAX_DIM = 2**40
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: data bytes begin..end of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


class Checkpoint:
    """config: config.json. generation: generation_config.json, or {}. tensors: by name, sorted."""

    def __init__(self, folder: Path) -> None:
        """Opens and checks config.json and every shard's header. CompileError says which file is wrong and
        how."""
        self.folder = folder
        if not folder.is_dir():
            raise CompileError(
                f"{folder} is not a folder: give the checkpoint's folder, with config.json in it"
            )
        self.config = read_json(self.inside("config.json"))
        generation = folder / "generation_config.json"
        self.generation = read_json(self.inside(generation.name)) if generation.exists() else {}
        self.tensors: dict[str, TensorInfo] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for file in self._shards():
            for info in read_header(file):
                if info.name in self.tensors:
                    other = self.tensors[info.name].file.name
                    raise CompileError(f"the tensor {info.name} is in both {other} and {file.name}")
                self.tensors[info.name] = info
        self._check_index()
        self.tensors = dict(sorted(self.tensors.items()))

    def read(self, name: str) -> Tensor:
        """The tensor, over the mapped file: only what is used is read. KeyError if there is none."""
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise CompileError(f"{info} in {info.file.name}: weights of {', '.join(DTYPES)} can be read")
        if info.file not in self._maps:
            with info.file.open("rb") as file:
                self._maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        data = self._maps[info.file]
        count = math.prod(info.shape)
        return torch.frombuffer(data, dtype=DTYPES[info.dtype], count=count, offset=info.begin).view(
            info.shape
        )

    def _shards(self) -> list[Path]:
        if (self.folder / INDEX).exists():
            self._weight_map = self._read_index()
            return [self.inside(name) for name in sorted(set(self._weight_map.values()))]
        self._weight_map = {}
        found = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if "model.safetensors" in found:
            found = ["model.safetensors"]
        if len(found) > 1:
            raise CompileError(
                f"{self.folder} has {len(found)} safetensors files but no {INDEX} that lists them"
            )
        if not found:
            pickles = [
                path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern)
            ]
            hint = (
                f" ({pickles[0]} is a pickle, which is never loaded: convert it to safetensors)"
                if pickles
                else ""
            )
            raise CompileError(f"{self.folder} has no safetensors file{hint}")
        return [self.inside(name) for name in found]

    def _read_index(self) -> dict[str, str]:
        index = read_json(self.inside(INDEX)).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise CompileError(f'{INDEX}: "weight_map" must map tensors to file names')
        for tensor, name in index.items():
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                raise CompileError(
                    f"{INDEX} puts {tensor} in {name!r}: wanted the plain name of a .safetensors file"
                )
        return index

    def _check_index(self) -> None:
        for tensor, name in self._weight_map.items():
            found = self.tensors.get(tensor)
            if found is None or found.file.name != name:
                where = f"it is in {found.file.name}" if found else "no shard has it"
                raise CompileError(f"{INDEX} puts {tensor} in {name}, but {where}")

    def inside(self, name: str) -> Path:
        """A file of the folder. A link may lead within the folder, or, as in the Hugging Face cache, from
        snapshots/REVISION to the blobs beside it; nowhere else."""
        path = self.folder / name
        if not path.is_file():
            raise CompileError(
                f"{self.folder} has no {name}" if not path.exists() else f"{path} is not a file"
            )
        real, home = path.resolve(), self.folder.resolve()
        homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        if not any(real.is_relative_to(h) for h in homes):
            raise CompileError(
                f"{path} is a link that leaves the checkpoint's folder, to {real}: copy the file instead"
            )
        return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. CompileError on anything else."""
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CompileError(f"{path} is not valid JSON: {error or 'nested too deep'}") from None
    except OSError as error:
        raise CompileError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(value, dict):
        raise CompileError(f"{path} holds a JSON {type(value).__name__}, wanted an object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(key for key, after in itertools.pairwise(keys) if key == after)
        raise ValueError(f"the key {twice!r} is there twice")
    return result


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def read_header(path: Path) -> list[TensorInfo]:
    """A safetensors file's tensors, in order of data. CompileError unless they tile the data exactly."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise CompileError(f"{path} has {size} bytes: cut short, or no safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise CompileError(
                f"{path} says its header has {length} bytes, but {size - 8} follow: cut short or garbage"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CompileError(f"{path}: the header is not valid JSON: {error or 'nested too deep'}") from None
    if not isinstance(header, dict):
        raise CompileError(f"{path}: the header is a JSON {type(header).__name__}, wanted an object")
    header.pop("__metadata__", None)
    data = 8 + length
    infos = sorted(
        (_tensor_info(path, name, entry, data) for name, entry in header.items()), key=lambda i: i.begin
    )
    at = data
    for info in infos:
        if info.begin != at:
            raise CompileError(
                f"{path}: {info.name} begins at byte {info.begin}, wanted {at}: a gap or an overlap"
            )
        at = info.end
    if at != size:
        why = "it is cut short" if at > size else "bytes are left over"
        raise CompileError(f"{path} has {size} bytes, but its header describes {at}: {why}")
    return infos


def _tensor_info(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    def wrong(what: str) -> CompileError:
        return CompileError(f"{path}: the tensor {name} has {what}")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise wrong(f"the entry {str(entry)[:80]!r}: wanted dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise wrong(f"dtype {dtype!r}: known are {', '.join(SIZES)}")
    if not isinstance(shape, list) or not all(type(dim) is int and 0 < dim <= MAX_DIM for dim in shape):
        raise wrong(f"shape {str(shape)[:80]}: wanted positive dims of at most 2^40")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(o) is int and o >= 0 for o in offsets)
    ):
        raise wrong(f"data_offsets {str(offsets)[:80]}: wanted two offsets")
    begin, end = offsets
    num_bytes = math.prod(shape) * SIZES[dtype]
    if end - begin != num_bytes:
        raise wrong(f"{end - begin} bytes of data, but {dtype}{shape} needs {num_bytes}")
    return TensorInfo(name, dtype, tuple(shape), path, data + begin, data + end)
