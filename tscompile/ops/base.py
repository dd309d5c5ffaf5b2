"""What the registry knows of an op. Passes ask an `OpDef`; they never name ops one by one (but `fuse`, whose
patterns are data)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from tscompile.ir import DTYPES, Attr, Dim, Op, Shape, Sym, Value, Weight
from tscompile.mesh import Mesh
from tscompile.placement import Shard
from tscompile.recipe import Recipe

Attrs = Mapping[str, Attr]
Sizes = Mapping[str, int]  # symbolic dims' sizes, for costs


class ShapeError(Exception):
    """The inputs do not fit the op. Capture turns it into a CompileError, the verifier into an
    InternalError."""


class Type(NamedTuple):
    """What an op's rule says of one output."""

    shape: Shape
    dtype: str
    state: bool = False


class Slot(NamedTuple):
    """One input. dtype: "f32", "i32", "any", "storage" (what the plan stores: f32 or bf16, and `precision`
    rounds to it), or "state" (a KV cache of the plan's dtype). A variadic slot is last and takes one or
    more; one that is optional is last and takes one or none."""

    name: str
    dtype: str
    variadic: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Rule:
    """Placement in factor form, e.g. Rule("t k, n k -> t n"). Dims of one factor are sharded together; a
    factor that no output has is reduced: sharding it makes the outputs Partial(reduce). `.` is a dim that
    cannot be sharded. `e*t` is the dim of rows that are routed, each from a token to an expert: sharded by
    its first factor a rank has the rows of its experts, by its second those of its tokens.

    sizes: what a factor's size is when it is not the dim's (a dim of H*D elements that splits by whole
    heads). partial: sets of inputs that may be Partial(sum) together, the rest replicated, and make every
    output Partial(sum). repeats: inputs whose dims may have each part repeated in place without the op giving
    anything else (KV heads, each read by a group of heads). looked_up: factors whose elements are read by
    index alone, so that more of them change nothing. owned: the factor of the tokens that a KV cache holds;
    sharded by sequence, every rank's cache has its own sequences' tokens. context: the factor of the parts
    that it holds each sequence's context in; sharded, every rank's cache has its own parts. counted: the
    factor of the tokens that something counts by expert. Sharded, what lacks it is each rank's term of the
    sum: outputs, as always, and inputs of i32 too.
    """

    text: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    reduce: str = "sum"
    partial: tuple[frozenset[int], ...] = ()
    repeats: frozenset[int] = frozenset()
    looked_up: frozenset[str] = frozenset()
    owned: str = ""
    context: str = ""
    counted: str = ""

    @property
    def inputs(self) -> list[list[str]]:
        return [dims.split() for dims in self.text.split("->")[0].split(",")]

    @property
    def outputs(self) -> list[list[str]]:
        return [dims.split() for dims in self.text.split("->")[1].split(",")]

    @property
    def factors(self) -> list[str]:
        """Of the inputs, in order of first use."""
        names = [name for dims in self.inputs for name in dims if name != "."]
        return list(dict.fromkeys(factor for name in names for factor in name.split("*")))


def sharded_by(dims: Sequence[str], factor: str) -> Shard | None:
    """How a value lies whose dims a rule names so, if `factor` is sharded; None if it has none of it."""
    for dim, name in enumerate(dims):
        if factor in name.split("*"):
            return Shard(dim, "" if name.split("*")[0] == factor else "T")
    return None


@dataclass(frozen=True)
class RankContext:
    """Where a reference runs: one rank of a mesh. tokens: the first and the end of those of the step's that
    the op works on, if they are sharded."""

    mesh: Mesh
    rank: int
    tokens: tuple[int, int] | None = None

    def coord(self, axis: str) -> int:
        return self.mesh.coords(self.rank)[axis]


Infer = Callable[[Sequence[Value], Attrs], list[Type]]
Factors = Callable[[Sequence[Value], Sequence[Value], Attrs], Rule]
Reference = Callable[[RankContext, "list[Any]", Attrs], "list[Any]"]
Across = Callable[["list[list[Any]]", Attrs, "list[int] | None"], "list[Any]"]
Flops = Callable[[Sequence[Value], Sequence[Value], Attrs, Sizes], int]
Localize = Callable[[Attrs, Sequence[Value], Mapping[str, str]], dict[str, Attr]]


class Expansion(Protocol):
    """What an op's expansion is written with."""

    def emit(self, kind: str, inputs: Sequence[Value], attrs: Mapping[str, Attr], name: str) -> Value:
        """The output of a new op, which is called `name` under the module's path."""

    def weight(self, name: str, shape: tuple[int, ...], recipe: Recipe) -> Weight:
        """A new weight."""


Expand = Callable[[Expansion, Op], Value]


@dataclass(frozen=True)
class OpDef:
    """One op.

    attrs: name -> type; all must be there. optional: those that may be missing. infer: shape and dtype rule.
    factors: placement rule. reference: one rank's torch arithmetic, f32 unless an output is cast. across: for
    collectives, the inputs of one axis's ranks in order (and where their parts of what is given begin, if
    they are not equal) -> what each is given; of a rank of another stage, None.
    exchanges: of a collective, whether ranks wait for each other. elementwise: each output element depends on
    the same element of each input (equal shapes, or a suffix that is broadcast). coordinate: the attr that
    names the mesh axis on which the op depends on its rank's coordinate, or "" where it does not. flops and
    bytes: for sizes of the symbolic dims. localize: attrs of one rank, given local outputs and
    {factor: axis}. expand: the other ops that compute it, for an op that a model file may say and no kernel
    does; the value that takes its output's place.
    """

    name: str
    inputs: tuple[Slot, ...]
    infer: Infer
    factors: Factors
    attrs: Mapping[str, type] = field(default_factory=dict)
    optional: Mapping[str, type] = field(default_factory=dict)
    reference: Reference | None = None
    across: Across | None = None
    expand: Expand | None = None
    exchanges: bool = False
    elementwise: bool = False
    coordinate: str = ""
    flops: Flops = lambda inputs, outputs, attrs, sizes: sum(elements(v.shape, sizes) for v in outputs)
    bytes: Flops = lambda inputs, outputs, attrs, sizes: num_bytes([*inputs, *outputs], sizes)
    localize: Localize = lambda attrs, outputs, axes: dict(attrs)

    def slot(self, index: int) -> Slot:
        """The slot of the index-th input."""
        return self.inputs[min(index, len(self.inputs) - 1)]


REGISTRY: dict[str, OpDef] = {}


def register(definition: OpDef) -> None:
    assert definition.name not in REGISTRY, definition.name
    REGISTRY[definition.name] = definition


def size_of(dim: Dim, sizes: Sizes) -> int:
    return dim.size(sizes) if isinstance(dim, Sym) else dim


def elements(shape: Shape, sizes: Sizes) -> int:
    return math.prod(size_of(dim, sizes) for dim in shape)


def num_bytes(values: Sequence[Value], sizes: Sizes) -> int:
    """Bytes of `values`, each read or written once. A KV state counts nothing: the op that reads it says
    what."""
    return sum(elements(v.shape, sizes) * DTYPES[v.dtype] for v in values if not v.state)


def ints(shape: Shape) -> tuple[int, ...]:
    """A shape that has no symbolic dim."""
    result = tuple(dim for dim in shape if isinstance(dim, int))
    assert len(result) == len(shape), shape
    return result


def text_of(shape: Shape) -> str:
    return "[" + ", ".join(str(dim) for dim in shape) + "]"


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise ShapeError(message)


def integer(attrs: Attrs, name: str) -> int:
    value = attrs[name]
    assert isinstance(value, int)
    return value


def number(attrs: Attrs, name: str) -> float:
    value = attrs[name]
    assert isinstance(value, (int, float))
    return float(value)


def integers(attrs: Attrs, name: str) -> tuple[int, ...]:
    value = attrs[name]
    assert isinstance(value, tuple)
    return value
