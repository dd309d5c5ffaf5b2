"""collectives: each redistribute becomes what realises it cheapest.

Takes a graph with redistributes; gives one with all_reduce, all_gather, reduce_scatter, all_to_all and slice
in their place, still in global shapes (ranks=1 in their attrs: localize says how many).
"""

from __future__ import annotations

from tscompile.build import Build
from tscompile.errors import InternalError
from tscompile.ir import Attr, Op
from tscompile.placement import Partial, Replicate, Shard, parse_placement


def run(build: Build) -> None:
    for op in build.graph.ops:
        if op.kind == "redistribute":
            op.kind, op.attrs = _realise(op)


def _realise(op: Op) -> tuple[str, dict[str, Attr]]:
    """(kind, attrs) of the collective for one (from, to) pair."""
    axis = op.attrs["axis"]
    source, target = parse_placement(str(op.attrs["source"])), parse_placement(str(op.attrs["target"]))
    match source, target:
        case Partial(reduction), Replicate():
            return "all_reduce", {"axis": axis, "op": reduction}
        case Partial(reduction), Shard(dim):
            return "reduce_scatter", {"axis": axis, "op": reduction, "dim": dim, "ranks": 1}
        case Shard(dim), Replicate():
            return "all_gather", {"axis": axis, "dim": dim, "ranks": 1}
        case Replicate(), Shard(dim):
            return "slice", {"axis": axis, "dim": dim, "ranks": 1}
        case Shard(old), Shard(dim):
            return "all_to_all", {"axis": axis, "source": old, "dim": dim, "ranks": 1}
    raise InternalError(f"no collective leads from {source} to {target}, at {op.outputs[0]!r}")
