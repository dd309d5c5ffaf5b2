"""Cuts a graph into groups: around anchors as `Cut`s say, and what is left into elementwise groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tscompile.errors import InternalError
from tscompile.ir import Graph, Group, Op, Value, unique
from tscompile.ops import lookup
from tscompile.rewrite import Rewriter, in_order, weights_in_use


@dataclass(frozen=True)
class Cut:
    """A group: the anchor op, ops that may stand before each of its inputs (nearest first) or after it (in
    order), each at most once. Reshapes between them belong to it. when: kind -> a test that says why an op
    does not belong. shared: kinds whose value others may read too; the group gives it. receipt: (pattern,
    kind): each anchor gets one, matched if it has that kind. required: an anchor without that kind is left to
    later cuts, and nothing is tried in a graph that has no op of it."""

    group: str
    anchor: str
    before: dict[int, tuple[str, ...]] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    when: dict[str, Callable[[Op, Value], str]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    receipt: tuple[str, str] = ("", "")
    required: bool = False


class Cutter:
    def __init__(self, graph: Graph, names: set[str]) -> None:
        self.graph = graph
        self.rewriter = Rewriter(graph)
        self.rewriter.names |= names
        self.matcher = self.rewriter.matcher
        self.owned: set[int] = set()
        self.members: list[tuple[str, list[Op]]] = []

    def group(self, kind: str, members: Sequence[Op]) -> None:
        """The ops become one group of this kind."""
        self.members.append((kind, in_order(list(members))))
        self.owned |= {id(op) for op in members}

    def cut(self, cut: Cut) -> Iterator[tuple[Op, str]]:
        """Groups around every anchor. Yields (anchor, why the receipt's kind was not found, or nothing) for
        cuts with a receipt."""
        pattern, wanted = cut.receipt
        if cut.required and not any(op.kind == wanted for op in self.graph.ops):
            return
        for op in self.graph.ops:
            if op.kind != cut.anchor or id(op) in self.owned:
                continue
            members, reasons = [op], dict[str, str]()
            for index, kinds in cut.before.items():
                members = self._before(cut, [op.inputs[index]], kinds, reasons) + members
            members += self._after(cut, op.outputs[0], reasons)
            found = any(member.kind == wanted for member in members)
            if found or not cut.required:
                self.group(cut.group, members)
            if pattern:
                yield op, "" if found else reasons.get(wanted, f"no {wanted} beside it")

    def _before(
        self, cut: Cut, values: Sequence[Value], kinds: Sequence[str], reasons: dict[str, str]
    ) -> list[Op]:
        """values: what may come from an op of the nearest kind; then the inputs of what was taken."""
        taken: list[Op] = []
        for kind in kinds:
            for value in values:
                found, reason = self._above(cut, kind, value)
                if found:
                    taken, values = found + taken, found[0].inputs
                    break
                reasons.setdefault(kind, reason)
        return taken

    def _above(self, cut: Cut, kind: str, value: Value) -> tuple[list[Op], str]:
        """The op of `kind` that makes `value` and the reshapes after it, or nothing and why not."""
        op, reshapes = self.matcher.producers.get(id(value)), list[Op]()
        while op is not None and op.kind == "reshape" and self.matcher.single(value):
            reshapes.append(op)
            value = op.inputs[0]
            op = self.matcher.producers.get(id(value))
        reason = self._refusal(cut, kind, op, value)
        if not reason and kind not in cut.shared and not self.matcher.single(value):
            reason = f"{value!r} has other readers"
        return ([op, *reshapes[::-1]], "") if op and not reason else ([], reason)

    def _after(self, cut: Cut, value: Value, reasons: dict[str, str]) -> list[Op]:
        taken: list[Op] = []
        for kind in ("reshape", *(k for wanted in cut.after for k in (wanted, "reshape"))):
            if not self.matcher.single(value):
                reasons[kind] = (
                    f"{value!r} has {len(self.matcher.consumers.get(id(value), []))} readers, wanted one"
                )
                break
            op = self.matcher.consumers[id(value)][0]
            reason = self._refusal(cut, kind, op, value)
            if reason:
                reasons.setdefault(kind, reason)
                continue
            taken.append(op)
            value = op.outputs[0]
        return taken

    def _refusal(self, cut: Cut, kind: str, op: Op | None, value: Value) -> str:
        if op is None or op.kind != kind:
            return f"beside it, at {value!r}, is {op.kind if op else 'nothing'}, wanted {kind}"
        if id(op) in self.owned:
            return f"the {kind} belongs to another group"
        return cut.when[kind](op, value) if kind in cut.when else ""

    # --- what is left ---

    def finish(self) -> None:
        """Elementwise groups of what no cut took, then the graph as groups, in order."""
        self._explode_splits()
        self._elementwise()
        left = [op for op in self.graph.ops if id(op) not in self.owned and op.kind != "reshape"]
        for op in left:
            if lookup(op.kind).across is None:
                raise InternalError(f"no group takes {op.kind} -> {op.outputs[0]!r}")
            self.group("collective", [op])
        for op in self.graph.ops:
            if (
                op.kind == "reshape"
                and id(op) not in self.owned
                and id(op.outputs[0]) in self.matcher.outputs
            ):
                self.group("elementwise", [op])
        groups: list[Op] = [self._make(kind, members) for kind, members in self.members]
        self.graph.ops = in_order(groups)
        self.graph.weights = weights_in_use(self.graph.ops)

    def _explode_splits(self) -> None:
        """A split that no group took is done by each of its readers: a copy for each, of which one output is
        read."""
        for split in [op for op in self.graph.ops if op.kind == "split" and id(op) not in self.owned]:
            for value in split.outputs:
                for reader in list(self.matcher.consumers.get(id(value), [])):
                    copies = [self.rewriter.like(v, v.name) for v in split.outputs]
                    copy = Op("split", split.inputs, copies, split.attrs, split.source)
                    self.rewriter.replace([], reader, [copy, reader])
                    self.rewriter.reread(value, copies[split.outputs.index(value)], [reader])
            self.rewriter.replace([], split, [])

    def _elementwise(self) -> None:
        """From each op that is left, last first: it and the elementwise ops of one shape above it that
        nothing else reads."""
        for op in reversed(self.graph.ops):
            if id(op) in self.owned or not _computes_elements(op):
                continue
            members, at = [op], 0
            while at < len(members):
                for value in members[at].inputs:
                    maker = self.matcher.producers.get(id(value))
                    if maker and maker not in members and self._joins(maker, value, members, op):
                        members.append(maker)
                at += 1
            self.group("elementwise", members)

    def _joins(self, maker: Op, value: Value, members: list[Op], root: Op) -> bool:
        inside = all(reader in members for reader in self.matcher.consumers[id(value)])
        free = id(maker) not in self.owned and id(value) not in self.matcher.outputs
        same = (
            value.row_elements == root.outputs[0].row_elements
            and value.shape[:1] == root.outputs[0].shape[:1]
        )
        return inside and free and same and (_computes_elements(maker) or maker.kind == "reshape")

    def _make(self, kind: str, members: Sequence[Op]) -> Group:
        """The group, with a copy of each reshape that makes an input of it."""
        inside = {id(op) for op in members}
        body: list[Op] = []
        for op in members:
            if op.kind != "reshape":
                op.inputs = [self._reshaped(value, body) for value in op.inputs]
            body.append(op)
        body = in_order(body)
        made = unique([v for op in body for v in op.outputs])
        inner = {id(v) for v in made}
        inputs = unique([v for op in body for v in op.inputs if id(v) not in inner])
        outputs = [v for v in made if self._read_outside(v, inside)]
        return Group("group", inputs, outputs, {}, body[0].source, group=kind, body=body)

    def _reshaped(self, value: Value, body: list[Op]) -> Value:
        """The value; if it comes from a reshape that belongs to no group, a copy of that in `body`."""
        maker = self.matcher.producers.get(id(value))
        if maker is None or maker.kind != "reshape" or id(maker) in self.owned:
            return value
        source = self._reshaped(maker.inputs[0], body)
        copy = self.rewriter.like(value, value.name)
        body.append(Op("reshape", [source], [copy], maker.attrs, maker.source))
        return copy

    def _read_outside(self, value: Value, inside: set[int]) -> bool:
        """Some group reads it, if need be through reshapes that belong to the readers."""
        if id(value) in self.matcher.outputs:
            return True
        for reader in self.matcher.consumers.get(id(value), []):
            if id(reader) in inside:
                continue
            if id(reader) in self.owned or self._read_outside(reader.outputs[0], inside):
                return True
        return False


def _computes_elements(op: Op) -> bool:
    return lookup(op.kind).elementwise or op.kind in ("split", "concat")
