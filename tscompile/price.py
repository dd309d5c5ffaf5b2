"""What computing and moving cost, in seconds of one rank and one step, so that placements can be compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tscompile.ir import DTYPES, Op, Sym, Value, Weight
from tscompile.ops import lookup
from tscompile.ops.base import elements, num_bytes
from tscompile.placement import Partial, Placement, Replicate, Shard, Stage
from tscompile.topology import Topology, topology_of

# A weight's byte costs this much of its reading merely by being there: of two placements that read it alike
# the one that holds less wins, and no collective is paid for memory alone.
RESIDENT_PER_READ = 0.1


@dataclass(frozen=True)
class Prices:
    """sizes: what the symbolic dims are taken to be."""

    topology: Topology
    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, target: str, tokens: int, sequences: int = 64, context: int = 1024) -> Prices:
        """For steps of `tokens` tokens of at most `sequences` sequences, each with `context` tokens behind
        it. CompileError if no topology knows the target."""
        rows = min(tokens, sequences)
        sizes = {"T": tokens, "S": rows, "L": rows, "P": 16, "context": context}
        return cls(topology_of(target), tuple(sizes.items()))

    def shares(self, rows: Sym, ranks: int) -> float:
        """How many times less than all of these rows the rank has that has most of them."""
        count = rows.size(dict(self.sizes))
        return count / math.ceil(count / ranks)

    def op(self, op: Op, parts: float = 1, weight_parts: int = 1) -> float:
        """Computing and reading, split into `parts` equal ones (1: every rank does all of it), the weights
        into `weight_parts`. Elementwise ops are free: they become part of their neighbours' kernels."""
        definition, sizes, machine = lookup(op.kind), dict(self.sizes), self.topology
        if definition.elementwise:
            return 0.0
        flops = definition.flops(op.inputs, op.outputs, op.attrs, sizes)
        moved = definition.bytes(op.inputs, op.outputs, op.attrs, sizes)
        if not flops and not moved:
            return 0.0
        stored = [v.dtype for v in op.inputs if isinstance(v, Weight) or v.state]
        speed = machine.flops_per_s["bf16" if "bf16" in stored else "f32"]
        weights = min(moved, num_bytes([v for v in op.inputs if isinstance(v, Weight)], sizes))
        moved_here = (moved - weights) / parts + weights / weight_parts
        return max(flops / parts / speed, moved_here / machine.read_bytes_per_s) + machine.launch_s

    def resident(self, weight: Value, parts: int) -> float:
        """Holding 1 / parts of a weight."""
        return num_bytes([weight], {}) / parts / self.topology.read_bytes_per_s * RESIDENT_PER_READ

    def is_product(self, op: Op) -> bool:
        """More than a few operations an element of output."""
        sizes = dict(self.sizes)
        done = lookup(op.kind).flops(op.inputs, op.outputs, op.attrs, sizes)
        return done > 8 * sum(elements(v.shape, sizes) for v in op.outputs)

    def bytes_of(self, value: Value) -> int:
        return elements(value.shape, dict(self.sizes)) * DTYPES[value.dtype]

    def move(self, value: Value, source: Placement, target: Placement, ranks: int, parts: int = 1) -> float:
        """From one placement to another along an axis of `ranks`, each of which has 1 / parts of the value
        by other axes; infinite where no collective does it."""
        collective = collective_of(source, target)
        if collective == "nothing":
            return 0.0
        if not collective or value.routed != (collective == "ragged_all_to_all"):
            return math.inf
        if value.routed and value.dtype == "i32":
            return math.inf  # numbers of routes count the tokens that a rank has
        if collective == "slice":
            return 0.0
        cost = self.collective(collective, self.bytes_of(value) // parts, ranks)[0]
        if value.routed and target == Shard(0):  # the counts go first; the way back knows them
            cost += self.collective("all_gather", 0, ranks)[0]
        return cost

    def send(self, value: Value, num_ranks: int) -> float:
        """From one stage to the next, in a mesh of `num_ranks`: stages are farthest apart."""
        return self.collective("send", self.bytes_of(value), num_ranks)[0]

    def collective(self, kind: str, num_bytes: float, ranks: int) -> tuple[float, str]:
        """(seconds, the algorithm) over a value of `num_bytes`, launch included."""
        seconds, algorithm = self.topology.link(ranks).best(kind, num_bytes, ranks)
        return seconds + self.topology.launch_s, algorithm

    def hidden(self, kind: str, num_bytes: float, ranks: int) -> float:
        """Of these seconds, what other work may hide."""
        return self.topology.link(ranks).hidden(kind, num_bytes, ranks)


def collective_of(source: Placement, target: Placement) -> str:  # noqa: PLR0911 (one a pair)
    """What leads from one placement to another: a collective's kind, "nothing", or "" if none does."""
    if source == target:
        return "nothing"
    match source, target:
        case Replicate(), Shard():
            return "slice"
        case Partial(), Replicate():
            return "all_reduce"
        case Shard(), Replicate():
            return "all_gather"
        case Partial(), Shard():
            return "reduce_scatter"
        case Shard(), Shard():
            return "ragged_all_to_all" if source.dim == target.dim else "all_to_all"
        case Stage(), Stage():
            return "send"
    return ""
