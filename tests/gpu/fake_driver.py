"""The fake NVIDIA driver of tests/fake_cuda, as Python tests see it."""

from __future__ import annotations

import ctypes as c
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine as api

Runner = Callable[[str, tuple[int, int, int], list[int]], None]  # symbol, grid, addresses
_RUNNER = c.CFUNCTYPE(None, c.c_char_p, c.POINTER(c.c_uint32), c.POINTER(c.c_void_p), c.c_size_t)


def library_path() -> Path:
    return api.library_path().parent / "tests" / "libts_fake_cuda.so"


class FakeDriver:
    """In this process, where the engine finds it under library_path(). settings: as fake_cuda.h has them."""

    def __init__(self, settings: str = "", runner: Runner | None = None) -> None:
        self.library = c.CDLL(str(library_path()))
        self.library.fake_cuda_log.restype = c.c_char_p
        self.library.fake_cuda_num_violations.restype = c.c_int64
        self.library.fake_cuda_reset(settings.encode())
        self.errors: list[BaseException] = []
        self._kept = None
        if runner is not None:
            self._kept = _RUNNER(self._guarded(runner))
            self.library.fake_cuda_set_runner(self._kept)

    def _guarded(self, runner: Runner) -> Callable[..., None]:
        def call(symbol: bytes, grid: Any, params: Any, count: int) -> None:
            try:
                runner(symbol.decode(), (grid[0], grid[1], grid[2]), [params[i] or 0 for i in range(count)])
            except BaseException as error:  # nothing may leave a callback
                self.errors.append(error)

        return call

    def calls(self, name: str = "") -> list[dict[str, Any]]:
        """Those of a name, in order; or all."""
        found = [json.loads(line) for line in self.library.fake_cuda_log().decode().splitlines()]
        return [call for call in found if name in ("", call["call"])]

    def check(self) -> None:
        """Nothing was violated, and every kernel ran."""
        if self.errors:
            raise self.errors[0]
        assert self.library.fake_cuda_num_violations() == 0, self.calls("violation")
