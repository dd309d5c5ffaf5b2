"""The graph: values (shape, dtype, placement) and ops in order.

Values are compared by identity; names are unique in a graph. A weight is a value with a recipe. After `fuse`
every op of the graph is a `Group`: a fused op whose body's ops refer to the same Value objects, so that

    group.inputs   the values from outside that the body reads, in order of first use
    group.outputs  the values that the body makes and something outside reads (or the graph gives)

Symbolic dims: T tokens of a step, S sequences (query_start is S+1), L rows whose logits are wanted, P pages a
row of the page table, R rows routed to experts (R*8: eight for each token). Values with `state` set are a
layer's KV cache, shape [num_kv_heads, head_dim], or [row] of latents: an op that takes one and gives one
updates it in place; it is never a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TypeAlias, cast

from tscompile.errors import CompileError, Source
from tscompile.mesh import Mesh
from tscompile.placement import Placements, Replicate, Stage
from tscompile.recipe import Recipe

DTYPES = {"f32": 4, "bf16": 2, "f16": 2, "i32": 4}  # bytes an element


@dataclass(frozen=True)
class Sym:
    """A symbolic dim, `name * times + plus`. It takes part in no other arithmetic: a model cannot depend on
    T. over: the mesh axes over which it is sharded; `mesh.token_starts` says who has which part, for all
    values alike.

    R is T as a dim of rows that are sorted by the expert that they are routed to. Who owns them is settled in
    one of two ways. By expert it is ragged: a rank has the rows of its own experts, however many those are
    (R * times is the most). By token, `over` an axis, a rank has those of its own tokens: R*8/dp.
    """

    name: str
    plus: int = 0
    times: int = 1
    over: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.name}*{self.times}" if self.times != 1 else self.name
        return "/".join([f"{text}+{self.plus}" if self.plus else text, *self.over])

    @property
    def ragged(self) -> bool:
        """A dim of rows that are routed: by expert, ranks have as many of it as their experts are chosen."""
        return self.name == "R"

    def size(self, sizes: Mapping[str, int]) -> int:
        """`sizes`: of T, S, L and P, and of axes: of a dim that is sharded, the largest part. KeyError for a
        dim that it does not know."""
        whole = sizes["T" if self.ragged else self.name]
        part = -(-whole // math.prod(sizes.get(axis, 1) for axis in self.over))
        return part * self.times + self.plus

    def _no_arithmetic(self, *_: object) -> int:
        raise CompileError(
            f"arithmetic on the symbolic dim {self}: its size is known only when a step runs. "
            "Use -1 in view or reshape, or keep the dim as it is"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _no_arithmetic
    __floordiv__ = __truediv__ = __mod__ = __lt__ = __gt__ = __le__ = __ge__ = __index__ = __int__ = (
        _no_arithmetic
    )


Dim: TypeAlias = int | Sym
Shape: TypeAlias = tuple[Dim, ...]
Attr: TypeAlias = int | float | str | bool | tuple[int, ...]

# The batch arrays of csrc/launch_abi.h: graph inputs that a kernel reads from ts_batch, never from an
# argument.
BATCH_ARRAYS: dict[str, Shape] = {
    "token_ids": (Sym("T"),),
    "positions": (Sym("T"),),
    "slots": (Sym("T"),),
    "query_start": (Sym("S", 1),),
    "context_len": (Sym("S"),),
    "page_table": (Sym("S"), Sym("P")),
    "logit_rows": (Sym("L"),),
}

# What a group becomes: one kernel from the template of the same name. Bodies, [optional], inputs -> outputs.
# Every body may hold reshapes, which move nothing: values are contiguous, row-major.
GROUP_KINDS = {
    "embed": "embedding: token_ids, table -> f32[T,H]",
    "rms_norm": "[add,] rms_norm [, cast]: x (, delta), weight -> (f32 x + delta,) normed; over the last dim",
    "linear": "[gather_rows,] linear [, add bias] [, swiglu] [, cast]: "
    "x (, logit_rows), weight (, bias) -> [T,N] or [L,N]",
    "qkv_write": "split, [rms_norm q] [rope q] [cast q] [rms_norm k] [rope k] [cast k] [cast v] kv_write: "
    "qkv, then in order of use q's norm, table, positions, k's norm, state, slots -> q, state",
    "attention": "attention [, cast]: q, state, batch arrays -> [T,Hq*D]",
    "head_linear": "[split, [cast,]] head_linear [, rope, concat] [, cast]: x[T,H,K], or [T,H,K+R] of which "
    "the rest is rotated, weight[H,N,K] (, table, positions) -> [T,H,N] or [T,H,N+R]",
    "latent_write": "[split, rms_norm, rope, concat,] [cast,] latent_write: row (, norm, table, positions), "
    "state, slots -> state",
    "latent_attention": "latent_attention [, cast]: q[T,H,row], state, batch arrays -> [T,H,rank]",
    "merge_parts": "merge_parts [, cast]: of each part of the context, [T,C,H,D+2] -> [T,H,D]",
    "gather_rows": "gather_rows: x[T,H], logit_rows -> [L,H]",
    "route": "route: logits[T,E] (, bias) -> ids[T,k], weights[T,k]",
    "sort_routes": "sort_routes: ids[T,k], numbers[E] -> order[R], counts[E]",
    "experts": "[dispatch,] expert_linear [, swiglu] [, cast] [, combine]: x[T,K] and order, or rows[R,K]; "
    "counts, weight[E,N,K] (, order, weights) -> [R,N] or [T,N]",
    # Where rows move to the ranks of their experts, and back:
    "dispatch": "dispatch: x[T,K], order[R] -> [R,K]",
    "combine": "combine: rows[R,N], order[R], weights[T,k] -> f32[T,N]",
    "elementwise": "a tree of elementwise ops (OpDef.elementwise) of one number of elements a row, whose "
    "leaves may be a split of the last dim (one part is read), or a concat of it: inputs -> one output",
    # What is left where qkv_write does not match (slower, still right):
    "rope": "rope [, cast]: x[T,H,D], table, positions -> [T,H,D]",
    "kv_write": "[cast k,] [cast v,] kv_write: k, v, state, slots, in order of use -> state",
    # Between ranks:
    "collective": "one collective of the registry: x -> x",
    # A collective in two, and between them what runs meanwhile:
    "start": "one collective: x -> x in flight",
    "finish": "finish: x in flight, what it is made of -> x",
    "all_reduce_rms_norm": "all_reduce, [add,] rms_norm [, cast]: partial (, x), weight -> (f32 x + sum "
    "over the ranks,) normed",
}


@dataclass(eq=False, slots=True)
class Value:
    """Shape [dims], dtype, one placement a mesh axis (empty before `propagate`: replicated everywhere)."""

    name: str
    shape: Shape
    dtype: str
    state: bool = False
    placement: Placements = ()

    @property
    def row_elements(self) -> int:
        """Elements of one row: the product of the dims that are not symbolic."""
        return math.prod(dim for dim in self.shape if isinstance(dim, int))

    @property
    def routed(self) -> bool:
        """Whether its rows are routes to experts."""
        return any(isinstance(dim, Sym) and dim.ragged for dim in self.shape)

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(eq=False, slots=True)
class Weight(Value):
    """A value made from the checkpoint by `recipe`, cast to `dtype`. Shape: ints only."""

    recipe: Recipe = field(kw_only=True)

    def __repr__(self) -> str:
        return f"@{self.name}"


@dataclass(eq=False, slots=True)
class Op:
    """`kind` names an entry of the op registry (tscompile/ops)."""

    kind: str
    inputs: list[Value]
    outputs: list[Value]
    attrs: dict[str, Attr] = field(default_factory=dict)
    source: Source | None = None

    @property
    def name(self) -> str:
        """Unique in the graph: the first output's name, which begins with the module's path."""
        return self.outputs[0].name


@dataclass(eq=False, slots=True)
class Group(Op):
    """A fused op; kind is "group". `group` is one of GROUP_KINDS."""

    group: str = field(kw_only=True)
    body: list[Op] = field(kw_only=True)

    def launch_args(self) -> list[Value]:
        """What the kernel takes as ts_args.ptr, in order: inputs that are not batch arrays (buffers, weights,
        the layer's KV state), then outputs that are not states."""
        arguments = [v for v in self.inputs if v.name not in BATCH_ARRAYS]
        return arguments + [v for v in self.outputs if not v.state]


@dataclass(eq=False, slots=True)
class Graph:
    """Inputs: the batch arrays in use, then the KV states, layer by layer. Weights and ops in order of first
    use."""

    name: str
    mesh: Mesh = field(default_factory=Mesh)
    inputs: list[Value] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)

    @property
    def states(self) -> list[Value]:
        """The KV caches, layer by layer: layer i of the program's "kv" is states[i]."""
        return [v for v in self.inputs if v.state]

    def groups(self) -> list[Group]:
        """The ops after `fuse`, every one a group."""
        groups = [op for op in self.ops if isinstance(op, Group)]
        assert len(groups) == len(self.ops), "groups() before fuse"
        return groups

    def copy(self) -> Graph:
        """With values and ops of its own. Before `fuse`: ops, no groups."""
        made = {id(value): copy(value) for value in self.values()}
        weights = [made[id(w)] for w in self.weights]
        ops = [
            Op(
                op.kind,
                [made[id(v)] for v in op.inputs],
                [made[id(v)] for v in op.outputs],
                dict(op.attrs),
                op.source,
            )
            for op in self.ops
        ]
        inputs, outputs = ([made[id(v)] for v in values] for values in (self.inputs, self.outputs))
        return Graph(self.name, self.mesh, inputs, cast(list[Weight], weights), ops, outputs)

    def values(self) -> Iterator[Value]:
        """Inputs, weights, and every op's outputs, bodies included."""
        yield from self.inputs
        yield from self.weights
        for op in self.ops:
            if isinstance(op, Group):
                for inner in op.body:
                    yield from inner.outputs
            else:
                yield from op.outputs


def unique(values: Sequence[Value]) -> list[Value]:
    """Each value once, in order of first appearance."""
    return list({id(v): v for v in values}.values())


def replicated(mesh: Mesh) -> Placements:
    return (Replicate(),) * len(mesh.axes)


def wanted_of_outputs(mesh: Mesh) -> Placements:
    """Where a model's outputs must lie: whole, on the first stage, whose first rank samples."""
    stages = mesh.stage_axis
    return tuple(Stage(0) if index == stages else Replicate() for index in range(len(mesh.axes)))


def stage_of(value: Value) -> int | None:
    """The pipeline stage whose ranks alone have `value`; None if all have it."""
    return next((p.index for p in value.placement if isinstance(p, Stage)), None)
