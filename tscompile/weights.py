"""Executes weight recipes. A part is cast to the weight's dtype before it is merged, so merging never widens;
and after it is cut, so that a rank's shard costs no more than itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tscompile.errors import InternalError
from tscompile.ir import Weight
from tscompile.mesh import Mesh
from tscompile.ops.elementwise import TORCH_DTYPES
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

Read = Callable[[str], Tensor]  # the checkpoint's tensor of a name


def evaluate(
    weight: Weight, read: Read, mesh: Mesh | None = None, coords: Mapping[str, int] | None = None
) -> Tensor:
    """The weight's tensor, of its shape and dtype, for the rank at `coords` of `mesh` (one rank if not
    given).

    InternalError if the recipe gives another shape: capture has checked the checkpoint against the model
    before."""
    mesh = mesh or Mesh()
    dtype = TORCH_DTYPES[weight.dtype]
    tensor = _evaluate(weight.recipe, read, dtype, mesh, coords or mesh.coords(0)).to(dtype)
    if tuple(tensor.shape) != weight.shape:
        raise InternalError(
            f"the recipe of @{weight.name} gives {list(tensor.shape)}, wanted {list(weight.shape)}"
        )
    return tensor


def _evaluate(
    recipe: Recipe, read: Read, dtype: torch.dtype, mesh: Mesh, coords: Mapping[str, int]
) -> Tensor:
    """The tensor, or a view of the checkpoint's, of `dtype` or as it lies there."""

    def part_of(part: Recipe) -> Tensor:
        return _evaluate(part, read, dtype, mesh, coords)

    match recipe:
        case Checkpoint(name):
            made = read(name)
        case Concat(parts, dim):
            made = torch.cat([part_of(part).to(dtype) for part in parts], dim=dim)
        case Interleave(parts, tile, dim):
            made = interleave([part_of(part).to(dtype) for part in parts], tile, dim)
        case Stack(parts):
            made = torch.stack([part_of(part).to(dtype) for part in parts])
        case Arange(count):
            made = torch.arange(count)
        case Slice(part, dim, start, stop):
            made = part_of(part).narrow(dim, start, stop - start)
        case View(part, shape, order):
            made = part_of(part).reshape(shape).permute(order)
        case ShardOf(part, dim, axis):
            stack = _sunk(recipe, mesh, coords)
            is_stack = isinstance(stack, Stack)
            made = part_of(stack if is_stack else part)
            made = made if is_stack else made.chunk(mesh.size(axis), dim=dim)[coords[axis]]
        case Pad(part, dim, size):
            tensor = part_of(part)
            zeros = [*tensor.shape[:dim], size - tensor.shape[dim], *tensor.shape[dim + 1 :]]
            made = torch.cat([tensor, tensor.new_zeros(zeros)], dim=dim)
        case Repeat(part, dim, parts, times):
            pieces = part_of(part).chunk(parts, dim=dim)
            made = torch.cat([piece for piece in pieces for _ in range(times)], dim=dim)
        case RopeTable():
            made = rope_table(recipe)
    return made


def _sunk(recipe: Recipe, mesh: Mesh, coords: Mapping[str, int]) -> Recipe:
    """Shards of a stack as a stack of what the rank at `coords` has of it: the rest is never read."""
    if not isinstance(recipe, ShardOf):
        return recipe
    match _sunk(recipe.part, mesh, coords):
        case Stack(parts) if recipe.dim:
            return Stack(tuple(ShardOf(part, recipe.dim - 1, recipe.axis) for part in parts))
        case Stack(parts):
            count = len(parts) // mesh.size(recipe.axis)
            return Stack(parts[coords[recipe.axis] * count :][:count])
    return recipe


def interleave(parts: list[Tensor], tile: int, dim: int = 0) -> Tensor:
    """Parts [..., N, ...] -> [..., len(parts) * N rounded up to `tile`, ...]: along `dim`, a tile of each in
    turn; what is past N is zero."""
    before, rows, after = parts[0].shape[:dim], parts[0].shape[dim], parts[0].shape[dim + 1 :]
    tiles = []
    for part in parts:
        padded = part
        if rows % tile:
            padded = torch.cat([part, part.new_zeros(*before, -rows % tile, *after)], dim=dim)
        tiles.append(padded.reshape(*before, -1, tile, *after))
    return torch.stack(tiles, dim=dim + 1).reshape(*before, -1, *after)


def rope_table(recipe: RopeTable) -> Tensor:
    """f32 [rows, rotary_dim]. The angle is the f32 product position * inv_freq, as transformers computes it;
    cos and sin are taken in double and rounded once, so that the bytes do not depend on how the host
    vectorises them."""
    positions = torch.arange(recipe.rows, dtype=torch.float32)
    angles = (
        torch.outer(positions, torch.tensor(recipe.inv_freq, dtype=torch.float32)).double().flatten().tolist()
    )
    cos = torch.tensor([math.cos(a) for a in angles], dtype=torch.float64).float()
    sin = torch.tensor([math.sin(a) for a in angles], dtype=torch.float64).float()
    shape = (recipe.rows, len(recipe.inv_freq))
    # transformers multiplies the f32 cos and sin by its attention_scaling, in f32
    scaling = torch.tensor(recipe.scaling, dtype=torch.float32)
    return torch.cat([cos.view(shape) * scaling, sin.view(shape) * scaling], dim=-1)
