"""Where a graph can be cut such that one value alone crosses, and which of the segments between are alike: a
model's layers, or halves of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tscompile.ir import Attr, Graph, Op, Value

NONE = ""  # no value has this name


@dataclass(frozen=True)
class Segment:
    """ops[start:stop]. comes, leaves: the one value that crosses into it, and out of it, as its repr; NONE at
    the graph's ends."""

    start: int
    stop: int
    comes: str
    leaves: str


def sorted_attrs(op: Op) -> tuple[tuple[str, Attr], ...]:
    """All that says what the op does; `module` says where it stands."""
    return tuple(sorted((k, v) for k, v in op.attrs.items() if k != "module"))


class Segments:
    """A graph's values by their repr: the ops that read them first and last (`len(ops)`: an output); and its
    segments."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.first_use: dict[str, int] = {}
        self.last_use: dict[str, int] = {}
        for i, op in enumerate(graph.ops):
            for value in op.inputs:
                self.first_use.setdefault(repr(value), i)
                self.last_use[repr(value)] = i
        self.last_use.update({repr(v): len(graph.ops) for v in graph.outputs})

    def all(self) -> list[Segment]:
        """In order: cut wherever all that was computed and is still read is one value."""
        found, live, start, comes = list[Segment](), dict[str, int](), 0, NONE
        for i, op in enumerate(self.graph.ops):
            live.update({repr(v): self.last_use.get(repr(v), -1) for v in op.outputs})
            live = {v: last for v, last in live.items() if last > i}
            if len(live) <= 1 or i == len(self.graph.ops) - 1:
                leaves = next(iter(live)) if len(live) == 1 else NONE
                found.append(Segment(start, i + 1, comes, leaves))
                start, comes = i + 1, leaves
        return found

    def signature(
        self,
        segment: Segment,
        of_value: Callable[[Value], object] = lambda _: None,
        of_op: Callable[[Op], object] = sorted_attrs,
    ) -> object:
        """Equal for two segments that are alike: ops, types, who reads what, and what else is asked of each
        value and op. What other segments read too is itself alone."""
        labels: dict[str, object] = {segment.comes: "in"}
        start, stop = segment.start, segment.stop

        def label(value: Value) -> object:
            name = repr(value)
            alone = self.first_use[name] >= start and self.last_use[name] < stop
            if name not in labels:
                labels[name] = len(labels) if alone else name
            return labels[name], value.shape, value.dtype, of_value(value)

        lines = []
        for op in self.graph.ops[start:stop]:
            takes = tuple(label(v) for v in op.inputs)
            for value in op.outputs:
                labels[repr(value)] = ("made", len(labels))
            gives = tuple(
                (labels[repr(v)], v.shape, v.dtype, self.last_use.get(repr(v), -1) >= stop, of_value(v))
                for v in op.outputs
            )
            lines.append((op.kind, takes, gives, of_op(op)))
        return tuple(lines)
