"""A little pattern language over the graph, for `fuse`: patterns are data, and a mismatch says why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from tscompile.ir import Graph, Op, Value, Weight


@dataclass(frozen=True)
class Bind:
    """Any value. The same name twice: the same value."""

    name: str


@dataclass(frozen=True)
class Parameter:
    """A weight."""

    name: str


@dataclass(frozen=True)
class Node:
    """A value that an op of `kind` makes. `swap`: its two inputs may come in either order. `name`, if given,
    binds the op."""

    kind: str
    inputs: tuple[Pattern, ...]
    swap: bool = False
    name: str = ""


@dataclass(frozen=True)
class Through:
    """A value that comes from `origin` through ops of `kinds`, each at most once, nearest first; reshapes
    anywhere."""

    kinds: tuple[str, ...]
    origin: Pattern
    name: str  # binds the list of ops, farthest first


@dataclass(frozen=True)
class Either:
    """The first of two that matches."""

    first: Pattern
    second: Pattern


Pattern: TypeAlias = Bind | Parameter | Node | Through | Either


def projection(name: str) -> Pattern:
    """linear(x, weight), with or without bias."""
    linear = Node("linear", (Bind("x"), Parameter(name)), name=f"{name}.linear")
    return Either(Node("add", (linear, Parameter(f"{name}.bias")), name=f"{name}.add"), linear)


class Mismatch(Exception):
    """Why a pattern does not match."""


@dataclass
class Found:
    """What a match bound."""

    values: dict[str, Value] = field(default_factory=dict)
    ops: dict[str, Op] = field(default_factory=dict)
    chains: dict[str, list[Op]] = field(default_factory=dict)
    inside: list[Op] = field(default_factory=list)  # every op of the match


class Matcher:
    """Matches values of one graph. Who rewrites it says what goes and what comes."""

    def __init__(self, graph: Graph) -> None:
        self.producers: dict[int, Op] = {}  # id(value) -> the op that makes it
        self.consumers: dict[int, list[Op]] = {}  # id(value) -> the ops that read it
        self.outputs = {id(v) for v in graph.outputs}
        for op in graph.ops:
            self.add(op)

    def add(self, op: Op) -> None:
        for value in op.outputs:
            self.producers[id(value)] = op
        for key in dict.fromkeys(id(value) for value in op.inputs):
            self.consumers.setdefault(key, []).append(op)

    def remove(self, op: Op) -> None:
        for value in op.outputs:
            if self.producers.get(id(value)) is op:
                del self.producers[id(value)]
        for key in dict.fromkeys(id(value) for value in op.inputs):
            self.consumers[key].remove(op)

    def match(self, pattern: Pattern, value: Value) -> Found:
        """Mismatch says why not. Values between the ops of a match have no other reader; `value` itself
        may."""
        found = Found()
        self._match(pattern, value, found, root=True)
        return found

    def single(self, value: Value) -> bool:
        """One op reads it, once, and it is no output of the graph."""
        readers = self.consumers.get(id(value), [])
        once = len(readers) == 1 and sum(v is value for v in readers[0].inputs) == 1
        return once and id(value) not in self.outputs

    def _match(self, pattern: Pattern, value: Value, found: Found, root: bool = False) -> None:
        match pattern:
            case Bind(name):
                if found.values.setdefault(name, value) is not value:
                    raise Mismatch(f"{name} is {found.values[name]!r} in one place, {value!r} in another")
            case Parameter(name):
                if not isinstance(value, Weight):
                    raise Mismatch(f"{name} is {value!r}, wanted a weight")
                found.values[name] = value
            case Either(first, second):
                trial = Found(dict(found.values), dict(found.ops), dict(found.chains), list(found.inside))
                try:
                    self._match(first, value, trial, root)
                except Mismatch:
                    self._match(second, value, found, root)
                else:
                    vars(found).update(vars(trial))
            case Through(kinds, origin, name):
                chain: list[Op] = []
                for kind in kinds:
                    value = self._skip(value, "reshape", chain)
                    value = self._skip(value, kind, chain, once=True)
                value = self._skip(value, "reshape", chain)
                found.chains[name] = chain[::-1]
                found.inside += chain
                self._match(origin, value, found)
            case Node():
                self._match_node(pattern, value, found, root)

    def _match_node(self, pattern: Node, value: Value, found: Found, root: bool) -> None:
        op = self.producers.get(id(value))
        if op is None or op.kind != pattern.kind:
            raise Mismatch(f"{value!r} comes from {op.kind if op else 'outside'}, wanted {pattern.kind}")
        if not root and not self.single(value):
            raise Mismatch(f"{value!r} has {len(self.consumers.get(id(value), []))} readers, wanted one")
        found.inside.append(op)
        if pattern.name:
            found.ops[pattern.name] = op
        orders = [op.inputs, op.inputs[::-1]] if pattern.swap else [op.inputs]
        for attempt, inputs in enumerate(orders):
            trial = Found(dict(found.values), dict(found.ops), dict(found.chains), list(found.inside))
            try:
                for inner, given in zip(pattern.inputs, inputs, strict=False):
                    self._match(inner, given, trial)
            except Mismatch:
                if attempt == len(orders) - 1:
                    raise
            else:
                vars(found).update(vars(trial))
                return

    def _skip(self, value: Value, kind: str, chain: list[Op], once: bool = False) -> Value:
        """Past ops of `kind` that make `value` for one reader alone."""
        while (op := self.producers.get(id(value))) and op.kind == kind and self.single(value):
            chain.append(op)
            value = op.inputs[0]
            if once:
                break
        return value
