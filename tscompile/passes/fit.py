"""fit: dims that the ranks do not divide are made such that they do.

Takes a graph in global shapes. Gives one that computes the same: a vocabulary is padded with zero rows (its
logits lie beyond vocab_size, where nobody reads), and KV heads fewer than ranks are repeated, so that each
rank has one. Which weights that changes follows from the ops' rules, dim by dim, up to the weights; it stands
in their recipes. What was done is in build.notes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tscompile.build import Build
from tscompile.errors import CompileError
from tscompile.ir import Graph, Op, Value, Weight
from tscompile.match import Matcher
from tscompile.ops import Rule, lookup
from tscompile.recipe import Pad, Recipe, Repeat
from tscompile.sharding import divisors, factor_sizes, rule_of

AXIS = "tp"  # the axis whose ranks share heads and vocabulary


def run(build: Build) -> None:
    ranks = dict(build.mesh.axes).get(AXIS, 1)
    if ranks > 1:
        build.notes += repeat_heads(build.graph, ranks) + pad_vocabulary(build.graph, ranks)


# --- KV heads ---


def repeat_heads(graph: Graph, ranks: int) -> list[str]:
    """Repeats KV heads until `ranks` divides them. CompileError if no number of repeats does."""
    said: Counter[int] = Counter()
    for write in [op for op in graph.ops if any(v.state for v in op.outputs)]:
        dims = rule_of(write).outputs[0]
        dim = next((i for i, name in enumerate(dims) if name != "."), None)
        if dim is None:  # a cache without heads: every rank has it whole
            continue
        state = write.outputs[0]
        heads = state.shape[dim]
        assert isinstance(heads, int)
        if heads % ranks == 0:
            continue
        queries = _query_heads(graph, state, heads)
        if ranks % heads or queries % ranks:
            legal = [n for n in divisors(queries) if 0 in (heads % n, n % heads)]
            raise CompileError(
                f"{AXIS}={ranks} does not divide the {heads} KV heads of {state!r}, nor can each lie on as "
                f"many ranks as others do, with an equal part of the {queries} query heads: {AXIS} can be "
                f"{', '.join(map(str, legal))}",
                write.source,
            )
        found = _Linked(Matcher(graph), heads, repeated=True).spread(state, dim)
        if found.stuck:
            raise CompileError(
                f"{AXIS}={ranks} is more than the {heads} KV heads of {state!r}, and they cannot be "
                f"repeated: {found.stuck}. {AXIS} can be {', '.join(map(str, divisors(heads)))}",
                write.source,
            )
        found.repeat(ranks // heads)
        said[heads] += 1
    return [
        f"{AXIS}={ranks}: each of the {heads} KV heads lies on {ranks // heads} ranks, in {count} "
        f"layer{'s' * (count > 1)}"
        for heads, count in said.items()
    ]


def _query_heads(graph: Graph, state: Value, heads: int) -> int:
    """What else the readers of a KV cache split with its heads: the most parts that all allow."""
    for op in graph.ops:
        rule = rule_of(op)
        for index, value in enumerate(op.inputs):
            if value is state and index in rule.repeats:
                name = next(name for name in rule.inputs[index] if name != ".")
                dims = zip(op.inputs, rule.inputs, strict=True)
                sizes = [v.shape[d.index(name)] for v, d in dims if name in d and v is not state]
                return min(size for size in sizes if isinstance(size, int))
    return heads


# --- vocabulary ---


def pad_vocabulary(graph: Graph, ranks: int) -> list[str]:
    """Pads the tables that token ids look up, and the head's, to a multiple of `ranks` rows."""
    starts = [(v, len(v.shape) - 1) for v in graph.outputs]
    for op in graph.ops:
        rule = rule_of(op)
        for value, dims in zip(op.inputs, rule.inputs, strict=False):
            starts += [(value, dim) for dim, name in enumerate(dims) if name in rule.looked_up]
    said = []
    for value, dim in starts:
        size = value.shape[dim]
        if not isinstance(size, int) or size % ranks == 0:
            continue
        found, padded = _Linked(Matcher(graph), size).spread(value, dim), -(-size // ranks) * ranks
        if found.stuck:
            said.append(f"{AXIS}={ranks}: the {size} of {value!r} cannot be padded: {found.stuck}")
            continue
        names = [repr(v) for v, _ in found.dims.values() if isinstance(v, Weight)]
        found.pad(padded)
        said.append(f"{AXIS}={ranks}: {', '.join(names)} padded with zeros from {size} to {padded}")
    return said


# --- dims that are one ---


@dataclass
class _Linked:
    """The dims that must change together, by the ops' rules, each of `parts` parts, which are to be repeated,
    or padded. stuck: why they cannot, or nothing."""

    matcher: Matcher
    parts: int
    repeated: bool = False
    dims: dict[tuple[int, int], tuple[Value, int]] = field(default_factory=dict)
    ops: dict[int, Op] = field(default_factory=dict)
    stuck: str = ""

    def spread(self, value: Value, dim: int) -> _Linked:
        todo = [(value, dim)]
        while todo:
            value, dim = todo.pop()
            if (id(value), dim) in self.dims:
                continue
            self.dims[id(value), dim] = (value, dim)
            if self.repeated and id(value) in self.matcher.outputs:
                self.stuck = f"{value!r} is an output of the model"
            maker = self.matcher.producers.get(id(value))
            for op in [*([maker] if maker else []), *self.matcher.consumers.get(id(value), [])]:
                self.ops[id(op)] = op
                todo += self._through(op, value, dim)
        return self

    def _through(self, op: Op, value: Value, dim: int) -> list[tuple[Value, int]]:
        rule, found = rule_of(op), list[tuple[Value, int]]()
        places = [*zip(op.inputs, rule.inputs, strict=False), *zip(op.outputs, rule.outputs, strict=True)]
        for index, (other, names) in enumerate(places):
            if other is not value:
                continue
            name = names[dim]
            if index in rule.repeats and self.repeated and value.shape[dim] == self.parts:
                continue
            if self._fixed(op, rule, name) or index in rule.repeats:
                self.stuck = f"{op.kind} -> {op.outputs[0]!r}{_at(op)} needs dim {dim} of {value!r} as it is"
                continue
            found += [(v, i) for v, dims in places for i, other in enumerate(dims) if other == name]
        return found

    def _fixed(self, op: Op, rule: Rule, name: str) -> bool:
        """Whether the op gives something else if dims of the factor `name` are changed."""
        looked_up = name in rule.looked_up
        summed = not any(name in dims for dims in rule.outputs) and not looked_up
        divides = not any(size % self.parts for size in factor_sizes(op, rule, name))
        return name == "." or summed or not divides or (looked_up and self.repeated)

    def repeat(self, times: int) -> None:
        """Every part of every dim, `times` times in place."""
        for value, dim in self.dims.values():
            size = value.shape[dim]
            assert isinstance(size, int)
            recipe = Repeat(value.recipe, dim, self.parts, times) if isinstance(value, Weight) else None
            self._change(value, dim, size * times, recipe)
        self._attrs()

    def pad(self, size: int) -> None:
        for value, dim in self.dims.values():
            recipe = Pad(value.recipe, dim, size) if isinstance(value, Weight) else None
            self._change(value, dim, size, recipe)
        self._attrs()

    def _change(self, value: Value, dim: int, size: int, recipe: Recipe | None) -> None:
        value.shape = (*value.shape[:dim], size, *value.shape[dim + 1 :])
        if isinstance(value, Weight) and recipe is not None:
            value.recipe = recipe

    def _attrs(self) -> None:
        for op in self.ops.values():
            op.attrs = lookup(op.kind).localize(op.attrs, op.outputs, {})


def _at(op: Op) -> str:
    return f" ({op.source})" if op.source else ""
