"""Checkpoints, good and bad: every way in which a folder can lie is one clear CompileError, before any tensor
is read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tscompile.checkpoint import INDEX, Checkpoint
from tscompile.errors import CompileError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def folder_of(folder: Path, **files: Any) -> Path:
    """config.json and one shard, then `files` over them: bytes, or JSON; None removes."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(TENSORS, folder / "model.safetensors")
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: Any) -> bytes:
    return safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}, bytes(8))


def test_reads_lazily_what_was_saved(tmp_path: Path) -> None:
    checkpoint = Checkpoint(folder_of(tmp_path))
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {"a": (2, 3), "b": (4,)}
    assert str(checkpoint.tensors["b"]) == "b BF16[4]"
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert (
        checkpoint.read("a").untyped_storage().data_ptr() == checkpoint.read("a").untyped_storage().data_ptr()
    )


def test_shards_by_index(tmp_path: Path) -> None:
    folder_of(tmp_path, model__safetensors=None)
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / f"part-{name}.safetensors")
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"a": "part-a.safetensors", "b": "part-b.safetensors"}})
    )
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("b"), TENSORS["b"])


FILE = "model.safetensors"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no config": ({"config__json": None}, "{f} has no config.json"),
    "config is a list": ({"config__json": []}, "{f}/config.json holds a JSON list, wanted an object"),
    "config is cut": ({"config__json": b"{"}, "{f}/config.json is not valid JSON: Expecting property name"),
    "config is binary": ({"config__json": b"\xff\xfe\x00"}, "{f}/config.json is not valid JSON: "),
    "config is deep": ({"config__json": b"[" * 200_000}, "{f}/config.json is not valid JSON: "),
    "config says it twice": (
        {"config__json": b'{"a": 1, "a": 2}'},
        "{f}/config.json is not valid JSON: the key 'a' is there twice",
    ),
    "config has NaN": (
        {"config__json": b'{"a": NaN}'},
        "{f}/config.json is not valid JSON: NaN is not a JSON number",
    ),
    "no tensors": ({"model__safetensors": None}, "{f} has no safetensors file"),
    "a pickle": (
        {"model__safetensors": None, "pytorch_model__bin": b""},
        "{f} has no safetensors file (pytorch_model.bin is a pickle, which is never loaded: convert it",
    ),
    "two files, no index": (
        {"model__safetensors": None, "x__safetensors": b"", "y__safetensors": b""},
        "{f} has 2 safetensors files but no model.safetensors.index.json that lists them",
    ),
    "empty": ({"model__safetensors": b""}, "{f}/" + FILE + " has 0 bytes: cut short, or no safetensors file"),
    "header too long": (
        {"model__safetensors": safetensors({}, length=2**40)},
        "{f}/" + FILE + " says its header has 1099511627776 bytes, but 2 follow: cut short or garbage",
    ),
    "header garbage": (
        {"model__safetensors": safetensors(b"\x00\x01\x02")},
        "{f}/" + FILE + ": the header is not valid JSON: ",
    ),
    "header a list": (
        {"model__safetensors": safetensors([])},
        "{f}/" + FILE + ": the header is a JSON list, wanted an object",
    ),
    "header deep": (
        {"model__safetensors": safetensors(b"[" * 200_000)},
        "{f}/" + FILE + ": the header is not valid JSON: ",
    ),
    "data cut": (
        {"model__safetensors": entry()[:-1]},
        "{f}/" + FILE + " has 76 bytes, but its header describes 77: it is cut short",
    ),
    "data left over": (
        {"model__safetensors": entry() + b"x"},
        "{f}/" + FILE + " has 78 bytes, but its header describes 77: bytes are left over",
    ),
    "a gap": (
        {"model__safetensors": entry(data_offsets=[4, 12])},
        "{f}/" + FILE + ": a begins at byte 74, wanted 70: a gap or an overlap",
    ),
    "dim 0": (
        {"model__safetensors": entry(shape=[0])},
        "{f}/" + FILE + ": the tensor a has shape [0]: wanted positive dims",
    ),
    "dim -2": (
        {"model__safetensors": entry(shape=[-2])},
        "{f}/" + FILE + ": the tensor a has shape [-2]: wanted positive dims",
    ),
    "dim true": (
        {"model__safetensors": entry(shape=[True])},
        "{f}/" + FILE + ": the tensor a has shape [True]: wanted positive dims",
    ),
    "dim 2^50": (
        {"model__safetensors": entry(shape=[2**50])},
        "{f}/" + FILE + ": the tensor a has shape [1125899906842624]: wanted",
    ),
    "dims that overflow": (
        {"model__safetensors": entry(shape=[2**32, 2**32])},
        "{f}/"
        + FILE
        + ": the tensor a has 8 bytes of data, but F32[4294967296, 4294967296] needs 73786976294838206464",
    ),
    "bytes": (
        {"model__safetensors": entry(shape=[3])},
        "{f}/" + FILE + ": the tensor a has 8 bytes of data, but F32[3] needs 12",
    ),
    "offsets": (
        {"model__safetensors": entry(data_offsets=[8, 0])},
        "{f}/" + FILE + ": the tensor a has -8 bytes of data, but F32[2] needs 8",
    ),
    "negative offset": (
        {"model__safetensors": entry(data_offsets=[-8, 0])},
        "{f}/" + FILE + ": the tensor a has data_offsets [-8, 0]",
    ),
    "three offsets": (
        {"model__safetensors": entry(data_offsets=[0, 4, 8])},
        "{f}/" + FILE + ": the tensor a has data_offsets [0, 4, 8]",
    ),
    "dtype": (
        {"model__safetensors": entry(dtype="F12")},
        "{f}/" + FILE + ": the tensor a has dtype 'F12': known are F64, ",
    ),
    "entry": (
        {"model__safetensors": safetensors({"a": 5})},
        "{f}/" + FILE + ": the tensor a has the entry '5': wanted dtype, shape",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name: str, tmp_path: Path) -> None:
    files, message = BAD[name]
    with pytest.raises(CompileError) as error:
        Checkpoint(folder_of(tmp_path, **files))
    assert str(error.value).startswith(message.replace("{f}", str(tmp_path)))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(
        CompileError, match=r"is not a folder: give the checkpoint's folder, with config.json in it"
    ):
        Checkpoint(tmp_path / "nothing")


def index(**weight_map: Any) -> dict[str, Any]:
    return {"weight_map": weight_map}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, f'{INDEX}: "weight_map" must map tensors to file names'),
        (index(a=5), f'{INDEX}: "weight_map" must map tensors to file names'),
        (
            index(a="../model.safetensors"),
            f"{INDEX} puts a in '../model.safetensors': wanted the plain name of a .safetensors file",
        ),
        (
            index(a="/etc/passwd"),
            f"{INDEX} puts a in '/etc/passwd': wanted the plain name of a .safetensors file",
        ),
        (index(a="c:\\x.safetensors"), f"{INDEX} puts a in 'c:\\\\x.safetensors': wanted the plain name"),
        (
            index(a="config.json"),
            f"{INDEX} puts a in 'config.json': wanted the plain name of a .safetensors file",
        ),
        (index(a="lost.safetensors"), "has no lost.safetensors"),
        (index(a=FILE, b=FILE, c=FILE), f"{INDEX} puts c in {FILE}, but no shard has it"),
        (index(a="two.safetensors", b=FILE), "the tensor a is in both model.safetensors and two.safetensors"),
    ],
)
def test_bad_index(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder_of(tmp_path)
    save_file({"a": TENSORS["a"]}, tmp_path / "two.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(CompileError) as error:
        Checkpoint(tmp_path)
    assert message in str(error.value)


def hugging_face_cache(folder: Path) -> Path:
    """models--x/snapshots/REVISION, whose files are links to models--x/blobs/HASH."""
    snapshot = folder / "models--x" / "snapshots" / "abc"
    blobs = folder / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in ("config.json", FILE):
        os.rename(folder / "plain" / file, blobs / file)
        (snapshot / file).symlink_to(Path("../../blobs") / file)
    return snapshot


def link_inside(folder: Path) -> Path:
    (folder / "plain" / FILE).rename(folder / "plain" / "real")
    (folder / "plain" / FILE).symlink_to("real")
    return folder / "plain"


@pytest.mark.parametrize("arrange", [hugging_face_cache, link_inside])
def test_links_that_are_fine(arrange: Callable[[Path], Path], tmp_path: Path) -> None:
    folder_of(tmp_path / "plain")
    assert set(Checkpoint(arrange(tmp_path)).tensors) == {"a", "b"}


def test_a_link_that_leaves(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "plain")
    (folder / FILE).rename(tmp_path / "elsewhere")
    (folder / FILE).symlink_to("../elsewhere")
    with pytest.raises(
        CompileError, match=r"is a link that leaves the checkpoint's folder, to .*elsewhere: copy the file"
    ):
        Checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dtypes_that_no_weight_has(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    save_file({"a": torch.zeros(2).to(dtype)}, folder / FILE)
    with pytest.raises(
        CompileError, match=r"a .*\[2\] in model.safetensors: weights of F32, F16, BF16, F64 can be read"
    ):
        Checkpoint(folder).read("a")
