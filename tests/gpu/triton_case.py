"""What cases of kernels of device targets are made of (triton_arrays.py): arrays between guards, a kernel run
in Triton's interpreter or by whoever is given, outputs compared with float64, and batches over paged caches.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "kernels")]

import kernel_arrays as arrays  # noqa: E402

from tscompile.kernels.desc import KernelDesc  # noqa: E402
from tscompile.kernels.gpu.emit import emit  # noqa: E402
from tscompile.kernels.gpu.select import choose  # noqa: E402
from tscompile.kernels.gpu.spec import GpuKernel, Rows  # noqa: E402
from tscompile.kernels.gpu.target import GPU_TARGETS  # noqa: E402

TARGET = GPU_TARGETS["sm_90a"]
GUARD = 64  # elements before and behind every array
TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "i32": torch.int32}
# The interpreter truncates what it stores as bf16, to within a unit of the last place. f32 sums go in
# another order than the reference's.
TOLERANCE = {"bf16": 2.0**-7, "f32": 2e-5, "i32": 0.0}
POISON = -77  # of i32, which has no NaN

Rng = np.random.Generator
Array = np.ndarray[Any, Any]


class Guarded:
    """A tensor between two guards, poisoned unless it is given."""

    def __init__(self, dtype: str, num: int, data: Array | None = None) -> None:
        whole = torch.full((num + 2 * GUARD,), POISON, dtype=TORCH[dtype])
        if dtype != "i32":
            whole = torch.full((num + 2 * GUARD,), float("nan"), dtype=TORCH[dtype])
        self.whole, self.tensor, self.given = whole, whole[GUARD : GUARD + num], data is not None
        if data is not None:
            self.tensor.copy_(torch.from_numpy(np.ascontiguousarray(data).reshape(-1)))
        self.before = self._bytes(whole)

    @staticmethod
    def _bytes(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().view(torch.uint8).numpy().tobytes()

    def values(self) -> Array:
        found: Array = self.tensor.double().numpy()
        return found

    def check(self, name: str, written: bool) -> None:
        now = self._bytes(self.whole)
        size = GUARD * self.whole.element_size()
        inside = now[size:-size] if written else self.before[size:-size]
        assert now == self.before[:size] + inside + self.before[-size:], (
            f"{name}: written where it must not be"
        )


@dataclass
class Case:
    """args: by role; expected: role -> float64 of the elements that the kernel must give, NaN where it must
    leave the poison."""

    made: KernelDesc
    rows: Rows
    batch: Mapping[str, Array]
    args: Mapping[str, Guarded]
    expected: Mapping[str, Array]
    loose: float = 1.0  # times the tolerance

    def run(self, start: Start | None = None) -> dict[str, float]:
        """start: what runs a kernel, over arrays in the order of its parameters; None: the interpreter."""
        step = choose(self.made, TARGET, self.rows)
        work = {item.name: Guarded(item.dtype, item.num_bytes // 4) for item in step.work}
        for array in work.values():
            if array.tensor.dtype == torch.int32:
                array.tensor.zero_()  # what an earlier step may have left: a number that means something
        arrays_of = {name: Guarded("i32", data.size, data) for name, data in self.batch.items()}
        for launch in step.launches:
            kernel = launch.kernel
            sources: dict[str, Mapping[str, Guarded]] = {"arg": self.args, "batch": arrays_of, "work": work}
            (start or interpret)(kernel, launch.grid, [sources[p.kind][p.name] for p in kernel.params])
        roles = {arg.roles[0]: arg.written for arg in self.made.args}
        for name, array in [*self.args.items(), *arrays_of.items(), *work.items()]:
            array.check(name, roles.get(name, name in work))
        return {name: self.difference(name) for name in self.expected}

    def difference(self, role: str) -> float:
        """The largest, relative to the expected value or, where sums cancel, to its array's spread."""
        found, wanted = self.args[role].values(), self.expected[role].reshape(-1)
        untouched, dtype = np.isnan(wanted), {v: k for k, v in TORCH.items()}[self.args[role].tensor.dtype]
        as_before = found == POISON if dtype == "i32" else np.isnan(found)
        assert as_before[untouched].all(), f"{role}: wrote rows that the step has not"
        found, wanted = found[~untouched], wanted[~untouched]
        assert np.isfinite(found).all(), f"{role}: {np.flatnonzero(~np.isfinite(found))[:5]} not finite"
        scale = np.abs(wanted) + (np.abs(wanted).mean() if wanted.size else 0) + 1e-30
        worst = float((np.abs(found - wanted) / scale).max()) if wanted.size else 0.0
        limit = TOLERANCE[dtype] * self.loose
        assert worst <= limit, f"{role}: differs by {worst:.2e}, wanted at most {limit:.2e}"
        return worst


Start = Callable[[GpuKernel, tuple[int, int, int], list[Guarded]], None]


def interpret(kernel: GpuKernel, grid: tuple[int, int, int], arrays: list[Guarded]) -> None:
    compiled(kernel)[grid](*(array.tensor for array in arrays))


_FUNCTIONS: dict[str, Any] = {}


def compiled(kernel: GpuKernel) -> Any:
    if kernel.symbol not in _FUNCTIONS:
        folder = Path(tempfile.mkdtemp(dir=FOLDER.name))
        (folder / "kernel.py").write_text(emit(kernel, interpret=True))
        spec = importlib.util.spec_from_file_location(kernel.symbol, folder / "kernel.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _FUNCTIONS[kernel.symbol] = getattr(module, kernel.symbol)
    return _FUNCTIONS[kernel.symbol]


FOLDER = tempfile.TemporaryDirectory(prefix="tscompile-")


# ---- what cases are made of ---------------------------------------------------------------------------


def normal(rng: Rng, *shape: int, dtype: str = "f32") -> Array:
    """Values that `dtype` can hold, as f32."""
    return arrays.rounded(rng.standard_normal(shape).astype(np.float32), dtype)


def in_rows(x: Array, dtype: str) -> Array:
    """A weight in the layout rows, padded with zeros."""
    width = arrays.round_up(x.shape[-1], 32 if dtype == "bf16" else 16)
    return np.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, width - x.shape[-1])])


def poisoned(wanted: Array, num_rows: int) -> Array:
    """`wanted`, and rows behind it that the kernel must leave as they were."""
    whole = np.full((num_rows, *wanted.shape[1:]), np.nan)
    whole[: len(wanted)] = wanted
    return whole


def sizes(tokens: int = 1, seqs: int = 1, logits: int = 1, stride: int = 1) -> Array:
    return np.array([tokens, seqs, logits, stride], np.int32)


def bucket(rng: Rng) -> tuple[Rows, int]:
    """A bucket, and the tokens of a step in it."""
    most = int(rng.choice([1, 2, 8, 32, 256]))
    return Rows(most, min(most, 64)), int(rng.integers(1, min(most, 90) + 1))


@dataclass
class Cache:
    """One layer's cache, [num_pages][kv_heads][K | V][page_size][padded], all NaN but what is written."""

    kv_heads: int
    head_dim: int
    page_size: int
    num_pages: int

    def __post_init__(self) -> None:
        self.padded = arrays.round_up(self.head_dim, 32)
        shape = (self.num_pages, self.kv_heads, 2, self.page_size, self.padded)
        self.array = np.full(shape, np.nan, np.float32)

    def write(self, slot: int, k: Array, v: Array) -> None:
        """k, v: [kv_heads, head_dim]."""
        row = self.array[slot // self.page_size, :, :, slot % self.page_size]
        row[...] = 0
        row[:, 0, : self.head_dim], row[:, 1, : self.head_dim] = k, v


def requests(rng: Rng, rows: Rows, num: int) -> list[arrays.Request]:
    """Sequences that share `num` tokens out, each with some context before."""
    count = int(rng.integers(1, min(num, rows.seqs, 6) + 1))
    cuts = (
        np.sort(rng.choice(np.arange(1, num), count - 1, replace=False)) if count > 1 else np.array([], int)
    )
    new = np.diff([0, *cuts, num])
    return [arrays.Request(int(n + rng.choice([0, 1, 33, 150])), int(n)) for n in new]


def paged(
    rng: Rng, rows: Rows, num: int, page_size: int
) -> tuple[list[arrays.Request], dict[str, Array], int]:
    """Sequences, their batch arrays, and how many pages there are."""
    found = requests(rng, rows, num)
    counts = [-(-s.length // page_size) for s in found]
    order = rng.permutation(sum(counts) + 2)
    ends = np.cumsum([0, *counts])
    pages = [order[a:b].tolist() for a, b in itertools.pairwise(ends)]
    batch = dict(arrays.batch_of(found, page_size, pages))
    table = np.pad(batch["page_table"], [(0, 0), (0, int(rng.integers(3)))], constant_values=2**30)
    batch |= {"page_table": table, "sizes": sizes(num, len(found), stride=table.shape[1])}
    return found, batch, len(order)
