"""Runs a graph with torch on N simulated ranks in one process: the oracle that passes and kernels are held
to.

A rank holds what its program would hold: its shards of the weights, its KV caches. Collectives run across the
ranks of an axis. A graph before `localize` has global shapes and runs as one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tscompile.errors import InternalError
from tscompile.ir import Graph, Group, Op, Sym, Value, stage_of
from tscompile.mesh import Mesh, token_starts
from tscompile.ops import lookup
from tscompile.ops.attention import KVCache
from tscompile.ops.base import Across, RankContext
from tscompile.ops.elementwise import TORCH_DTYPES
from tscompile.recipe import axes_of
from tscompile.weights import Read, evaluate


@dataclass
class Batch:
    """One step's arrays, as in csrc/launch_abi.h; int32 tensors."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_start: Tensor
    context_len: Tensor
    page_table: Tensor
    logit_rows: Tensor


class Interpreter:
    """Keeps weights and KV caches between steps."""

    def __init__(self, graph: Graph, read: Read, num_slots: int = 1024, mesh: Mesh | None = None) -> None:
        """`read` gives the checkpoint's tensors. num_slots: the size of each layer's cache. mesh: the graph's
        own after `localize`; one rank before."""
        self.graph = graph
        self.mesh = mesh or Mesh()
        self.num_slots = num_slots
        self.fixed: list[dict[int, Any]] = []
        shards: dict[tuple[object, ...], Tensor] = {}
        for rank in range(self.mesh.num_ranks):
            coords = self.mesh.coords(rank)
            values: dict[int, Any] = {}
            for weight in graph.weights:
                if not self._has(weight, rank):
                    continue
                # ranks share what they hold alike
                key = (id(weight), *(coords[axis] for axis in sorted(axes_of(weight.recipe))))
                if key not in shards:
                    shards[key] = evaluate(weight, read, self.mesh, coords)
                values[id(weight)] = shards[key]
            for state in graph.states:
                if self._has(state, rank):
                    values[id(state)] = KVCache.empty(state, num_slots)
            self.fixed.append(values)

    def run(self, batch: Batch) -> list[list[Tensor]]:
        """One step. The graph's outputs, a list a rank; where there are stages, empty but on the first's."""
        arrays = vars(batch)
        ranks = [dict(values) for values in self.fixed]
        for values in ranks:
            values.update({id(v): arrays[v.name] for v in self.graph.inputs if not v.state})
        self.starts = {axis: self._starts(axis, size, batch) for axis, size in self.mesh.axes}
        for op in self.graph.ops:
            for inner in op.body if isinstance(op, Group) else [op]:
                self._run_op(inner, ranks)
        return [
            [self._read(v, rank, ranks) for v in self.graph.outputs if self._has(v, rank)]
            for rank in range(len(ranks))
        ]

    def _has(self, value: Value, rank: int) -> bool:
        """Whether `rank` has anything of `value`: its stage's ranks have, or all."""
        stage = stage_of(value)
        index = self.mesh.stage_axis
        return stage is None or index < 0 or self.mesh.coords(rank)[self.mesh.names[index]] == stage

    def _read(self, value: Value, rank: int, ranks: list[dict[int, Any]]) -> Any:
        if id(value) not in ranks[rank]:
            raise InternalError(f"rank {rank} of {self.mesh} reads {value!r}, which it does not have")
        return ranks[rank][id(value)]

    def _run_op(self, op: Op, ranks: list[dict[int, Any]]) -> None:
        definition = lookup(op.kind)
        if definition.across:
            self._run_across(definition.across, op, ranks)
            return
        assert definition.reference is not None, op.kind
        for rank, values in enumerate(ranks):
            if self._has(op.outputs[0], rank):
                context = RankContext(self.mesh, rank, self._tokens(op, rank))
                inputs = [self._read(v, rank, ranks) for v in op.inputs]
                self._set(values, op.outputs, definition.reference(context, inputs, op.attrs))

    def _run_across(self, across: Across, op: Op, ranks: list[dict[int, Any]]) -> None:
        """Every group of the op's axis that has what it takes or gives."""
        axis, (out,) = str(op.attrs["axis"]), op.outputs
        starts = self.starts[axis] if axis in over_of(out) else None
        for rank in range(len(ranks)):
            group = self.mesh.group(rank, axis)
            if group[0] != rank or not any(self._has(op.inputs[0], r) for r in group):
                continue
            terms = [[self._read(x, r, ranks) if self._has(x, r) else None for x in op.inputs] for r in group]
            for r, tensor in zip(group, across(terms, op.attrs, starts), strict=True):
                if tensor is not None and self._has(out, r):
                    self._set(ranks[r], op.outputs, [tensor])

    def _starts(self, axis: str, size: int, batch: Batch) -> list[int]:
        """Who has which tokens. The cache's slots are dealt to the ranks in equal parts, in order; here each
        rank's cache has room for all."""
        firsts = batch.query_start.tolist()
        owners = [int(batch.slots[first]) * size // self.num_slots for first in firsts[:-1]]
        return token_starts(axis, size, len(batch.token_ids), firsts, owners)

    def _tokens(self, op: Op, rank: int) -> tuple[int, int] | None:
        """The first and the end of the tokens that `rank` has, if the op works on a part."""
        for axis in next((over_of(v) for v in (*op.outputs, *op.inputs) if over_of(v)), ()):
            at = self.mesh.coords(rank)[axis]
            return self.starts[axis][at], self.starts[axis][at + 1]
        return None

    def _set(self, values: dict[int, Any], outputs: Sequence[Value], given: Sequence[Any]) -> None:
        for value, result in zip(outputs, given, strict=True):
            if isinstance(result, Tensor):
                fixed = [
                    dim if isinstance(dim, int) else size
                    for dim, size in zip(value.shape, result.shape, strict=True)
                ]
                wanted = (TORCH_DTYPES[value.dtype], tuple(fixed))
                assert (result.dtype, tuple(result.shape)) == wanted, (
                    f"{value!r}: {result.dtype}{list(result.shape)}"
                )
            values[id(value)] = result


def over_of(value: Value) -> tuple[str, ...]:
    """The mesh axes over which a value's tokens are sharded."""
    return next((dim.over for dim in value.shape if isinstance(dim, Sym) and dim.over), ())


class Sequences:
    """Makes batches: page tables, slots and positions for sequences that grow. Pages are given in a scattered
    order on purpose. owners: ranks that share the sequences out between them, and the slots, in equal
    parts."""

    def __init__(self, page_size: int, num_slots: int, owners: int = 1) -> None:
        if num_slots % (page_size * owners):
            raise InternalError(
                f"{num_slots} slots for {owners} owners of pages of {page_size}: wanted a multiple of "
                f"{page_size * owners}"
            )
        self.page_size = page_size
        pages = sorted(range(num_slots // page_size), key=lambda page: (page * 7919) % 10007)
        self.free = [[p for p in pages if p * page_size * owners // num_slots == r] for r in range(owners)]
        self.owner: dict[str, int] = {}
        self.pages: dict[str, list[int]] = {}
        self.length: dict[str, int] = {}

    def batch(self, tokens: Mapping[str, Sequence[int]], *, all_logits: bool = False) -> Batch:
        """A step that gives each sequence its next tokens; logits of each one's last token, or of every
        token. Sequences are sorted by owner."""
        ids: list[int] = []
        rows: list[int] = []
        positions, slots, start = [], [], [0]
        for name in tokens:
            self.owner.setdefault(name, len(self.owner) % len(self.free))
        names = sorted(tokens, key=lambda name: self.owner[name])
        for name in names:
            new, free = tokens[name], self.free[self.owner[name]]
            pages, length = self.pages.setdefault(name, []), self.length.get(name, 0)
            for position in range(length, length + len(new)):
                if position % self.page_size == 0:
                    pages.append(free.pop())
                slots.append(pages[position // self.page_size] * self.page_size + position % self.page_size)
                positions.append(position)
            self.length[name] = length + len(new)
            ids += new
            start.append(len(ids))
            rows += range(start[-2], start[-1]) if all_logits else [start[-1] - 1]
        width = max(len(self.pages[name]) for name in names)
        table = [self.pages[name] + [0] * (width - len(self.pages[name])) for name in names]
        context = [self.length[name] for name in names]
        arrays = [ids, positions, slots, start, context, table, rows]
        return Batch(*(torch.tensor(array, dtype=torch.int32) for array in arrays))
