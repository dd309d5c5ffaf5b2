"""Runs a plan's own kernels on all of its ranks in one process, with the collectives of ARCHITECTURE.md in
numpy: what the engine's processes must give, without the engine."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np

from tscompile.interpret import Batch
from tscompile.mesh import Mesh, by_sequence, token_starts
from tscompile.reader import Plan

ARRAYS = ("token_ids", "positions", "slots", "query_start", "context_len", "page_table", "logit_rows")


REDUCE = {"sum": np.add, "max": np.maximum}


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
        self.num_pages = num_pages  # of each owner of sequences; numbered over all of them
        self.arenas = [aligned(self.program["arena_bytes"]) for _ in ranks]
        self.caches = [[aligned(num_pages * kv["page_bytes"]) for _ in kv["layers"]] for _ in ranks]

    def run(self, batch: Batch) -> list[np.ndarray]:
        """One step; each rank's logits [L, vocab_size], of the first stage's ranks."""
        arrays = {name: np.ascontiguousarray(getattr(batch, name).numpy()) for name in ARRAYS}
        firsts, page_size = arrays["query_start"], self.program["limits"]["page_size"]
        slots_each = self.num_pages * page_size
        owners = [int(arrays["slots"][first]) // slots_each for first in firsts[:-1]]
        tokens = len(arrays["token_ids"])
        self.starts = {
            axis: token_starts(axis, size, tokens, firsts, owners) for axis, size in self.mesh.axes
        }
        self.rows = {"T": tokens, "L": len(arrays["logit_rows"]), "1": 1}
        bucket = next(found for found in self.program["buckets"] if tokens <= found["max_tokens"])
        flying: dict[str, Any] = {}
        for launch in bucket["launches"]:
            if launch.get("phase") == "start":
                flying = launch
            elif launch.get("phase") == "finish":  # what it takes must be there still
                assert (flying["op"], flying["args"][-1:]) == (launch["op"], launch["args"])
                self.collective(flying)
            elif "collective" in launch:
                self.collective(launch)
            else:
                for rank in filter(functools.partial(self.runs, launch), range(self.mesh.num_ranks)):
                    self.kernel(launch, self.part(arrays, launch.get("tokens", ""), rank), rank)
        logits, limits = bucket["logits"], self.program["limits"]
        shape = (self.rows["L"], logits["stride"])
        return [
            self.values(rank, logits["buffer"], "f32", shape)[:, : limits["vocab_size"]].copy()
            for rank in range(self.mesh.num_ranks)
            if not self.mesh.coords(rank).get("pp", 0)  # a later stage has none
        ]

    def runs(self, launch: dict[str, Any], rank: int) -> bool:
        return launch.get("stage", self.mesh.coords(rank).get("pp")) == self.mesh.coords(rank).get("pp")

    def part(self, arrays: dict[str, np.ndarray], axis: str, rank: int) -> dict[str, np.ndarray]:
        """The batch, or the rank's tokens of it over `axis`; by sequence also its sequences."""
        if not axis:
            return arrays
        at = self.mesh.coords(rank)[axis]
        first, end = self.starts[axis][at], self.starts[axis][at + 1]
        part = {name: arrays[name][first:end] for name in ("token_ids", "positions", "slots")}
        # what no kernel may read of a part in equal parts
        empty = {name: np.zeros((0, 1) if name == "page_table" else 0, np.int32) for name in ARRAYS}
        if not by_sequence(axis):
            return empty | part
        starts = arrays["query_start"]
        mine = (starts[:-1] >= first) & (starts[:-1] < end)
        part["query_start"] = np.append(starts[:-1][mine], end).astype(np.int32) - np.int32(first)
        return empty | part | {name: arrays[name][mine] for name in ("context_len", "page_table")}

    def kernel(self, launch: dict[str, Any], arrays: dict[str, np.ndarray], rank: int) -> None:
        table = arrays["page_table"]
        batch = _Batch(
            len(arrays["token_ids"]), len(arrays["context_len"]), len(arrays["logit_rows"]), table.shape[1]
        )
        for name, array in arrays.items():
            setattr(batch, name, array.ctypes.data)
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
        coords = self.mesh.coords(rank)
        if "kv" in argument:
            first = coords.get("dp", 0) * self.num_pages * self.program["kv"]["page_bytes"]
            return int(self.caches[rank][argument["kv"]].ctypes.data) - first
        at = ",".join(f"{axis}={coords[axis]}" for axis in argument.get("axes", ()))
        data = self.plan.bytes(argument["weight"] + (f"@{at}" if at else ""))
        assert len(data) == argument["bytes"]
        return int(np.frombuffer(data, np.uint8).ctypes.data)

    def values(self, rank: int, buffer: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """A view of a buffer, of f32 or the bits of bf16."""
        stored = np.dtype({"f32": np.float32, "bf16": np.uint16, "i32": np.int32}[dtype])
        where = self.program["buffers"][buffer]
        num_bytes = int(np.prod(shape)) * stored.itemsize
        assert num_bytes <= where["bytes"], (where["name"], shape)
        return self.arenas[rank][where["offset"] :][:num_bytes].view(stored).reshape(shape)

    def collective(self, launch: dict[str, Any]) -> None:
        for first in range(self.mesh.num_ranks):
            group = self.mesh.group(first, launch["axis"])
            if group[0] == first and self.runs(launch, first):
                self.collect(launch, group)

    def collect(self, launch: dict[str, Any], group: list[int]) -> None:
        """The collective of one group of ranks."""
        if launch["collective"] == "ragged_all_to_all":
            self.move_rows(launch, group)
            return
        kind, run, part, n = launch["collective"], launch["run"], launch.get("part", 1), len(group)
        given, taken = (argument["buffer"] for argument in launch["args"])
        starts = self.starts[launch["axis"]] if "parts" in launch else list(range(n + 1))
        sizes = np.diff(starts).tolist()
        rows, _, over = launch["rows"].partition("/")
        outer = self.rows[rows] * launch["times"]
        if over:
            at = self.mesh.coords(group[0])[over]
            outer = (self.starts[over][at + 1] - self.starts[over][at]) * launch["times"]

        def read(*shape: int) -> list[np.ndarray]:
            return [self.values(rank, given, launch["dtype"], (outer, *shape)).copy() for rank in group]

        whole = starts[-1]
        if kind == "all_reduce":
            outputs = [functools.reduce(REDUCE[launch["reduce"]], read(run))] * n
        elif kind in ("reduce_scatter", "slice"):
            terms = read(whole, run)
            if kind == "reduce_scatter":
                terms = [functools.reduce(REDUCE[launch["reduce"]], terms)] * n
            outputs = [term[:, starts[at] : starts[at + 1]] for at, term in enumerate(terms)]
        elif kind == "all_gather":
            parts = [
                self.values(rank, given, launch["dtype"], (outer, size, run)).copy()
                for rank, size in zip(group, sizes, strict=True)
            ]
            outputs = [np.concatenate(parts, axis=1)] * n
        elif kind == "send":
            group = [group[launch["src"]], group[launch["dst"]]]
            outputs = read(run)[:1]
            group = group[1:]
        elif launch["gathers"] == "first":
            parts = [
                self.values(rank, given, launch["dtype"], (outer, size * part, n, run)).copy()
                for rank, size in zip(group, sizes, strict=True)
            ]
            outputs = [np.concatenate([term[:, :, at] for term in parts], axis=1) for at in range(n)]
        else:
            stacked = np.stack(read(whole, part, run), axis=3)  # [outer, whole, part, ranks, run]
            outputs = [stacked[:, starts[at] : starts[at + 1]] for at in range(n)]
        for rank, out in zip(group, outputs, strict=True):
            self.values(rank, taken, launch["dtype"], out.shape)[...] = out

    def move_rows(self, launch: dict[str, Any], group: list[int]) -> None:
        """Rows of routes, from the ranks of their tokens to those of their experts, or back."""
        n, run, dtype = len(group), launch["run"], launch["dtype"]
        taken, counts, given = (argument["buffer"] for argument in launch["args"])
        sizes = self.values(group[0], counts, "i32", (n, launch["experts"])).copy()
        assert all((self.values(r, counts, "i32", sizes.shape) == sizes).all() for r in group)
        experts = np.arange(launch["experts"]).reshape(n, -1)  # of each rank
        by_token = [[(q, e) for e in experts.flat] for q in range(n)]
        by_expert = [[(q, e) for e in own for q in range(n)] for own in experts]
        lie, go = (by_token, by_expert) if launch["to"] == "experts" else (by_expert, by_token)
        parts = {}
        for rank, pairs in zip(group, lie, strict=True):
            ends = np.cumsum([sizes[pair] for pair in pairs])
            rows = self.values(rank, taken, dtype, (int(ends[-1]), run)).copy()
            parts.update(zip(pairs, np.split(rows, ends[:-1]), strict=True))
        for rank, pairs in zip(group, go, strict=True):
            rows = np.concatenate([parts[pair] for pair in pairs])
            self.values(rank, given, dtype, rows.shape)[...] = rows
