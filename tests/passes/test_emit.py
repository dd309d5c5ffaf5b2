"""emit: one shared object a target, with every kernel of the program. Its arithmetic: tests/kernels."""

from __future__ import annotations

import ctypes
from pathlib import Path

import golden
import pytest

from tscompile.build import TargetBuild
from tscompile.kernels.build import find_compiler
from tscompile.passes import emit, select


def symbols_of(made: TargetBuild) -> set[str]:
    return {symbol for bucket in made.buckets.values() for symbol in bucket.symbols.values()}


def test_every_kernel_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build = golden.build_of(golden.read("fuse-one-rank"), targets=("cpu-avx2", "cpu-amx"))
    select.run(build)
    emit.run(build)
    for made in build.targets.values():
        assert made.compiler == find_compiler().version
        (tmp_path / made.target).write_bytes(made.library)
        library = ctypes.CDLL(str(tmp_path / made.target))
        assert all(hasattr(library, symbol) for symbol in symbols_of(made))
    assert build.targets["cpu-avx2"].library != build.targets["cpu-amx"].library
