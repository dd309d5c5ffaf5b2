"""plan.tsp: the writer, the reader, what is refused, and that a failure leaves nothing."""

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tscompile import canonical, plan
from tscompile.errors import CompileError, InternalError
from tscompile.mesh import Mesh
from tscompile.plan import Entry, blob
from tscompile.reader import Plan

MODEL = {"name": "tiny", "architecture": "none", "vocab_size": 7, "max_context": 64}
MODEL |= {"eos_token_ids": [1], "bos_token_id": None, "dtype": "f32"}
WEIGHTS = {"a": torch.arange(32, dtype=torch.float32), "b.c": torch.arange(64).reshape(2, 32).bfloat16()}


def weight(name: str, tensor: torch.Tensor) -> Entry:
    dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
    data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    return Entry(name, dtype, tuple(tensor.shape), lambda: (data[:64], data[64:]))


def entries() -> list[Entry]:
    reserved = [blob("tsp/program/cpu-avx2", b'{"abi":1}'), blob("tsp/kernels/cpu-avx2", b"\x7fELF...")]
    reserved += [blob("tsp/text/tokenizer", b"tok"), blob("tsp/graph", b"graph tiny {}\n")]
    return reserved + [weight(name, tensor) for name, tensor in WEIGHTS.items()]


def write(path: Path, given: list[Entry] | None = None) -> Path:
    producer = {"tscompile": "0.1.0", "compiler": "none"}
    plan.write(
        path,
        entries() if given is None else given,
        model=MODEL,
        mesh=Mesh(),
        targets=["cpu-avx2"],
        producer=producer,
    )
    return path


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write(tmp_path / "plan.tsp")


SHARDS = ("w@ep=0,tp=0", "w@ep=0,tp=1", "w@ep=1,tp=0", "w@ep=1,tp=1")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (SHARDS, ""),
        (("w@tp=0", "w@tp=1"), ""),
        (SHARDS[1:], "of the shards of 'w', .* differ: w@ep=0,tp=0"),
        ((*SHARDS, "w@ep=2,tp=0"), "differ: w@ep=2,tp=0"),
        (("w@tp=0,ep=0", *SHARDS[1:]), "differ: w@ep=0,tp=0, w@tp=0,ep=0"),
        (("w@dp=0",), "differ: w@dp=0"),
        (("w@",), "differ"),
    ],
)
def test_every_rank_has_its_shard(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    path, mesh = tmp_path / "plan.tsp", Mesh((("ep", 2), ("tp", 2)))
    given = [Entry(name, "F32", (16,), lambda: (bytes(64),)) for name in names]
    kinds = [blob(f"tsp/{kind}/cpu-avx2", b"{}") for kind in ("program", "kernels")]
    plan.write(path, [*given, *kinds], model=MODEL, mesh=mesh, targets=["cpu-avx2"], producer={})
    if not message:
        assert list(Plan(path).entries)[: len(names)] == list(names)
        return
    with pytest.raises(CompileError, match=message):
        Plan(path)


def test_safetensors_opens_it(written: Path) -> None:
    with safe_open(written, "pt") as file:
        assert file.metadata() == {"format": "tsp", "tsp_schema": "3"}
        for name, tensor in WEIGHTS.items():
            assert torch.equal(file.get_tensor(name), tensor)
        manifest = json.loads(bytes(file.get_tensor("tsp/manifest").tolist()))
        assert bytes(file.get_tensor("tsp/text/tokenizer").tolist()) == b"tok"
        assert set(file.keys()) == {*manifest["entries"], "tsp/manifest", "tsp/seal"}


def test_the_reader_gives_back_what_was_written(written: Path) -> None:
    read = Plan(written)
    read.verify_weights()
    assert {name: torch.equal(read.tensor(name), tensor) for name, tensor in WEIGHTS.items()} == {
        "a": True,
        "b.c": True,
    }
    assert read.manifest["model"] == MODEL
    assert read.json("tsp/program/cpu-avx2") == {"abi": 1}
    assert list(read.entries)[:2] == ["a", "b.c"]
    assert list(read.entries)[-2:] == ["tsp/manifest", "tsp/seal"]
    assert all(entry.begin % 64 == 0 for entry in list(read.entries.values())[:2])
    with pytest.raises(CompileError, match="no entry 'z'"):
        read.bytes("z")


def test_two_folders_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    assert write(tmp_path / "x" / "one.tsp").read_bytes() == write(tmp_path / "y" / "two.tsp").read_bytes()


def test_every_cut_is_refused(written: Path) -> None:
    with written.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CompileError, match="data ends at byte"):
        Plan(written)
    for size in reversed(range(written.stat().st_size - 1)):
        os.truncate(written, size)
        with pytest.raises(CompileError):
            Plan(written)


def test_every_flip_is_refused(written: Path) -> None:
    with written.open("r+b") as file:
        for position, byte in enumerate(written.read_bytes()):
            for value in (byte ^ 1 << position % 8, byte):
                os.pwrite(file.fileno(), bytes([value]), position)
                if value != byte:
                    with pytest.raises(CompileError):
                        Plan(written).verify_weights()
    Plan(written).verify_weights()


def reheaded(whole: bytes, old: bytes, new: bytes) -> bytes:
    """`whole` with `old` replaced in its header, padded anew."""
    length = int.from_bytes(whole[:8], "little")
    text = whole[8 : 8 + length].rstrip(b" ")
    assert old in text
    text = text.replace(old, new, 1)
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"tsp_schema":"3"', b'"tsp_schema":"4"', "update tscompile"),
        (b'"tsp_schema":"3"', b'"tsp_schema":"0"', "rebuild the plan"),
        (b'"format":"tsp"', b'"format":"pt"', "wanted {'format': 'tsp'"),
        (b'"a":', b'"a":1,"a":', "canonical"),
        (b'"a":', b'"\\u0061":', "canonical"),
        (b'"a":', b' "a":', "canonical"),
        (b'"shape":[32]', b'"shape":[33]', "takes 132 bytes, its offsets 128"),
        (b'"shape":[32]', b'"shape":[4294967296,4294967296,32]', "its offsets 128"),
        (b'"shape":[32]', b'"shape":[-32]', "has shape"),
        (b'"dtype":"F32"', b'"dtype":"F99"', "has dtype 'F99'"),
        (b'"data_offsets":[0,128]', b'"data_offsets":[4,132]', "a hole or an overlap"),
        (b'"data_offsets":[0,128]', b'"data_offsets":[0]', "has shape"),
        (b'"tsp/seal"', b'"tsp/seam"', "'tsp/seal' last"),
        (b'"b.c"', b'"b.d"', "damaged"),
    ],
)
def test_a_wrong_header_is_refused(written: Path, old: bytes, new: bytes, message: str) -> None:
    written.write_bytes(reheaded(written.read_bytes(), old, new))
    with pytest.raises(CompileError, match=message):
        Plan(written)


def test_a_header_nested_deep_is_refused(tmp_path: Path) -> None:
    text = b"[" * 100_000
    (tmp_path / "deep.tsp").write_bytes((len(text) + 56).to_bytes(8, "little") + text + b" " * 56)
    with pytest.raises(CompileError):
        Plan(tmp_path / "deep.tsp")


def test_what_a_writer_must_not_do(tmp_path: Path) -> None:
    path = tmp_path / "plan.tsp"
    with pytest.raises(InternalError, match="gave 3 bytes, its shape says 64"):
        write(path, [Entry("w", "F32", (16,), lambda: (b"abc",))])
    with pytest.raises(InternalError, match="wanted a multiple of 64"):
        write(path, [weight("w", torch.zeros(3))])
    with pytest.raises(InternalError, match="one name"):
        write(path, [blob("tsp/graph", b""), blob("tsp/graph", b"")])
    assert list(tmp_path.iterdir()) == []


def failing() -> Iterator[bytes]:
    yield b"x" * 32
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failure_halfway_leaves_what_was_there(written: Path) -> None:
    before = written.read_bytes()
    with pytest.raises(
        CompileError, match=r"No space left on device. The plan takes [\d,]+ bytes, [\d,]+ are free"
    ):
        write(written, [Entry("w", "F32", (16,), failing)])
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


FULL = """
import resource
from pathlib import Path
from tscompile import plan
from tscompile.mesh import Mesh
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
w = plan.Entry("w", "F32", (1_000_000,), lambda: (bytes(4_000_000),))
plan.write(Path({path!r}), [w], model={{}}, mesh=Mesh(), targets=[], producer={{}})
"""


def test_a_file_system_that_refuses_so_many_bytes(tmp_path: Path) -> None:
    code = FULL.format(path=str(tmp_path / "plan.tsp"))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "CompileError" in ended.stderr
    assert "could not be written: File too large. The plan takes 4,00" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="cannot be written: Is a directory"):
        write(tmp_path)
    with pytest.raises(CompileError, match="cannot be written: No such file or directory"):
        write(tmp_path / "missing" / "plan.tsp")


def test_the_model_is_never_whole_in_memory(tmp_path: Path) -> None:
    """512 MiB of weights go through less than 100 MiB of memory."""
    piece = bytes(1 << 24)
    large = [Entry(f"w{i}", "BF16", (8, 1 << 22), lambda: (piece for _ in range(4))) for i in range(8)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write(tmp_path / "plan.tsp", large)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert (tmp_path / "plan.tsp").stat().st_size > 1 << 29


def test_canonical_json() -> None:
    value = {"b": 1.0, "a": [True, None, 0.5, "é\n\u2028\x7f"], "\ue000": 1, "\U00010000": 2}
    spelled = canonical.dumps(value)
    assert spelled.decode() == '{"a":[true,null,0.5,"é\\n\u2028\x7f"],"b":1,"\ue000":1,"\U00010000":2}'
    assert canonical.loads(spelled, "it") == value
    for bad in (float("nan"), "\ud800", {1: 2}, object()):
        with pytest.raises(InternalError, match="canonical JSON"):
            canonical.dumps(bad)
    for text in (b'{"a": 1}', b'{"a":1,"a":1}', b"1.0", b"NaN", b'"\\u0061"', b"[1]\n", b"\xff", b""):
        with pytest.raises(CompileError, match="it is not"):
            canonical.loads(text, "it")
