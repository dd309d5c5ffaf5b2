"""How an op may lie over the ranks of one mesh axis: its strategies, from the factor form of its placement
rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tscompile.errors import CompileError, InternalError
from tscompile.ir import Op, Sym, Weight
from tscompile.ops import Rule, lookup
from tscompile.ops.base import text_of
from tscompile.placement import Partial, Placement, Replicate, Shard, parse_placement


@dataclass(frozen=True)
class Strategy:
    """factor: what is sharded; empty if nothing is, or if sums pass through (some of `takes` are Partial).
    takes, gives: a placement an input and an output."""

    factor: str
    takes: tuple[Placement, ...]
    gives: tuple[Placement, ...]


def strategies(op: Op, axis: str, ranks: int) -> list[Strategy]:
    """All that the op's rule allows over `ranks` ranks; replicated comes first. A boundary has one: what its
    author said."""
    if op.kind == "boundary" and ranks > 1:
        wanted = _annotated(op, axis)
        return [Strategy("", (wanted,), (wanted,))]
    rule = lookup(op.kind).factors(op.inputs, op.outputs, op.attrs)
    inputs = rule.inputs
    whole = (Replicate(),) * len(op.inputs)
    nothing = Strategy("", whole, (Replicate(),) * len(op.outputs))
    if ranks == 1:
        return [nothing]
    result: list[Strategy] = []
    for factor in dict.fromkeys(name for dims in inputs for name in dims if name != "."):
        if all(size % ranks == 0 for size in factor_sizes(op, rule, factor)):
            takes = tuple(_placed(dims, factor, Replicate()) for dims in inputs)
            gives = tuple(_placed(dims, factor, Partial(rule.reduce)) for dims in rule.outputs)
            result.append(Strategy(factor, takes, gives))
    if not result or not any(v.state for v in op.inputs):  # a KV cache is held whole only if it must be
        result.insert(0, nothing)
    for indices in rule.partial:
        if not any(isinstance(op.inputs[i], Weight) or op.inputs[i].dtype != "f32" for i in indices):
            takes = tuple(Partial() if i in indices else Replicate() for i in range(len(op.inputs)))
            result.append(Strategy("", takes, (Partial(),) * len(op.outputs)))
    return result


def factor_sizes(op: Op, rule: Rule, factor: str) -> list[int]:
    """The sizes that ranks must divide to shard `factor`: [1] (so that none does) if a dim of it is
    symbolic; a ragged one divides as its experts do."""
    sizes = []
    for value, dims in zip([*op.inputs, *op.outputs], [*rule.inputs, *rule.outputs], strict=False):
        for dim, name in zip(value.shape, dims, strict=True):
            if name == factor and not (isinstance(dim, Sym) and dim.ragged):
                sizes.append(rule.sizes.get(factor, dim) if isinstance(dim, int) else 1)
    return [size if isinstance(size, int) else 1 for size in sizes]


def chosen(op: Op, axis: str, index: int, ranks: int) -> Strategy:
    """The strategy that the placements of the op's outputs and weights say, `index` being the axis's place in
    the mesh. Where two give the same (a sum through either factor of a product), the one that needs fewer of
    its inputs moved."""
    gives = tuple(v.placement[index] for v in op.outputs)
    found = tuple(v.placement[index] for v in op.inputs)
    fits: list[tuple[int, int, Strategy]] = []
    for strategy in strategies(op, axis, ranks):
        fixed = all(
            found[i] == take
            for i, take in enumerate(strategy.takes)
            if isinstance(op.inputs[i], Weight) or op.inputs[i].state
        )
        if strategy.gives == gives and fixed:
            moved = sum(take != here for take, here in zip(strategy.takes, found, strict=True))
            fits.append((moved, len(fits), strategy))
    if not fits:
        raise InternalError(
            f"{op.kind} -> {op.outputs[0]!r}: no strategy gives {', '.join(map(str, gives))} on {axis}"
        )
    return min(fits)[2]


def _placed(dims: Sequence[str], factor: str, otherwise: Placement) -> Placement:
    return Shard(dims.index(factor)) if factor in dims else otherwise


def _annotated(op: Op, axis: str) -> Placement:
    text = dict(part.split(":") for part in str(op.attrs["placements"]).split())
    placement = parse_placement(text.get(axis, "R"))
    dims = op.inputs[0].shape
    if isinstance(placement, Shard) and (
        placement.dim >= len(dims) or not isinstance(dims[placement.dim], int)
    ):
        raise CompileError(
            f"{op.attrs['module']} says {axis}:{placement}, but its value is {text_of(dims)}: wanted a dim "
            "of it whose size is known (tokens cannot be sharded yet)",
            op.source,
        )
    return placement
