"""How an op may lie over the ranks of one mesh axis: its strategies, from the factor form of its placement
rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tscompile.errors import CompileError, InternalError
from tscompile.ir import Dim, Op, Shape, Sym, Value, Weight
from tscompile.mesh import by_position, by_sequence, by_stage
from tscompile.ops import Rule, lookup
from tscompile.ops.base import sharded_by, text_of
from tscompile.placement import Owned, Partial, Placement, Replicate, Shard, parse_placement

TOKENS = Sym("T")
Taken = frozenset[tuple[str, int]]


@dataclass(frozen=True)
class Strategy:
    """factor: what is sharded; empty if nothing is, or if sums pass through (some of `takes` are Partial).
    takes, gives: a placement an input and an output."""

    factor: str
    takes: tuple[Placement, ...]
    gives: tuple[Placement, ...]


# The layers of a model are alike: what was found for one op holds for all of its signature.
_known: dict[object, list[Strategy]] = {}
_chosen: dict[object, Strategy] = {}


def rule_of(op: Op) -> Rule:
    return lookup(op.kind).factors(op.inputs, op.outputs, op.attrs)


def strategies(op: Op, axis: str, ranks: int, taken: Taken = frozenset()) -> list[Strategy]:
    """All that the op's rule allows over `ranks` ranks; replicated comes first. A boundary has what its
    author said. taken: the factors that other axes shard, and into how many parts."""
    key = (signature(op), axis, ranks, taken)
    if key not in _known:
        _known[key] = _strategies(op, axis, ranks, taken)
    return _known[key]


def signature(op: Op) -> object:
    """Equal for ops whose strategies are the same."""
    types = tuple((v.shape, v.dtype, v.state, isinstance(v, Weight)) for v in (*op.inputs, *op.outputs))
    attrs = tuple((name, value) for name, value in op.attrs.items() if name != "module")
    return op.kind, len(op.inputs), types, attrs


def _strategies(op: Op, axis: str, ranks: int, taken: Taken) -> list[Strategy]:
    if op.kind == "boundary" and ranks > 1:
        return [Strategy("", (p,), (p,)) for p in _at_boundary(op, axis, ranks, tokens=not taken)]
    rule = rule_of(op)
    nothing = Strategy("", (Replicate(),) * len(op.inputs), (Replicate(),) * len(op.outputs))
    if ranks == 1:
        return [nothing]
    result = [nothing]
    for factor in rule.factors:
        parts = dict(taken).get(factor, 1)
        if (parts == 1 or _splits_further(op, rule, factor)) and _splits(
            op, rule, factor, axis, parts * ranks
        ):
            result.append(_sharded(op, rule, factor))
    for indices in rule.partial:
        if not any(isinstance(op.inputs[i], Weight) or op.inputs[i].dtype != "f32" for i in indices):
            takes = tuple(Partial() if i in indices else Replicate() for i in range(len(op.inputs)))
            result.append(Strategy("", takes, (Partial(),) * len(op.outputs)))
    return result


def rows_shared(op: Op, strategy: Strategy) -> Sym | None:
    """The symbolic dim that the strategy shards: of tokens, or of what goes with them."""
    values, places = (*op.inputs, *op.outputs), (*strategy.takes, *strategy.gives)
    for value, placed in zip(values, places, strict=True):
        if isinstance(placed, Shard):
            dim = value.shape[placed.dim]
            if isinstance(dim, Sym) and (placed.owner or not dim.ragged):
                return dim
    return None


def factor_sizes(op: Op, rule: Rule, factor: str) -> list[int]:
    """The sizes that ranks must divide to shard `factor`: [1] (so that none does) if a dim of it is
    symbolic; a ragged one divides as its experts do."""
    sizes = []
    for dim, placed in _dims(op, rule, factor):
        if placed.owner or not (isinstance(dim, Sym) and dim.ragged):
            sizes.append(rule.sizes.get(factor, dim) if isinstance(dim, int) else 1)
    return [size if isinstance(size, int) else 1 for size in sizes]


def _dims(op: Op, rule: Rule, factor: str) -> list[tuple[Dim, Shard]]:
    """The dims of `factor`, and how its sharding places them."""
    places = [*zip(op.inputs, rule.inputs, strict=False), *zip(op.outputs, rule.outputs, strict=True)]
    found = [(value, sharded_by(dims, factor)) for value, dims in places]
    return [(value.shape[placed.dim], placed) for value, placed in found if placed]


def chosen(op: Op, axis: str, index: int, ranks: int) -> Strategy:
    """The strategy that the placements of the op's outputs and weights say, `index` being the axis's place in
    the mesh. Where two give the same (a sum through either factor of a product), the one that needs fewer of
    its inputs moved. Over stages: an op takes and gives all on its own, but what every rank has."""
    if by_stage(axis) and ranks > 1:
        stage = op.outputs[0].placement[index]
        found = (v.placement[index] for v in op.inputs)
        takes = tuple(p if p == Replicate() else stage for p in found)
        return Strategy("", takes, (stage,) * len(op.outputs))
    here = tuple(v.placement[index] for v in (*op.inputs, *op.outputs))
    key = (signature(op), axis, ranks, here)
    if key not in _chosen:
        _chosen[key] = _choose(op, axis, index, ranks)
    return _chosen[key]


def _choose(op: Op, axis: str, index: int, ranks: int) -> Strategy:
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


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _splits(op: Op, rule: Rule, factor: str, axis: str, ranks: int) -> bool:
    """Whether `ranks` ranks can share the factor out. Caches are shared out by sequence or by position, as
    the axis says, or else by heads."""
    if any(v.state for v in op.inputs):
        if by_sequence(axis) or by_position(axis):
            if factor != (rule.owned if by_sequence(axis) else rule.context):
                return False
        elif factor in (rule.owned, rule.context):
            return False
    if _whole(op, rule, factor):
        given = factor in (rule.owned, rule.counted) or all(sharded_by(d, factor) for d in rule.outputs)
        return given and all(p.owner or dim == TOKENS for dim, p in _dims(op, rule, factor))
    return all(size % ranks == 0 for size in factor_sizes(op, rule, factor))


def _whole(op: Op, rule: Rule, factor: str) -> bool:
    """Whether a dim of the factor is symbolic, and no expert settles who has what of it."""
    return any(isinstance(dim, Sym) and (p.owner or not dim.ragged) for dim, p in _dims(op, rule, factor))


def _splits_further(op: Op, rule: Rule, factor: str) -> bool:
    """Whether a factor may be shared out over more than one axis. Tokens may not, nor what ids look up."""
    return not _whole(op, rule, factor) and factor not in rule.looked_up


def _sharded(op: Op, rule: Rule, factor: str) -> Strategy:
    owned = factor in (rule.owned, rule.context)

    def placed(value: Value, dims: Sequence[str], otherwise: Placement) -> Placement:
        if value.state and owned:
            return Owned()
        return sharded_by(dims, factor) or otherwise

    counts = Partial() if factor == rule.counted else Replicate()
    takes = [
        placed(v, dims, counts if v.dtype == "i32" else Replicate())
        for v, dims in zip(op.inputs, rule.inputs, strict=False)
    ]
    gives = [placed(v, dims, Partial(rule.reduce)) for v, dims in zip(op.outputs, rule.outputs, strict=True)]
    return Strategy(factor, tuple(takes), tuple(gives))


def _at_boundary(op: Op, axis: str, ranks: int, *, tokens: bool) -> list[Placement]:
    """What the author said, of features: where that is Replicate, which ranks own which tokens is left to
    the search. tokens: whether no other axis shares them out."""
    text = _said(op)
    placement, dims = parse_placement(boundary_on(op, axis)), op.inputs[0].shape
    if isinstance(placement, Shard):
        _check_shard(op, axis, ranks, placement, dims)
        twice = [other for other, said in text.items() if said == str(placement) and other != axis]
        if twice:
            raise CompileError(
                f"{op.attrs['module']} says {placement} on {axis} and on {twice[0]}: wanted different dims "
                f"of {op.inputs[0]!r} {text_of(dims)}, as a dim is sharded over one axis at most",
                op.source,
            )
    if placement == Replicate() and tokens and TOKENS in dims:
        return [placement, Shard(dims.index(TOKENS))]
    return [placement]


def boundary_on(op: Op, axis: str) -> str:
    """The placement on the axis that a boundary's author said, as text."""
    return _said(op).get(axis, str(Replicate()))


def _said(op: Op) -> dict[str, str]:
    return dict(part.split(":") for part in str(op.attrs["placements"]).split())


def _check_shard(op: Op, axis: str, ranks: int, placement: Shard, dims: Shape) -> None:
    says = f"{op.attrs['module']} says {axis}:{placement}, but its value {op.inputs[0]!r} is {text_of(dims)}"
    known = [i for i, dim in enumerate(dims) if isinstance(dim, int)]
    if placement.dim not in known:
        legal = ", ".join(f"{axis}:S({i})" for i in known if int(str(dims[i])) % ranks == 0)
        raise CompileError(
            f"{says}: wanted a dim whose size is known ({legal or 'there is none that divides'}); which "
            "rank has which tokens is the compiler's to choose",
            op.source,
        )
    size = dims[placement.dim]
    assert isinstance(size, int)
    if size % ranks:
        fits = ", ".join(map(str, [n for n in divisors(size) if n <= 64]))
        raise CompileError(
            f"{says}: {axis}={ranks} does not divide {size}; {axis} can be {fits}",
            op.source,
        )
