"""The shared object: alone in the world, the same bytes in any folder, cached whole; and what a build says
when it cannot be made."""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from kernel_harness import DESCS, Variant, compile_variant

from tscompile.errors import CompileError
from tscompile.kernels import build as kernels
from tscompile.kernels import desc as d
from tscompile.kernels.emit import emit, headers
from tscompile.kernels.host import best_target, host_targets
from tscompile.kernels.select import SCRATCH_BYTES, LinearTiling, choose
from tscompile.kernels.target import TARGETS, find_target

LINEAR = d.Linear(d.args_of("x", "weight:weight", "out!"), "T", False, 1, 64, 32, "bf16", 0, 0, "f32")
GATHER = d.GatherRows(d.args_of("x", "out!"), 48, "f32")

VISIBLE = 'extern "C" __attribute__((visibility("default"))) void'


def made(target: str, cache: Path, compiler: kernels.Compiler | None = None) -> bytes:
    chosen = TARGETS[target]
    sources = {x.symbol: emit(x, choose(x, chosen), chosen) for x in (LINEAR, GATHER)}
    compiler = compiler or kernels.find_compiler()
    return kernels.build(sources, headers(), chosen.flags, compiler=compiler, cache=cache)


@pytest.mark.parametrize("target", TARGETS)
def test_alone_in_the_world(target: str, tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    library.write_bytes(made(target, tmp_path / "cache"))

    def says(*command: str) -> list[str]:
        return subprocess.run(
            [*command, str(library)], capture_output=True, text=True, check=True
        ).stdout.splitlines()

    assert not [line for line in says("readelf", "-d") if "NEEDED" in line]
    assert not says("nm", "-D", "--undefined-only")
    exported = {line.split()[-1] for line in says("nm", "-D", "--defined-only")}
    assert exported == {LINEAR.symbol, GATHER.symbol}
    assert all(hasattr(ctypes.CDLL(str(library)), symbol) for symbol in exported)


def test_same_bytes_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("one", "another/below"):
        folder = tmp_path / name
        (folder / "temporary").mkdir(parents=True)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("TMPDIR", str(folder / "temporary"))
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.setenv("CPATH", str(folder))  # would change what is compiled
        found.append(made("cpu-avx2", folder / "cache"))
        assert not any((folder / "temporary").iterdir()), "nothing is left behind"
        assert str(tmp_path).encode() not in found[-1]
    assert found[0] == found[1]


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_a_warning(target: str) -> None:
    compile_variant(Variant(target), DESCS.values() or [LINEAR])


class Counting(kernels.Compiler):
    """A compiler that counts its calls."""

    calls = 0

    def run(self, arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
        type(self).calls += 1
        return super().run(arguments, folder)  # type: ignore[arg-type]


def test_compiled_once(tmp_path: Path) -> None:
    compiler = Counting(kernels.find_compiler().command)
    first = made("cpu-avx2", tmp_path, compiler)
    version_calls = 2
    assert Counting.calls == version_calls + 2 + 1 + 1  # two kernels, the support, the link
    assert made("cpu-avx2", tmp_path, compiler) == first
    assert Counting.calls == version_calls + 4
    objects = sorted((tmp_path / "objects").iterdir())
    assert len(objects) == 3
    objects[0].unlink()  # what is missing is made again
    for library in (tmp_path / "libraries").iterdir():
        library.unlink()
    assert made("cpu-avx2", tmp_path, compiler) == first
    assert Counting.calls == version_calls + 4 + 2


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    with pytest.raises(
        CompileError, match=r"looked for no-such-compiler. Install g\+\+ \(12 or later\), or set CXX"
    ):
        kernels.find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CompileError, match=r"looked for c\+\+ and g\+\+"):
        kernels.find_compiler()


def test_compiler_fails(tmp_path: Path) -> None:
    wrong = {"wrong": "int wrong() { return nothing; }"}
    with pytest.raises(
        CompileError, match=r"(?s)failed to compile a kernel, with status 1.*'nothing' was not declared"
    ) as caught:
        kernels.build(wrong, {}, (), compiler=kernels.find_compiler(), cache=tmp_path)
    assert kernels.find_compiler().version in str(caught.value)
    missing = {"missing": f'extern "C" void other(); {VISIBLE} missing() {{ other(); }}'}
    with pytest.raises(CompileError, match=r"(?s)failed to link a kernel.*undefined reference to `other'"):
        kernels.build(missing, {}, (), compiler=kernels.find_compiler(), cache=tmp_path)
    assert not list((tmp_path / "libraries").iterdir())


def test_cache_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CompileError, match=r"cannot write the kernel cache in .*file: Not a directory. XDG_CACHE_HOME"
    ):
        made("cpu-avx2", tmp_path / "file")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert kernels.cache_folder() == Path("/there/tscompile")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/me")
    assert kernels.cache_folder() == Path("/home/me/.cache/tscompile")


def test_a_copy_becomes_no_call_outside(tmp_path: Path) -> None:
    """A compiler may make memcpy or memset of a loop: the library brings its own."""
    large = "struct Large { char bytes[100000]; };"
    sources = {
        "copy": f"{large} {VISIBLE} copy(Large *to, const Large *from) {{ *to = *from; }}",
        "clear": f"{large} {VISIBLE} clear(Large *to) {{ *to = Large(); }}",
    }
    library = tmp_path / "kernels.so"
    library.write_bytes(kernels.build(sources, {}, (), compiler=kernels.find_compiler(), cache=tmp_path))
    loaded = ctypes.CDLL(str(library))
    there, here = ctypes.create_string_buffer(100000), ctypes.create_string_buffer(os.urandom(99999))
    loaded.copy(there, here)
    assert there.raw == here.raw
    loaded.clear(there)
    assert there.raw == bytes(100000)


def test_targets() -> None:
    amx = "avx2 fma avx512f avx512bw avx512vl avx512dq amx_tile amx_bf16"
    assert host_targets(f"processor: 0\nflags\t\t: fpu {amx}\n") == ("cpu-amx", "cpu-avx512", "cpu-avx2")
    assert host_targets("flags\t\t: fpu avx2 fma avx512f\n") == ("cpu-avx2",)
    assert host_targets("flags\t\t: sse2\n") == ()
    assert best_target() == host_targets()[0]
    with pytest.raises(
        CompileError, match="unknown target 'cpu-sse'; known are cpu-avx2, cpu-avx512, cpu-amx"
    ):
        find_target("cpu-sse")


def test_no_target_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tscompile.kernels.host.CPUINFO", tmp_path / "cpuinfo")
    with pytest.raises(CompileError, match=r"this machine runs none of .* --target"):
        best_target()


@pytest.mark.parametrize("target", TARGETS)
def test_scratch_fits_a_stack(target: str) -> None:
    chosen = TARGETS[target]
    for k in (32, 1024, 8192, 28672, 60_000, 500_000):
        tiling = choose(replace(LINEAR, k=k), chosen)
        assert isinstance(tiling, LinearTiling)
        assert 1 <= tiling.rows * k * (2 if tiling.amx else 4) <= SCRATCH_BYTES
        assert not tiling.amx or tiling.rows % 16 == 0
    with pytest.raises(CompileError, match="a linear of 1000000 elements a row: kernels take at most"):
        choose(replace(LINEAR, k=10**6), chosen)
