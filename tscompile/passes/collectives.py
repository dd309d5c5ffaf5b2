"""collectives: each redistribute becomes what realises it cheapest.

Takes a graph with redistributes; gives one with all_reduce, all_gather, reduce_scatter, all_to_all, send and
slice in their place, still in global shapes (ranks=1 in their attrs: localize says how many).
"""

from __future__ import annotations

from tscompile.build import Build
from tscompile.errors import InternalError
from tscompile.ir import Attr, Op
from tscompile.placement import Partial, Shard, Stage, parse_placement
from tscompile.price import collective_of


def run(build: Build) -> None:
    for op in build.graph.ops:
        if op.kind == "redistribute":
            op.kind, op.attrs = _realise(op)


def _realise(op: Op) -> tuple[str, dict[str, Attr]]:
    """(kind, attrs) of the collective for one (from, to) pair."""
    source, target = parse_placement(str(op.attrs["source"])), parse_placement(str(op.attrs["target"]))
    kind = collective_of(source, target)
    if kind in ("", "nothing"):
        raise InternalError(f"no collective leads from {source} to {target}, at {op.outputs[0]!r}")
    attrs: dict[str, Attr] = {"axis": op.attrs["axis"]}
    if isinstance(source, Stage) and isinstance(target, Stage):
        return kind, attrs | {"src": source.index, "dst": target.index}
    if isinstance(source, Partial):
        attrs["op"] = source.op
    if isinstance(source, Shard):
        attrs["source" if kind == "all_to_all" else "dim"] = source.dim
    if isinstance(target, Shard):
        attrs["dim"] = target.dim
    return kind, attrs if kind == "all_reduce" else {**attrs, "ranks": 1}
