"""The weight layouts against the words of ARCHITECTURE.md, element by element."""

import pytest
import torch

from tscompile.errors import InternalError
from tscompile.layout import LAYOUTS, lay_back, lay_out, stored_bytes, stored_shape
from tscompile.weights import interleave

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [(16, 32), (1, 1), (17, 33), (48, 96), (33, 64), (64, 31)]


def numbered(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Element i has the bits i + 1: distinct, and none is zero."""
    bits = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.int32)
    if dtype == "f32":
        return bits.view(torch.float32).reshape(shape)
    return bits.to(torch.int16).view(torch.bfloat16).reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[a.dtype]
    return a.shape == b.shape and a.dtype == b.dtype and bool((a.view(whole) == b.view(whole)).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_back_and_forth(layout: str, dtype: str, shape: tuple[int, int]) -> None:
    tensor = numbered(shape, dtype)
    stored = lay_out(layout, tensor)
    assert tuple(stored.shape) == stored_shape(layout, dtype, shape)
    assert stored.numel() * stored.element_size() == stored_bytes(layout, dtype, shape)
    assert stored_bytes(layout, dtype, shape) % 64 == 0
    assert same_bits(lay_back(layout, stored, shape), tensor)
    # every element once, and nothing else but zeros
    kept = stored.flatten()[stored.flatten().view(torch.int32 if dtype == "f32" else torch.int16) != 0]
    assert kept.numel() == tensor.numel()


def test_a_bf16_tile_is_an_amx_b_tile() -> None:
    """Row j of a tile holds (k = 2j, 2j + 1) of every column, columns in order: 64 bytes."""
    n_tiles, k_tiles = 2, 3
    tensor = numbered((16 * n_tiles, 32 * k_tiles), "bf16")
    flat = lay_out("tiles", tensor).flatten()
    position = 0
    for nt in range(n_tiles):
        for kt in range(k_tiles):
            for pair in range(16):
                for column in range(16):
                    for odd in range(2):
                        wanted = tensor[nt * 16 + column, kt * 32 + 2 * pair + odd]
                        assert same_bits(flat[position : position + 1], wanted.reshape(1))
                        position += 1
    assert position == flat.numel()


def test_an_f32_tile_holds_the_even_row_then_the_odd() -> None:
    tensor = numbered((16, 64), "f32")
    flat = lay_out("tiles", tensor).flatten()
    position = 0
    for k in range(64):
        for column in range(16):
            assert same_bits(flat[position : position + 1], tensor[column, k].reshape(1))
            position += 1


def test_gate_and_up_alternate_in_tiles_of_16_columns() -> None:
    gate, up = numbered((32, 32), "bf16"), -numbered((32, 32), "bf16")
    stored = lay_out("tiles", interleave([gate, up], 16))
    assert same_bits(stored[0::2], lay_out("tiles", gate))
    assert same_bits(stored[1::2], lay_out("tiles", up))


def test_rows_are_padded_to_64_bytes() -> None:
    assert stored_shape("rows", "bf16", (5, 33)) == (5, 64)
    assert stored_shape("rows", "f32", (5, 33)) == (5, 48)
    assert stored_shape("rows", "f32", (16,)) == (16,)
    assert same_bits(lay_out("rows", numbered((3,), "f32"))[:3], numbered((3,), "f32"))


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        ("columns", (2, 2), "no layout 'columns'"),
        ("tiles", (2,), r"takes a weight \[..., N, K\]"),
        ("rows", (), "at least one dim"),
    ],
)
def test_what_does_not_fit_is_named(layout: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InternalError, match=message):
        stored_shape(layout, "f32", shape)
