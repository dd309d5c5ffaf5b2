"""Every op of the registry: its reference gives what its shape rule says, and each factor of its placement
rule, sharded over ranks, gives the same numbers as one rank."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from tscompile.interpret import Interpreter
from tscompile.ir import Attr, Op, Sym, Value, Weight
from tscompile.mesh import Mesh, token_starts
from tscompile.ops import REGISTRY, lookup
from tscompile.ops.attention import KVCache
from tscompile.ops.base import RankContext
from tscompile.ops.elementwise import TORCH_DTYPES
from tscompile.placement import Owned, Partial, Placement, Replicate, Shard
from tscompile.recipe import Checkpoint
from tscompile.sharding import Strategy, strategies

SIZES = {"T": 6, "L": 3, "S": 2, "P": 2}
T, L = Sym("T"), Sym("L")
R = Sym("R", times=2)
ROUTE = {"k": 3, "normalize": False, "scale": 2.5, "groups": 1, "kept": 1}
ARRAYS: list[Any] = [("i32", T), ("i32", Sym("S", 1)), ("i32", Sym("S")), ("i32", Sym("S"), Sym("P"))]
ATTENTION = {"scale": 0.3, "window": 3, "page_size": 4}
# kind -> (input shapes, attrs) for one or more cases; a shape that begins with "i32" or "state" is that kind
# of value
CASES: dict[str, list[tuple[list[Any], dict[str, Attr]]]] = {
    **{kind: [([(T, 8)], {}), ([(T, 4, 8)], {})] for kind in ("neg", "silu", "sigmoid", "relu", "gelu_tanh")},
    **{kind: [([(T, 8), (T, 8)], {}), ([(T, 4, 8), (8,)], {})] for kind in ("add", "sub", "mul")},
    "scale": [([(T, 8)], {"value": 0.5})],
    "shift": [([(T, 8)], {"value": -1.5})],
    "cast": [([(T, 8)], {"to": "bf16"})],
    "reshape": [
        ([(T, 8)], {"shape": (-1, 4, 2)}),
        ([(T, 4, 2)], {"shape": (-1, 8)}),
        ([(T, 4, 6)], {"shape": (-1, 8, 3)}),
        ([(T, 2, 2, 8)], {"shape": (-1, 4, 2, 4)}),
        ([(T, 8)], {"shape": (-1, 1, 8)}),
        ([(T, 1, 8)], {"shape": (-1, 8)}),
    ],
    "split": [([(T, 8)], {"sizes": (2, 6)}), ([(T, 4, 8)], {"sizes": (4, 4)})],
    "concat": [([(T, 8), (T, 4)], {}), ([(T, 4, 2), (T, 4, 6), (T, 4, 1)], {})],
    "gather_rows": [([(T, 8), ("i32", L)], {})],
    "embedding": [([("i32", T), (16, 8)], {"vocab_axis": ""})],
    "linear": [([(T, 8), (12, 8)], {}), ([(T, 4, 8), (12, 8)], {})],
    "swiglu": [([(T, 32)], {"width": 13, "tile": 16})],
    "rms_norm": [([(T, 8), (8,)], {"eps": 1e-5}), ([(T, 4, 8), (8,)], {"eps": 1e-5})],
    "rope": [
        ([(T, 4, 8), (16, 8), ("i32", T)], {"interleaved": False}),
        ([(T, 4, 8), (16, 4), ("i32", T)], {"interleaved": True}),
    ],
    "kv_write": [
        ([("state", 4, 8), (T, 4, 8), (T, 4, 8), ("i32", T)], {"page_size": 4}),
        ([("state", 4, 8), (T, 4, 8), (T, 4, 8), ("i32", T), (4,)], {"page_size": 1, "parts": 4}),
    ],
    "attention": [
        ([(T, 8, 8), ("state", 4, 8), *ARRAYS], {**ATTENTION}),
        ([(T, 8, 8), ("state", 4, 8), *ARRAYS, (4,)], {**ATTENTION, "page_size": 1, "parts": 4}),
    ],
    "merge_parts": [([(T, 2, 4, 10)], {})],
    "route": [
        ([(T, 12)], {**ROUTE, "scores": "softmax"}),
        ([(T, 12), (12,)], {**ROUTE, "scores": "sigmoid", "normalize": True, "groups": 4, "kept": 2}),
    ],
    "sort_routes": [([("i32", T, 2), (4,)], {})],
    "dispatch": [([(T, 8), ("i32", R)], {"k": 2})],
    "expert_linear": [([(R, 8), ("i32", 4), (4, 12, 8)], {})],
    "combine": [([(R, 8), ("i32", R), (T, 2)], {})],
    "head_linear": [([(T, 4, 8), (4, 6, 8)], {})],
    "latent_write": [
        ([("state", 10), (T, 10), ("i32", T)], {"page_size": 4}),
        ([("state", 10), (T, 10), ("i32", T), (4,)], {"page_size": 1, "parts": 4}),
    ],
    "latent_attention": [
        ([(T, 4, 10), ("state", 10), *ARRAYS], {"scale": 0.3, "rank": 6, "page_size": 4}),
        (
            [(T, 4, 10), ("state", 10), *ARRAYS, (4,)],
            {"scale": 0.3, "rank": 6, "page_size": 1, "parts": 4},
        ),
    ],
    "mla_attention": [
        ([(T, 4, 8), (T, 4, 4), ("state", 10), (4 * (8 + 3), 6), *ARRAYS], {"scale": 0.3, "page_size": 4})
    ],
    "boundary": [([(T, 8)], {"module": "m", "placements": ""})],
    "finish": [([(T, 8), (T, 4), ("i32", 6)], {})],
    "redistribute": [([(T, 8)], {"axis": "tp", "source": "R", "target": "R"})],
}
ORDER = torch.tensor([3, 8, 0, 11, 5, 2, 9, 10, 1, 7, 4, 6], dtype=torch.int32)
GIVEN: dict[str, dict[int, torch.Tensor]] = {
    "kv_write": {4: torch.arange(4.0)},
    "latent_write": {3: torch.arange(4.0)},
    "attention": {6: torch.arange(4.0)},
    "latent_attention": {6: torch.arange(4.0)},
    "sort_routes": {
        0: torch.tensor([[3, 1], [0, 2], [1, 0], [2, 3], [0, 1], [2, 3]], dtype=torch.int32),
        1: torch.arange(4.0),
    },
    "dispatch": {1: ORDER},
    "expert_linear": {1: torch.full((4,), 3, dtype=torch.int32)},
    "combine": {1: ORDER},
}
ALL_CASES = [(kind, index) for kind, cases in CASES.items() for index in range(len(cases))]


def made(kind: str, index: int) -> tuple[Op, list[Any]]:
    """An op of the case, and a tensor (or cache) for each input."""
    shapes, attrs = CASES[kind][index]
    torch.manual_seed(0)
    values, tensors = [], list[Any]()
    for i, shape in enumerate(shapes):
        marked = isinstance(shape[0], str)
        dtype, state, dims = (
            ("i32" if marked and shape[0] == "i32" else "f32"),
            marked and shape[0] == "state",
            shape[marked:],
        )
        size = [d.size(SIZES) if isinstance(d, Sym) else d for d in dims]
        value = Value(f"in{i}", tuple(dims), dtype, state)
        if not state and not marked and not any(isinstance(d, Sym) for d in dims):
            value = Weight(f"in{i}", tuple(dims), dtype, recipe=Checkpoint("w"))
        values.append(value)
        tensors.append(
            KVCache(torch.randn(16, *size), torch.randn(16, *size)) if state else torch.randn(size)
        )
        if dtype == "i32":
            tensors[-1] = torch.randint(size[0], tuple(size), dtype=torch.int32)
    if kind.endswith("attention"):  # two sequences: three tokens each, the second with two before them
        arrays = [[0, 1, 2, 2, 3, 4], [0, 3, 6], [3, 5], [[1, 0], [3, 2]]]
        first = next(i for i, value in enumerate(values) if value.dtype == "i32")
        tensors[first : first + 4] = [torch.tensor(array, dtype=torch.int32) for array in arrays]
    if kind in GIVEN:  # four experts, three of the twelve routes to each: shards of rows are of equal size
        tensors = [GIVEN[kind].get(i, tensor) for i, tensor in enumerate(tensors)]
    types = lookup(kind).infer(values, attrs)
    outputs = [Value(f"out{i}", t.shape, t.dtype, t.state) for i, t in enumerate(types)]
    return Op(kind, values, outputs, dict(attrs)), tensors


def run(op: Op, tensors: list[Any], mesh: Mesh | None = None, rank: int = 0) -> list[Any]:
    reference = lookup(op.kind).reference
    assert reference is not None
    return reference(RankContext(mesh or Mesh(), rank), tensors, op.attrs)


def test_every_op_has_a_case() -> None:
    assert set(CASES) == {kind for kind, definition in REGISTRY.items() if definition.across is None}


@pytest.mark.parametrize(("kind", "index"), ALL_CASES)
def test_reference_gives_what_the_shape_rule_says(kind: str, index: int) -> None:
    op, tensors = made(kind, index)
    for value, tensor in zip(op.outputs, run(op, tensors), strict=True):
        if not value.state:
            size = [d.size(SIZES) if isinstance(d, Sym) else d for d in value.shape]
            assert list(tensor.shape) == size
            assert tensor.dtype == TORCH_DTYPES[value.dtype]


@pytest.mark.parametrize(("kind", "index"), ALL_CASES)
def test_costs_are_positive_and_grow(kind: str, index: int) -> None:
    op, _ = made(kind, index)
    small, large = ({"T": n, "L": n, "S": n, "P": n, "context": n} for n in (2, 64))
    for cost in (lookup(kind).flops, lookup(kind).bytes):
        assert (
            0 <= cost(op.inputs, op.outputs, op.attrs, small) <= cost(op.inputs, op.outputs, op.attrs, large)
        )


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("kind", "index"), ALL_CASES)
def test_every_factor_sharded_gives_the_same(kind: str, index: int, ranks: int) -> None:
    op, tensors = made(kind, index)
    whole = run(op, [clone(t) for t in tensors])
    for strategy in strategies(op, "tp", ranks):
        if not any(isinstance(p, Shard) and p.owner for p in (*strategy.takes, *strategy.gives)):
            check(op, tensors, whole, strategy, ranks)
    for strategy in strategies(op, "cp", ranks):
        if strategy.factor == "c" and not any(v.state for v in op.outputs):
            check(op, tensors, whole, strategy, ranks)


@pytest.mark.parametrize("kind", ["kv_write", "latent_write"])
def test_writes_in_parts_are_the_write(kind: str) -> None:
    """Each part of the context has its own tokens, and nothing else."""
    op, tensors = made(kind, 1)
    (strategy,) = (s for s in strategies(op, "cp", 4) if s.factor)
    assert strategy.gives == (Owned(),)
    assert strategy.takes == (Owned(), *[Replicate()] * (len(op.inputs) - 2), Shard(0))
    slots = tensors[-2] = torch.tensor([5, 6, 7, 8, 0, 1], dtype=torch.int32)
    (whole,) = run(op, [clone(t) for t in tensors])
    for number in range(4):
        before = clone(tensors[0])
        (found,) = run(op, [clone(before), *tensors[1:-1], torch.tensor([float(number)])])
        mine = slots[slots % 4 == number].long()
        assert torch.equal(found.k[mine], whole.k[mine])
        before.k[mine] = found.k[mine]
        assert torch.equal(found.k, before.k)


@pytest.mark.parametrize("kind", ["attention", "latent_attention"])
def test_parts_merged_are_the_whole(kind: str) -> None:
    """Also where some parts have no key that a query sees."""
    op, tensors = made(kind, 1)
    whole, _ = made(kind, 0)
    (parts,), (wanted,) = run(op, tensors), run(whole, tensors[:-1])
    assert (parts[..., -1] == float("-inf")).any()
    merged, _ = made("merge_parts", 0)
    assert torch.allclose(run(merged, [parts])[0], wanted, atol=1e-5)


def check(op: Op, tensors: list[Any], whole: list[Any], strategy: Strategy, ranks: int) -> None:
    mesh = Mesh((("tp", ranks),))
    parts = []
    for rank in range(ranks):
        mine = [part(t, place, rank, ranks) for t, place in zip(tensors, strategy.takes, strict=True)]
        local = [shrunk(v, place, ranks) for v, place in zip(op.outputs, strategy.gives, strict=True)]
        axes = {strategy.factor: "tp"} if strategy.factor else {}
        attrs = lookup(op.kind).localize(op.attrs, local, axes)
        given = run(Op(op.kind, op.inputs, local, attrs), mine, mesh, rank)
        for value, tensor in zip(local, given, strict=True):
            if not value.state:
                assert list(tensor.shape[1:]) == list(value.shape[1:]), (op.kind, strategy)
        parts.append(given)
    for i, place in enumerate(strategy.gives):
        for found, expected in zip(joined([p[i] for p in parts], place), leaves(whole[i]), strict=True):
            assert torch.allclose(found, expected, atol=1e-5), (op.kind, strategy)


def clone(tensor: Any) -> Any:
    return KVCache(tensor.k.clone(), tensor.v.clone()) if isinstance(tensor, KVCache) else tensor.clone()


def leaves(tensor: Any) -> list[torch.Tensor]:
    return [tensor.k, tensor.v] if isinstance(tensor, KVCache) else [tensor]


def part(tensor: Any, place: Placement, rank: int, ranks: int) -> Any:
    """What a rank holds of the whole."""
    if isinstance(tensor, KVCache):
        return KVCache(
            *(
                part(x, Shard(place.dim + 1) if isinstance(place, Shard) else place, rank, ranks)
                for x in leaves(tensor)
            )
        )
    match place:
        case Shard(dim):
            starts = token_starts("tp", ranks, tensor.shape[dim], [], [])  # equal parts, where ranks divide
            return tensor.narrow(dim, starts[rank], starts[rank + 1] - starts[rank]).clone()
        case Partial():
            generator = torch.Generator().manual_seed(tensor.numel())
            terms = torch.randn(ranks, *tensor.shape, generator=generator)
            terms[-1] = tensor - terms[:-1].sum(0)
            return terms[rank]
    return clone(tensor)


def joined(tensors: list[Any], place: Placement) -> list[torch.Tensor]:
    """The whole, from what the ranks hold."""
    if isinstance(tensors[0], KVCache):
        inner = Shard(place.dim + 1) if isinstance(place, Shard) else place
        return [joined([leaves(t)[i] for t in tensors], inner)[0] for i in range(2)]
    match place:
        case Shard(dim):
            return [torch.cat(tensors, dim)]
        case Partial():
            return [torch.stack(tensors).sum(0)]
    for tensor in tensors[1:]:
        assert torch.equal(tensor, tensors[0])
    return [tensors[0]]


def shrunk(value: Value, place: Placement, ranks: int) -> Value:
    shape = list(value.shape)
    if isinstance(place, Shard):
        size = shape[place.dim]
        if isinstance(size, Sym):
            shape[place.dim] = size if size.ragged else Sym("T", over=("tp",))
        else:
            shape[place.dim] = size // ranks
    return Value(value.name, tuple(shape), value.dtype, value.state)


def test_reshapes_split_by_whole_heads() -> None:
    """[T, H*D] -> [T, H, D]: four heads go to two ranks or four, not to eight."""
    op, _ = made("reshape", 0)
    assert [len(strategies(op, "tp", ranks)) for ranks in (2, 4, 8)] == [4, 4, 3]
    assert Strategy("b", (Shard(1),), (Shard(1),)) in strategies(op, "tp", 2)


def test_kv_heads_go_with_their_query_heads() -> None:
    op, _ = made("attention", 0)
    (split,) = (s for s in strategies(op, "tp", 4) if s.factor)
    assert split.takes[:2] == (Shard(1), Shard(0))
    assert split.gives == (Shard(1),)
    assert not any(s.factor for s in strategies(op, "tp", 8))


def test_rows_of_experts_go_with_their_experts() -> None:
    """Ranks must divide the experts; who has which of the rows is settled by that."""
    some = ["", "e", "t", "k", "n", ""]
    for ranks, factors in ((2, some), (4, some), (8, ["", "t", "k", ""])):
        found = strategies(made("expert_linear", 0)[0], "tp", ranks)
        assert [s.factor for s in found] == factors
    (own,) = (s for s in strategies(made("combine", 0)[0], "tp", 2) if s.factor == "e")
    assert own == Strategy("e", (Shard(0), Shard(0), Replicate()), (Partial(),))


def test_rows_of_experts_go_with_their_tokens() -> None:
    """Each rank sorts, computes and combines the routes of its own tokens, whatever their number. What it
    counts is its term."""
    rows, own = Shard(0, "T"), {}
    for kind in ("sort_routes", "dispatch", "expert_linear", "combine"):
        (own[kind],) = (s for s in strategies(made(kind, 0)[0], "tp", 5) if s.factor == "t")
    assert own["sort_routes"] == Strategy("t", (Shard(0), Replicate()), (rows, Partial()))
    assert own["dispatch"] == Strategy("t", (Shard(0), rows), (rows,))
    assert own["expert_linear"] == Strategy("t", (rows, Partial(), Replicate()), (rows,))
    assert own["combine"] == Strategy("t", (rows, rows, Shard(0)), (Shard(0),))
    ids, (x, _), weight = GIVEN["sort_routes"][0], made("dispatch", 0)[1], made("expert_linear", 0)[1][2]
    weights = made("combine", 0)[1][2]

    def combined(first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        order, counts = run(made("sort_routes", 0)[0], [ids[first:end], torch.arange(4.0)])
        (rows,) = run(made("dispatch", 0)[0], [x[first:end], order])
        (rows,) = run(made("expert_linear", 0)[0], [rows, counts, weight])
        (out,) = run(made("combine", 0)[0], [rows, order, weights[first:end]])
        return out, counts

    parts = [combined(first, end) for first, end in ((0, 2), (2, 2), (2, 6))]
    out, counts = combined(0, 6)
    assert torch.allclose(torch.cat([part for part, _ in parts]), out, atol=1e-5)
    assert torch.equal(sum(term for _, term in parts), counts)


@pytest.mark.parametrize("sizes", [(6, 0, 1), (0, 0, 7), (2, 3, 2)])
def test_rows_move_between_their_tokens_and_their_experts(sizes: tuple[int, ...]) -> None:
    """On the ranks of their experts rows lie as on one rank; and they come back as they were."""
    across = lookup("ragged_all_to_all").across
    assert across is not None
    ids = torch.randint(6, (sum(sizes), 2), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    order = torch.sort(ids.flatten(), stable=True).indices  # of one rank
    starts = [sum(sizes[:i]) for i in range(4)]
    held, terms = [], []
    for first, end in pairwise(starts):
        own = torch.sort(ids[first:end].flatten(), stable=True).indices
        held.append(own + 2 * first)  # a route's number is its row
        terms.append(torch.bincount(ids[first:end].flatten(), minlength=6))
    counts = torch.cat(terms).int()
    there = across([[rows, counts] for rows in held], {"target": ""}, None)
    assert torch.equal(torch.cat(there), order)
    assert [len(rows) for rows in there] == [int(n) for n in sum(terms).view(3, 2).sum(1)]
    back = across([[rows, counts] for rows in there], {"target": "T"}, None)
    assert all(torch.equal(a, b) for a, b in zip(back, held, strict=True))


def test_collectives_run_across_the_ranks_of_their_axis() -> None:
    from tscompile.interpret import Batch
    from tscompile.parser import parse

    graph = parse(
        """graph g mesh(dp=2, tp=2) {
          input %token_ids: i32[T]
          weight @w: f32[4, 4] tp:S(1) = shard(checkpoint("w"); dim=1, axis="tp")
          %x: f32[T, 4] tp:S(1) = embedding(%token_ids, @w; vocab_axis="")
          %y: f32[T, 8] = all_gather(%x; axis="tp", dim=1, ranks=2)
          %z: f32[T, 4] tp:S(1) = slice(%y; axis="tp", dim=1, ranks=2)
          %p: f32[T, 2] tp:S(1) = reduce_scatter(%z; axis="dp", op="sum", dim=1, ranks=2)
          %q: f32[T, 2] tp:S(1) = all_reduce(%p; axis="tp", op="max")
          output %y, %z, %p, %q
        }"""
    )
    w = torch.arange(32.0).view(4, 8)
    empty = torch.zeros(0, dtype=torch.int32)
    ids = torch.tensor([2], dtype=torch.int32)
    ranks = Interpreter(graph, {"w": w}.__getitem__, mesh=graph.mesh).run(Batch(ids, *[empty] * 6))
    for rank, (y, z, p, q) in enumerate(ranks):
        dp, tp = rank // 2, rank % 2
        assert torch.equal(y, w[2:3])
        assert torch.equal(z, w[2:3, 4 * tp : 4 * tp + 4])
        assert torch.equal(p, 2 * z[:, 2 * dp : 2 * dp + 2])
        assert torch.equal(q, 2 * w[2:3, 4 + 2 * dp : 6 + 2 * dp])


def test_replicated_comes_first() -> None:
    op, _ = made("linear", 0)
    first = strategies(op, "tp", 2)[0]
    assert set(first.takes) == {Replicate()}
