"""Recipes, executed: what each makes of the checkpoint's tensors, for each rank, in the weight's dtype."""

from __future__ import annotations

import pytest
import torch

from tscompile.errors import InternalError
from tscompile.ir import Weight
from tscompile.mesh import Mesh
from tscompile.recipe import (
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
    axes_of,
    checkpoint_names,
)
from tscompile.weights import evaluate

A, B = torch.arange(40.0).view(20, 2), -torch.arange(40.0).view(20, 2)
TENSORS = {"a": A, "b": B, "half": A.half(), "double": A.double()}
a, b = Checkpoint("a"), Checkpoint("b")
ZEROS = torch.zeros(12, 2)


def made(
    recipe: Recipe, shape: tuple[int, ...], dtype: str = "f32", mesh: Mesh | None = None, rank: int = 0
) -> torch.Tensor:
    mesh = mesh or Mesh()
    return evaluate(Weight("w", shape, dtype, recipe=recipe), TENSORS.__getitem__, mesh, mesh.coords(rank))


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (a, A),
        (Checkpoint("half"), A),
        (Checkpoint("double"), A),
        (Concat((a, b)), torch.cat([A, B])),
        (Concat((a, b), 1), torch.cat([A, B], 1)),
        (Slice(a, 0, 3, 7), A[3:7]),
        (Slice(a, 1, 1, 2), A[:, 1:]),
        (View(a, (4, 5, 2), (0, 1, 2)), A.view(4, 5, 2)),
        (Slice(View(a, (4, 5, 2), (0, 2, 1)), 2, 0, 3), A.view(4, 5, 2)[:, :3].transpose(1, 2)),
        (Interleave((a, b)), torch.cat([A[:16], B[:16], A[16:], ZEROS, B[16:], ZEROS])),
        (Interleave((a, b), 10), torch.cat([A[:10], B[:10], A[10:], B[10:]])),
        (Concat((Slice(b, 0, 0, 1), Slice(a, 0, 19, 20))), torch.cat([B[:1], A[19:]])),
        (RopeTable(2, (1.0,), 2.0), 2 * torch.tensor([[1.0, 0.0], [0.5403023058681398, 0.8414709848078965]])),
    ],
)
def test_recipes(recipe: Recipe, expected: torch.Tensor) -> None:
    assert torch.equal(made(recipe, tuple(expected.shape)), expected)
    rounded = made(recipe, tuple(expected.shape), "bf16")
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, expected.bfloat16())


def test_each_rank_has_its_part() -> None:
    mesh = Mesh((("dp", 2), ("tp", 2)))
    for rank in range(4):
        dp, tp = rank // 2, rank % 2
        assert torch.equal(
            made(ShardOf(a, 0, "tp"), (10, 2), mesh=mesh, rank=rank), A[10 * tp : 10 * tp + 10]
        )
        both = ShardOf(ShardOf(a, 0, "tp"), 1, "dp")
        assert torch.equal(made(both, (10, 1), mesh=mesh, rank=rank), A[10 * tp : 10 * tp + 10, dp : dp + 1])


def test_a_recipe_of_another_shape_is_a_bug() -> None:
    with pytest.raises(InternalError, match=r"the recipe of @w gives \[20, 2\], wanted \[20, 3\]"):
        made(a, (20, 3))


def test_names_in_order() -> None:
    assert list(checkpoint_names(Concat((b, Slice(ShardOf(Interleave((a, b)), 0, "tp"), 0, 0, 1))))) == [
        "b",
        "a",
        "b",
    ]
    assert not list(checkpoint_names(RopeTable(1, (1.0,))))


def test_ranks_of_a_mesh() -> None:
    mesh = Mesh((("dp", 2), ("tp", 4)))
    assert mesh.num_ranks == 8
    assert mesh.coords(6) == {"dp": 1, "tp": 2}
    assert mesh.group(6, "tp") == [4, 5, 6, 7]
    assert mesh.group(6, "dp") == [2, 6]
    assert str(mesh) == "mesh(dp=2, tp=4)"


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_rank_reads_its_experts_alone(dim: int) -> None:
    """A shard of a stack, or a shard of that: what other ranks have is not read."""
    mesh = Mesh((("ep", 2), ("tp", 2)))
    experts = {f"e{i}": torch.randn(4, 6) for i in range(4)}
    whole = torch.stack(list(experts.values()))
    recipe = ShardOf(ShardOf(Stack(tuple(Checkpoint(name) for name in experts)), 0, "ep"), dim, "tp")
    for rank in range(4):
        read: list[str] = []
        coords = mesh.coords(rank)
        wanted = whole.chunk(2)[coords["ep"]].chunk(2, dim)[coords["tp"]]
        weight = Weight("w", tuple(wanted.shape), "f32", recipe=recipe)
        found = evaluate(weight, lambda name, read=read: read.append(name) or experts[name], mesh, coords)
        assert torch.equal(found, wanted)
        first = 2 * coords["ep"] + (coords["tp"] if dim == 0 else 0)
        assert read == [f"e{i}" for i in range(first, first + (1 if dim == 0 else 2))]


def test_axes_of() -> None:
    shards = (ShardOf(a, 0, "tp"), Pad(ShardOf(Slice(b, 0, 0, 2), 0, "ep"), 0, 3))
    assert axes_of(Concat((a, b))) == axes_of(RopeTable(2, (1.0,))) == set()
    assert axes_of(Interleave(shards)) == axes_of(Stack(shards)) == {"tp", "ep"}
    assert axes_of(ShardOf(Repeat(shards[0], 0, 1, 2), 1, "dp")) == {"tp", "dp"}
