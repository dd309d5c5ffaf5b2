"""The inverse of the printer; the grammar is there. For tests, tools, and graphs kept as text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from tscompile.errors import Source
from tscompile.ir import DTYPES, Dim, Graph, Group, Op, Sym, Value, Weight
from tscompile.mesh import Mesh
from tscompile.placement import Placement, Replicate, parse_placement
from tscompile.recipe import (
    Arange,
    Checkpoint,
    Concat,
    Interleave,
    Pad,
    Recipe,
    Repeat,
    RopeTable,
    ShardOf,
    Slice,
    Stack,
    View,
)

_TOKEN = re.compile(
    r"""(?P<space>[ \t]+)|(?P<newline>\n)|\#[ ](?P<source>[^\n]*:\d+)|(?P<string>"(?:[^"\\\n]|\\.)*")
    |(?P<number>-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![A-Za-z_]))|(?P<name>[A-Za-z_][A-Za-z0-9_.\-]*)|(?P<mark>[%@(){}\[\]:,;=+*/])""",
    re.VERBOSE,
)


class ParseError(ValueError):
    """The text is not a graph: the line, what was found and what was wanted."""


class Token(NamedTuple):
    kind: str
    text: str
    line: int


def parse(text: str) -> Graph:
    """A graph from its text. ParseError names the line."""
    return _Parser(_tokens(text)).graph()


def _tokens(text: str) -> list[Token]:
    tokens, at, line = [], 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ParseError(f"line {line}: {text[at]!r} begins no token")
        kind = str(match.lastgroup)
        if kind == "newline":
            line += 1
        elif kind != "space":
            tokens.append(Token(kind, match[kind], line))
        at = match.end()
    return [*tokens, Token("end", "the end", line)]


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.values: dict[str, Value] = {}
        self.mesh = Mesh()

    # --- tokens ---

    @property
    def next(self) -> Token:
        return self.tokens[self.at]

    def fail(self, wanted: str) -> ParseError:
        return ParseError(f"line {self.next.line}: found {self.next.text!r}, wanted {wanted}")

    def take(self, kind: str, text: str | None = None) -> str:
        token = self.next
        if token.kind != kind or (text is not None and token.text != text):
            raise self.fail(repr(text) if text else f"a {kind}")
        self.at += 1
        return token.text

    def accept(self, text: str) -> bool:
        if self.next.kind in ("mark", "name") and self.next.text == text:
            self.at += 1
            return True
        return False

    def integer(self) -> int:
        text = self.take("number")
        if not re.fullmatch(r"-?\d+", text):
            self.at -= 1
            raise self.fail("an integer")
        return int(text)

    # --- statements ---

    def graph(self) -> Graph:
        self.take("name", "graph")
        name = self.take("name")
        self.mesh = self.mesh_axes()
        graph = Graph(name, self.mesh)
        self.take("mark", "{")
        while not self.accept("output"):
            if self.accept("input"):
                graph.inputs.append(self.define("%"))
            elif self.accept("weight"):
                graph.weights.append(self.weight())
            else:
                graph.ops.append(self.op())
        graph.outputs = self.uses()
        self.take("mark", "}")
        self.take("end")
        return graph

    def mesh_axes(self) -> Mesh:
        self.take("name", "mesh")
        self.take("mark", "(")
        axes = []
        while not self.accept(")"):
            axis = self.take("name")
            self.take("mark", "=")
            axes.append((axis, self.integer()))
            self.accept(",")
        return Mesh(tuple(axes))

    def weight(self) -> Weight:
        value = self.define("@")
        self.take("mark", "=")
        weight = Weight(value.name, value.shape, value.dtype, False, value.placement, recipe=self.recipe())
        self.values["@" + weight.name] = weight
        return weight

    def op(self) -> Op:
        outputs = [self.define("%")]
        while self.accept(","):
            outputs.append(self.define("%"))
        self.take("mark", "=")
        kind = self.take("name")
        self.take("mark", "(")
        inputs = self.uses() if self.next.text in ("%", "@") else []
        attrs = self.attrs()
        self.take("mark", ")")
        if not kind.startswith("group."):
            return Op(kind, inputs, outputs, attrs, self.source())
        self.take("mark", "{")
        source, body = self.source(), []
        while not self.accept("}"):
            body.append(self.op())
        return Group("group", inputs, outputs, {}, source, group=kind.removeprefix("group."), body=body)

    def source(self) -> Source | None:
        if self.next.kind != "source":
            return None
        file, _, line = self.take("source").rpartition(":")
        return Source(file, int(line))

    # --- values and types ---

    def define(self, mark: str) -> Value:
        """A value's name and type. A group's output is named twice, by the group and in its body: one
        value."""
        self.take("mark", mark)
        name = self.take("name")
        self.take("mark", ":")
        state = self.accept("state")
        dtype = self.take("name")
        if dtype not in DTYPES:
            self.at -= 1
            raise self.fail(f"a dtype ({', '.join(DTYPES)})")
        self.take("mark", "[")
        shape: list[Dim] = []
        while not self.accept("]"):
            shape.append(self.dim())
            self.accept(",")
        found = {axis: Replicate() for axis in self.mesh.names} | self.placements()
        value = Value(name, tuple(shape), dtype, state, tuple(found.values()))
        return self.values.setdefault(mark + name, value)

    def dim(self) -> Dim:
        if self.next.kind == "number":
            return self.integer()
        name = self.take("name")
        times = self.integer() if self.accept("*") else 1
        plus, over = self.integer() if self.accept("+") else 0, list[str]()
        while self.accept("/"):
            over.append(self.take("name"))
        return Sym(name, plus, times, tuple(over))

    def placements(self) -> dict[str, Placement]:
        found: dict[str, Placement] = {}
        while self.next.kind == "name" and self.next.text in self.mesh.names:
            axis = self.take("name")
            self.take("mark", ":")
            text = self.take("name")
            if self.accept("("):
                first = self.at
                self.at += 1
                while not self.accept(")"):
                    self.take("mark", ",")
                    self.take("name")
                text += "(" + "".join(token.text for token in self.tokens[first : self.at])
            try:
                found[axis] = parse_placement(text)
            except ValueError as error:
                raise ParseError(f"line {self.next.line}: {error}") from None
        return found

    def uses(self) -> list[Value]:
        values = [self.use()]
        while self.accept(","):
            values.append(self.use())
        return values

    def use(self) -> Value:
        mark = self.next.text
        if not (self.accept("%") or self.accept("@")):
            raise self.fail("a value")
        name = self.take("name")
        if mark + name not in self.values:
            self.at -= 1
            raise self.fail("a value that is defined above")
        return self.values[mark + name]

    # --- attrs and recipes ---

    def attrs(self) -> dict[str, Any]:
        attrs: dict[str, Any] = {}
        if self.accept(";"):
            while True:
                key = self.take("name")
                self.take("mark", "=")
                attrs[key] = self.literal()
                if not self.accept(","):
                    break
        return attrs

    def literal(self) -> Any:
        if self.next.kind == "string":
            return json.loads(self.take("string"))
        if self.next.kind == "number":
            text = self.take("number")
            return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
        if self.next.text in ("true", "false"):
            return self.take("name") == "true"
        self.take("mark", "[")
        items = []
        while not self.accept("]"):
            items.append(self.literal())
            self.accept(",")
        return tuple(items)

    def recipe(self) -> Recipe:
        kind = self.take("name")
        self.take("mark", "(")
        if kind == "checkpoint":
            name = json.loads(self.take("string"))
            self.take("mark", ")")
            return Checkpoint(name)
        parts = []
        while self.next.kind == "name":
            parts.append(self.recipe())
            self.accept(",")
        attrs = self.attrs()
        self.take("mark", ")")
        makers: dict[str, Callable[[], Recipe]] = {
            "concat": lambda: Concat(tuple(parts), **attrs),
            "interleave": lambda: Interleave(tuple(parts), **attrs),
            "stack": lambda: Stack(tuple(parts)),
            "slice": lambda: Slice(parts[0], **attrs),
            "view": lambda: View(parts[0], **attrs),
            "shard": lambda: ShardOf(parts[0], **attrs),
            "pad": lambda: Pad(parts[0], **attrs),
            "repeat": lambda: Repeat(parts[0], **attrs),
            "rope_table": lambda: RopeTable(**attrs),
            "arange": lambda: Arange(**attrs),
        }
        if kind in makers:
            return makers[kind]()
        raise ParseError(f"line {self.next.line}: no recipe {kind!r}")
