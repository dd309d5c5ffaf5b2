"""The compiler's reader and the engine's loader refuse the same plans: wrong ones whose seal is right, so
that every check behind it is reached."""

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine import EngineError
from engine import Plan as EnginePlan

from tscompile import canonical, plan
from tscompile.errors import CompileError
from tscompile.mesh import Mesh
from tscompile.plan import Entry, blob
from tscompile.reader import Plan

MODEL = {"name": "tiny", "architecture": "none", "vocab_size": 7, "max_context": 64}
MODEL |= {"eos_token_ids": [1], "bos_token_id": None, "dtype": "f32"}
PRODUCER = {"tscompile": "0.1.0"}
Tables = dict[str, Any]  # "header" and "manifest"


def write(path: Path) -> Path:
    entries = [Entry(name, "F32", (16,), lambda: (bytes(64),)) for name in ("a", "b")]
    entries += [blob("tsp/program/cpu-avx2", b"{}"), blob("tsp/kernels/cpu-avx2", b"\x7fELF")]
    entries += [blob("tsp/text/tokenizer", b"tok"), blob("tsp/graph", b"graph")]
    plan.write(path, entries, model=MODEL, mesh=Mesh(), targets=["cpu-avx2"], producer=PRODUCER)
    return path


def changed(path: Path, change: Callable[[Tables], object]) -> bytes:
    """The plan with its tables changed, offsets kept as they are unless the manifest's length changed, and
    sealed anew."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    begin, end = header["tsp/manifest"]["data_offsets"]
    tables = {"header": header, "manifest": json.loads(data[start + begin : start + end])}
    change(tables)
    manifest = canonical.dumps(tables["manifest"])
    if header.get("tsp/manifest", {}).get("data_offsets") == [begin, end]:
        end = begin + len(manifest)
        header["tsp/manifest"] |= {"shape": [len(manifest)], "data_offsets": [begin, end]}
        if "tsp/seal" in header:
            header["tsp/seal"]["data_offsets"] = [end, end + 32]
    text = canonical.dumps(header)
    head = text + b" " * (-(8 + len(text)) % 64)
    head = len(head).to_bytes(8, "little") + head
    body = data[start : start + begin] + manifest
    return head + body + hashlib.sha256(head + manifest).digest()


def accepts(open_it: Callable[[Path], object], path: Path) -> bool:
    try:
        open_it(path)
    except (CompileError, EngineError):
        return False
    return True


def engine_opens(path: Path) -> None:
    with EnginePlan(path):
        pass


def edit(*path: str, to: Any = None, remove: bool = False) -> Callable[[Tables], object]:
    """Sets, or removes, tables[path...]."""

    def change(tables: Tables) -> None:
        at = tables
        for key in path[:-1]:
            at = at[key]
        if remove:
            del at[path[-1]]
        else:
            at[path[-1]] = copy.deepcopy(to)

    return change


def swap_data(tables: Tables) -> None:
    header = tables["header"]
    header["a"]["data_offsets"], header["tsp/graph"]["data_offsets"] = [5, 69], [0, 5]


LISTED = {"dtype": "F32", "shape": [16], "bytes": 64, "kind": "weight", "sha256": "0" * 64}
WRONG = {
    "schema of the header": edit("header", "__metadata__", "tsp_schema", to="4"),
    "schema of the manifest": edit("manifest", "schema", to=4),
    "no mesh": edit("manifest", "mesh", remove=True),
    "a mesh without axes": edit("manifest", "mesh", to=[]),
    "an axis of no ranks": edit("manifest", "mesh", to=[["tp", 0]]),
    "an axis twice": edit("manifest", "mesh", to=[["tp", 2], ["tp", 2]]),
    "an axis without a size": edit("manifest", "mesh", to=[["tp"]]),
    "an axis with a strange name": edit("manifest", "mesh", to=[["t=p", 2]]),
    "more ranks than there can be": edit("manifest", "mesh", to=[["ep", 2**16], ["tp", 2**16]]),
    "format": edit("header", "__metadata__", "format", to="pt"),
    "more metadata": edit("header", "__metadata__", "x", to="y"),
    "no metadata": edit("header", "__metadata__", remove=True),
    "metadata of another kind": edit("header", "__metadata__", to=[1]),
    "no seal": edit("header", "tsp/seal", remove=True),
    "no manifest": edit("header", "tsp/manifest", remove=True),
    "dtype that nobody knows": edit("header", "a", "dtype", to="F33"),
    "dtype of another size": edit("header", "a", "dtype", to="BF16"),
    "dtype unlike the manifest": edit("manifest", "entries", "a", "dtype", to="BF16"),
    "shape unlike the manifest": edit("header", "a", "shape", to=[4, 4]),
    "shape of another size": edit("header", "a", "shape", to=[17]),
    "negative dim": edit("header", "a", "shape", to=[-16]),
    "dim that is no integer": edit("header", "a", "shape", to=[16.5]),
    "shape that is no list": edit("header", "a", "shape", to=16),
    "product beyond 64 bits": edit("header", "a", "shape", to=[2**32, 2**32, 16]),
    "offsets backwards": edit("header", "a", "data_offsets", to=[64, 0]),
    "offsets of a true": edit("header", "a", "data_offsets", to=[False, 64]),
    "a hole": edit("header", "b", "data_offsets", to=[65, 129]),
    "an overlap": edit("header", "b", "data_offsets", to=[0, 64]),
    "a third offset": edit("header", "b", "data_offsets", to=[64, 128, 128]),
    "more in an entry": edit("header", "a", "more", to=1),
    "an entry that is no object": edit("header", "a", to=7),
    "a reserved entry of floats": edit("header", "tsp/text/tokenizer", "dtype", to="BF16"),
    "a reserved entry of two dims": edit("header", "tsp/graph", "shape", to=[5, 1]),
    "a weight among the reserved": swap_data,
    "an entry that the manifest lacks": edit("manifest", "entries", "b", remove=True),
    "an entry that the header lacks": edit("manifest", "entries", "c", to=LISTED),
    "a manifest that lists itself": edit(
        "manifest", "entries", "tsp/manifest", to={**LISTED, "kind": "report"}
    ),
    "bytes unlike the header": edit("manifest", "entries", "a", "bytes", to=128),
    "kind that the name belies": edit("manifest", "entries", "a", "kind", to="report"),
    "hash of a report": edit("manifest", "entries", "tsp/graph", "sha256", to="0" * 64),
    "hash that is none": edit("manifest", "entries", "a", "sha256", to="xyz"),
    "hash in capitals": edit("manifest", "entries", "a", "sha256", to="A" * 64),
    "no hash": edit("manifest", "entries", "a", "sha256", remove=True),
    "more in the manifest": edit("manifest", "more", to=1),
    "less in the manifest": edit("manifest", "producer", remove=True),
    "a manifest that is a list": edit("manifest", to=[]),
    "no targets": edit("manifest", "targets", to=[]),
    "a target that is not there": edit("manifest", "targets", to=["cpu-avx2", "cpu-amx"]),
    "a target twice": edit("manifest", "targets", to=["cpu-avx2", "cpu-avx2"]),
    "a target with a path": edit("manifest", "targets", to=["../cpu-avx2"]),
    "a target that is not listed": edit("manifest", "targets", to=["cpu-amx"]),
    "no vocabulary": edit("manifest", "model", "vocab_size", to=0),
    "an end token beyond the vocabulary": edit("manifest", "model", "eos_token_ids", to=[7]),
    "an end token that is no integer": edit("manifest", "model", "eos_token_ids", to=["1"]),
    "no context": edit("manifest", "model", "max_context", to=0),
    "no model": edit("manifest", "model", to={}),
}


def test_both_take_a_whole_plan(tmp_path: Path) -> None:
    path = write(tmp_path / "plan.tsp")
    path.write_bytes(changed(path, lambda tables: None))
    assert accepts(Plan, path)
    assert accepts(engine_opens, path)


@pytest.mark.parametrize("what", WRONG)
def test_both_refuse(tmp_path: Path, what: str) -> None:
    path = write(tmp_path / "plan.tsp")
    path.write_bytes(changed(path, WRONG[what]))
    assert (accepts(Plan, path), accepts(engine_opens, path)) == (False, False)
