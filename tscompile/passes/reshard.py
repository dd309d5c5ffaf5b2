"""reshard: a redistribute wherever a value does not lie as its reader takes it.

Takes a placed graph. Gives one in which every op's inputs are placed as its strategy wants them: where a
value is not, a `redistribute` along one axis stands before its first reader that needs it, one a value and
placement. Boundaries are gone: their values were brought to what the author said. The graph's outputs are
replicated. A redistribute of rows that are routed takes the counts of the op that sorted them too.
"""

from __future__ import annotations

from tscompile.build import Build
from tscompile.errors import InternalError, Source
from tscompile.ir import Graph, Op, Value, wanted_of_outputs
from tscompile.placement import Partial, Placement, Placements, Replicate, Shard, Stage
from tscompile.sharding import chosen


def run(build: Build) -> None:
    for graph in build.buckets.values():
        reshard(graph)


def reshard(graph: Graph) -> None:
    resharder = _Resharder(graph)
    for op in graph.ops:
        resharder.add(op)
    wanted = wanted_of_outputs(graph.mesh)
    graph.outputs = [resharder.bring(v, wanted, None) for v in graph.outputs]
    graph.ops = resharder.ops


def _blockers(index: int, here: Placements, wanted: Placements) -> list[int]:
    """The axes that must leave the dims that the index-th axis leaves or takes, before it can."""
    dims = {p.dim for p in (here[index], wanted[index]) if isinstance(p, Shard)}
    found = []
    for other, placement in enumerate(here):
        if other != index and isinstance(placement, Shard) and placement.dim in dims:
            stays = placement == wanted[other]
            if other > index or (placement == wanted[index] and not stays):
                found.append(other)
    return found


def _waits(index: int, here: Placements, wanted: Placements) -> bool:
    """Whether an earlier axis is still to take the dim that the index-th takes."""
    earlier = zip(here[:index], wanted[:index], strict=True)
    return isinstance(wanted[index], Shard) and any(p != to == wanted[index] for p, to in earlier)


def _turn(here: Placement, wanted: Placement) -> int:
    if isinstance(here, Partial):
        return 0 if wanted == Replicate() else 1
    return 1 if isinstance(wanted, Stage) else 2 if wanted == Replicate() else 3


class _Resharder:
    def __init__(self, graph: Graph) -> None:
        self.axes = graph.mesh.axes
        self.ops: list[Op] = []
        self.stands_for: dict[int, Value] = {}  # id(a boundary's output) -> its input, as placed
        self.made: dict[tuple[int, Placements], Value] = {}
        self.maker = {id(v): op for op in graph.ops for v in op.outputs}

    def add(self, op: Op) -> None:
        inputs = [self.stands_for.get(id(v), v) for v in op.inputs]
        strategies = [chosen(op, axis, index, ranks) for index, (axis, ranks) in enumerate(self.axes)]
        wanted = [tuple(s.takes[i] for s in strategies) for i in range(len(inputs))]
        op.inputs = [self.bring(value, to, op.source) for value, to in zip(inputs, wanted, strict=True)]
        if op.kind == "boundary":
            self.stands_for[id(op.outputs[0])] = op.inputs[0]
        else:
            self.ops.append(op)

    def bring(self, value: Value, wanted: Placements, source: Source | None) -> Value:
        """`value` placed as `wanted`, axis by axis: what becomes whole first. Of axes that share one dim out
        the later hold parts of the earlier ones' parts, so those are gathered first and cut last. What is
        sent to another stage has its terms summed before, and its parts gathered after."""
        value = self.stands_for.get(id(value), value)
        while value.placement != wanted:
            here = value.placement
            blockers = {i: _blockers(i, here, wanted) for i, to in enumerate(wanted) if here[i] != to}
            free = [i for i, blocking in blockers.items() if not blocking and not _waits(i, here, wanted)]
            if free:
                index = min(free, key=lambda i: _turn(here[i], wanted[i]))
                to = wanted[index]
            else:
                index, to = max(j for blocking in blockers.values() for j in blocking), Replicate()
            value = self._redistribute(value, index, self.axes[index][0], to, source)
        return value

    def _redistribute(
        self, value: Value, index: int, axis: str, to: Placement, source: Source | None
    ) -> Value:
        placement = (*value.placement[:index], to, *value.placement[index + 1 :])
        key = (id(value), placement)
        if key not in self.made:
            suffix = "".join(letter for letter in str(to) if letter.isalnum())
            moved = Value(f"{value.name}.{axis}-{suffix}", value.shape, value.dtype, False, placement)
            attrs = {"axis": axis, "source": str(value.placement[index]), "target": str(to)}
            inputs = [value, *self._counts(value, index)]
            self.ops.append(Op("redistribute", inputs, [moved], dict(attrs), source))
            self.made[key] = moved
            self.maker[id(moved)] = self.ops[-1]
        return self.made[key]

    def _counts(self, value: Value, index: int) -> list[Value]:
        """Of rows that are routed: how many of each expert a rank's tokens have, its term of the sum."""
        if not value.routed:
            return []
        maker = self.maker[id(value)]
        while routed := next((v for v in maker.inputs if v.routed), None):
            maker = self.maker[id(routed)]
        (counts,) = (v for v in maker.outputs if not v.routed)
        by_expert: list[Placement] = [
            p if p == Shard(0) or isinstance(p, Stage) else Replicate() for p in value.placement
        ]
        by_expert[index] = Partial()
        if counts.placement != tuple(by_expert):
            found, lies, wanted = (
                " ".join(map(str, p)) for p in (counts.placement, value.placement, by_expert)
            )
            raise InternalError(
                f"{value!r} lies {lies} and is to move over {self.axes[index][0]}, its counts lie {found}: "
                f"wanted {wanted}"
            )
        return [counts]
