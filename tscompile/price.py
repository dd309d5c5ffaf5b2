"""What computing and moving cost, in seconds, so that placements can be compared. One machine's worth of
constants, in the right proportions for CPU ranks over shared memory; a topology file a target is to give its
own."""

from __future__ import annotations

from dataclasses import dataclass

from tscompile.ir import Op, Sym, Value
from tscompile.ops import lookup
from tscompile.ops.base import elements, num_bytes
from tscompile.placement import Partial, Placement, Replicate, Shard


@dataclass(frozen=True)
class Prices:
    """Of one rank and one step. sizes: what the symbolic dims are taken to be."""

    flops_per_s: float = 1e11
    read_bytes_per_s: float = 1e10
    link_bytes_per_s: float = 5e9
    collective_s: float = 1e-5  # latency of one
    resident_per_read: float = 0.1  # a weight's byte costs this much of its reading merely by being there
    sizes: tuple[tuple[str, int], ...] = (("T", 64), ("S", 16), ("L", 16), ("P", 16), ("context", 1024))

    def op(self, op: Op, parts: int) -> float:
        """Computing and reading, split into `parts` equal ones (1: every rank does all of it). Elementwise
        ops are free: they become part of their neighbours' kernels."""
        definition, sizes = lookup(op.kind), dict(self.sizes)
        if definition.elementwise:
            return 0.0
        flops = definition.flops(op.inputs, op.outputs, op.attrs, sizes)
        moved = definition.bytes(op.inputs, op.outputs, op.attrs, sizes)
        return max(flops / self.flops_per_s, moved / self.read_bytes_per_s) / parts

    def resident(self, weight: Value, parts: int) -> float:
        """Holding 1 / parts of a weight."""
        return num_bytes([weight], {}) / parts / self.read_bytes_per_s * self.resident_per_read

    def is_product(self, op: Op) -> bool:
        """More than a few operations an element of output."""
        sizes = dict(self.sizes)
        done = lookup(op.kind).flops(op.inputs, op.outputs, op.attrs, sizes)
        return done > 8 * sum(elements(v.shape, sizes) for v in op.outputs)

    def move(self, value: Value, source: Placement, target: Placement, ranks: int) -> float:
        """From one placement to another along an axis of `ranks`; infinite where no collective does it."""
        if source == target:
            return 0.0
        size = elements(value.shape, dict(self.sizes)) * 4 / self.link_bytes_per_s * (ranks - 1) / ranks
        routed = any(isinstance(dim, Sym) and dim.ragged for dim in value.shape)
        match source, target:
            case _ if routed:
                pass  # rows of experts stay where they are; what is combined of them, T rows, moves
            case Replicate(), Shard():
                return 0.0
            case Partial(), Replicate():
                return self.collective_s + 2 * size
            case (Shard(), Replicate()) | (Partial(), Shard()):
                return self.collective_s + size
            case Shard(), Shard():
                return self.collective_s + size / ranks
        return float("inf")
