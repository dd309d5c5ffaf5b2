"""An oracle that is not ours: the collectives of torch's DTensor over 8 fake ranks, and ours, for the same
modules. Ours are as many or fewer, of as many bytes or fewer; what differs is explained."""

from __future__ import annotations

from collections.abc import Iterator

import golden
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from tscompile.parser import parse
from tscompile.passes import collectives, propagate, reshard
from tscompile.price import Prices

RANKS, TOKENS, HIDDEN, WIDE, VOCAB = 8, 16, 1024, 4096, 32000
# What a value costs a rank to receive, in units of its own size: a sum is received twice, as in a ring
RECEIVED = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, WIDE, bias=False), nn.Linear(WIDE, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.up(x)))


def theirs(mesh: DeviceMesh, module: nn.Module, plan: object, x: torch.Tensor) -> list[tuple[str, int]]:
    """(kind, elements): the one collective of each of these modules makes its output."""
    module = parallelize_module(module, mesh, plan)  # type: ignore[arg-type]
    with CommDebugMode() as counter, torch.no_grad():
        out = module(x)
    found = {str(op).split(".")[-1]: n for op, n in counter.get_comm_counts().items() if n}
    return [(k.removesuffix("_into_tensor"), out.numel()) for k, n in found.items() for _ in range(n)]


def ours(body: str) -> list[tuple[str, int]]:
    build = golden.build_of(parse(f"graph g mesh(tp={RANKS}) {{ input %token_ids: i32[T]\n{body} }}"))
    prices = Prices.of("cpu-avx2", TOKENS)
    propagate.place(build, prices)
    reshard.run(build)
    collectives.run(build)
    moves = [op for op in build.graph.ops if op.kind in RECEIVED]
    return [(op.kind, prices.bytes_of(op.outputs[0]) // 4) for op in moves]


def received(found: list[tuple[str, int]]) -> int:
    return sum(RECEIVED[kind] * size for kind, size in found)


X = f"""weight @table: f32[8, {HIDDEN}] = checkpoint("table")
    %x: f32[T, {HIDDEN}] = embedding(%token_ids, @table; vocab_axis="")
    %a: f32[T, {HIDDEN}] = boundary(%x; module="m", placements="tp:R")"""


def test_columns_then_rows(mesh: DeviceMesh) -> None:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    found = ours(
        f"""{X}
        weight @up: f32[{WIDE}, {HIDDEN}] = checkpoint("up")
        weight @down: f32[{HIDDEN}, {WIDE}] = checkpoint("down")
        %h: f32[T, {WIDE}] = linear(%a, @up)
        %s: f32[T, {WIDE}] = silu(%h)
        %y: f32[T, {HIDDEN}] = linear(%s, @down)
        %b: f32[T, {HIDDEN}] = boundary(%y; module="m", placements="tp:R")
        output %b"""
    )
    assert (
        found == theirs(mesh, MLP(), plan, torch.randn(TOKENS, HIDDEN)) == [("all_reduce", TOKENS * HIDDEN)]
    )


def test_head_over_the_vocabulary(mesh: DeviceMesh) -> None:
    head = nn.Linear(HIDDEN, VOCAB, bias=False)
    plan = ColwiseParallel(output_layouts=Replicate())
    found = ours(
        f"""{X}
        weight @head: f32[{VOCAB}, {HIDDEN}] = checkpoint("head")
        %y: f32[T, {VOCAB}] = linear(%a, @head)
        output %y"""
    )
    assert found == theirs(mesh, head, plan, torch.randn(TOKENS, HIDDEN)) == [("all_gather", TOKENS * VOCAB)]


def test_embedding(mesh: DeviceMesh) -> None:
    """DTensor's plan cuts the table by rows and sums; we cut it by columns and gather: half the bytes."""
    table = nn.Embedding(VOCAB, HIDDEN)
    expected = theirs(mesh, table, RowwiseParallel(input_layouts=Replicate()), torch.arange(TOKENS))
    found = ours(
        f"""weight @table: f32[{50 * VOCAB}, {HIDDEN}] = checkpoint("table")
        %x: f32[T, {HIDDEN}] = embedding(%token_ids, @table; vocab_axis="")
        output %x"""
    )
    assert expected == [("all_reduce", TOKENS * HIDDEN)]
    assert found == [("all_gather", TOKENS * HIDDEN)]
    assert received(found) < received(expected)
