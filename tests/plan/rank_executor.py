"""Runs a plan's own kernels on all of its ranks in one process, with the collectives of ARCHITECTURE.md in
numpy: what the engine's processes must give, without the engine."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from tscompile.interpret import Batch
from tscompile.mesh import Mesh
from tscompile.reader import Plan

ARRAYS = ("token_ids", "positions", "slots", "query_start", "context_len", "page_table", "logit_rows")


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("num_tokens", "num_seqs", "num_logits", "page_table_stride")),
        *((name, ctypes.c_void_p) for name in ARRAYS),
    ]


class _Args(ctypes.Structure):
    _fields_ = [("batch", ctypes.POINTER(_Batch)), ("ptr", ctypes.POINTER(ctypes.c_void_p))]


def aligned(num_bytes: int) -> np.ndarray:
    """Bytes at a multiple of 64, none of them zero: nobody may count on zeros."""
    raw = np.full(num_bytes + 64, 0xFF, np.uint8)
    return raw[-raw.ctypes.data % 64 :][:num_bytes]


class RankExecutor:
    def __init__(self, path: Path, target: str, num_pages: int = 16) -> None:
        self.plan = Plan(path)
        self.program: dict[str, Any] = self.plan.json(f"tsp/program/{target}")
        axes = [(name, size) for name, size in self.plan.manifest["mesh"]]
        self.mesh = Mesh(tuple(axes))
        library = path.with_suffix(f".{target}.so")
        library.write_bytes(self.plan.bytes(f"tsp/kernels/{target}"))
        self.library = ctypes.CDLL(str(library))
        kv = self.program["kv"]
        ranks = range(self.mesh.num_ranks)
        self.arenas = [aligned(self.program["arena_bytes"]) for _ in ranks]
        self.caches = [
            [aligned(num_pages * kv["page_bytes"]) for _ in range(kv["num_layers"])] for _ in ranks
        ]

    def run(self, batch: Batch) -> list[np.ndarray]:
        """One step; each rank's logits [L, vocab_size]."""
        arrays = {name: np.ascontiguousarray(getattr(batch, name).numpy()) for name in ARRAYS}
        rows = {"T": len(arrays["token_ids"]), "L": len(arrays["logit_rows"]), "1": 1}
        c_batch = _Batch(rows["T"], len(arrays["context_len"]), rows["L"], arrays["page_table"].shape[1])
        for name, array in arrays.items():
            setattr(c_batch, name, array.ctypes.data)
        for launch in self.program["launches"]:
            if "collective" in launch:
                self.collective(launch, rows[launch["rows"]] * launch["times"])
            else:
                for rank in range(self.mesh.num_ranks):
                    self.kernel(launch, c_batch, rank)
        logits, limits = self.program["logits"], self.program["limits"]
        shape = (rows["L"], logits["stride"])
        return [
            self.values(rank, logits["buffer"], "f32", shape)[:, : limits["vocab_size"]].copy()
            for rank in range(self.mesh.num_ranks)
        ]

    def kernel(self, launch: dict[str, Any], batch: _Batch, rank: int) -> None:
        addresses = [self.address(argument, rank) for argument in launch["args"]]
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        args, kernel = _Args(ctypes.pointer(batch), pointers), getattr(self.library, launch["kernel"])
        for thread in range(2):
            kernel(ctypes.byref(args), thread, 2)

    def address(self, argument: dict[str, Any], rank: int) -> int:
        if "buffer" in argument:
            return int(self.arenas[rank].ctypes.data) + int(
                self.program["buffers"][argument["buffer"]]["offset"]
            )
        if "kv" in argument:
            return int(self.caches[rank][argument["kv"]].ctypes.data)
        coords = self.mesh.coords(rank)
        at = ",".join(f"{axis}={coords[axis]}" for axis in argument.get("axes", ()))
        data = self.plan.bytes(argument["weight"] + (f"@{at}" if at else ""))
        assert len(data) == argument["bytes"]
        return int(np.frombuffer(data, np.uint8).ctypes.data)

    def values(self, rank: int, buffer: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """A view of a buffer, of f32 or the bits of bf16."""
        stored = np.dtype(np.float32 if dtype == "f32" else np.uint16)
        where = self.program["buffers"][buffer]
        num_bytes = int(np.prod(shape)) * stored.itemsize
        assert num_bytes <= where["bytes"], (where["name"], shape)
        return self.arenas[rank][where["offset"] :][:num_bytes].view(stored).reshape(shape)

    def collective(self, launch: dict[str, Any], outer: int) -> None:
        kind, run = launch["collective"], launch["run"]
        given, taken = (argument["buffer"] for argument in launch["args"])
        for first in range(self.mesh.num_ranks):
            group = self.mesh.group(first, launch["axis"])
            if group[0] != first:
                continue
            n = len(group)
            whole_in = kind in ("reduce_scatter", "slice")
            shape = (outer, n, run) if whole_in else (outer, run)
            inputs = [self.values(rank, given, launch["dtype"], shape).copy() for rank in group]
            if kind in ("all_reduce", "reduce_scatter"):
                total = inputs[0]
                for term in inputs[1:]:
                    total = total + term if launch["reduce"] == "sum" else np.maximum(total, term)
                inputs = [total] * n
            for at, rank in enumerate(group):
                out = inputs[at][:, at] if whole_in else inputs[at]
                if kind == "all_gather":
                    out = np.stack(inputs, axis=1)
                self.values(rank, taken, launch["dtype"], out.shape)[...] = out
