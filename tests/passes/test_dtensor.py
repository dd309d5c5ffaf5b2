"""An oracle that is not ours: the collectives of torch's DTensor over 8 fake ranks, and ours, for the same
modules. Ours are as many or fewer, of as many bytes or fewer; what differs is explained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import golden
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tscompile.parser import parse
from tscompile.passes import collectives, fit, propagate, reshard
from tscompile.price import Prices

RANKS, TOKENS, HIDDEN, WIDE, VOCAB = 8, 16, 1024, 4096, 32000
HEAD_DIM, HEADS = 64, 16
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


class Attention(nn.Module):
    """Causal attention of one sequence, as products and a softmax, which DTensor has rules for: of
    scaled_dot_product_attention it has none on the CPU. parallel: q, k and v stay DTensors, so that how heads
    lie is DTensor's to say."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.q, self.o = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k, self.v = (nn.Linear(HIDDEN, kv_heads * HEAD_DIM, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (  # [heads, T, D]
            y.unflatten(-1, (heads, HEAD_DIM)).transpose(0, 1)
            for y, heads in ((self.q(x), HEADS), (self.k(x), self.kv_heads), (self.v(x), self.kv_heads))
        )
        k, v = (y.repeat_interleave(HEADS // self.kv_heads, dim=0) for y in (k, v))
        p = torch.softmax(torch.matmul(q, k.transpose(1, 2)) * HEAD_DIM**-0.5, dim=-1)
        return self.o(torch.matmul(p, v).transpose(0, 1).flatten(1))


class Moves(TorchDispatchMode):
    """Notes the collectives that run inside it: (kind, elements of the whole value)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:  # it comes again as what DTensor makes of it
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        kind = func.overloadpacket.__name__.removesuffix("_into_tensor").removesuffix("_tensor")
        if func.namespace == "_c10d_functional" and kind != "wait" and not kind.startswith("_"):
            self.found.append((kind, max(args[0].numel(), out.numel())))
        return out


def theirs(mesh: DeviceMesh, module: nn.Module, plan: object, x: torch.Tensor) -> list[tuple[str, int]]:
    module = parallelize_module(module, mesh, plan)  # type: ignore[arg-type]
    with Moves() as moves, torch.no_grad():
        out = module(x)
    if isinstance(out, AsyncCollectiveTensor):
        out.wait()
    return moves.found


def ours(body: str) -> list[tuple[str, int]]:
    build = golden.build_of(parse(f"graph g mesh(tp={RANKS}) {{ input %token_ids: i32[T]\n{body} }}"))
    prices = Prices.of("cpu-avx2", TOKENS)
    fit.run(build)
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


def attention(kv_heads: int) -> str:
    flat, heads = f"f32[T, {kv_heads * HEAD_DIM}]", f"f32[T, {kv_heads}, {HEAD_DIM}]"
    weights = "\n".join(
        f'weight @{name}: f32[{rows}, {HIDDEN}] = checkpoint("{name}")'
        for name, rows in {
            "q": HIDDEN,
            "k": kv_heads * HEAD_DIM,
            "v": kv_heads * HEAD_DIM,
            "o": HIDDEN,
        }.items()
    )
    return f"""input %slots: i32[T]
    input %positions: i32[T]
    input %query_start: i32[S+1]
    input %context_len: i32[S]
    input %page_table: i32[S, P]
    input %kv: state f32[{kv_heads}, {HEAD_DIM}]
    {X}
    {weights}
    %q0: f32[T, {HIDDEN}] = linear(%a, @q)
    %q: f32[T, {HEADS}, {HEAD_DIM}] = reshape(%q0; shape=[-1, {HEADS}, {HEAD_DIM}])
    %k0: {flat} = linear(%a, @k)
    %k: {heads} = reshape(%k0; shape=[-1, {kv_heads}, {HEAD_DIM}])
    %v0: {flat} = linear(%a, @v)
    %v: {heads} = reshape(%v0; shape=[-1, {kv_heads}, {HEAD_DIM}])
    %s: state f32[{kv_heads}, {HEAD_DIM}] = kv_write(%kv, %k, %v, %slots; page_size=64)
    %t: f32[T, {HEADS}, {HEAD_DIM}] = attention(%q, %s, %positions, %query_start, %context_len, %page_table;
        page_size=64, scale=0.125, window=0)
    %u: f32[T, {HIDDEN}] = reshape(%t; shape=[-1, {HIDDEN}])
    %y: f32[T, {HIDDEN}] = linear(%u, @o)
    %b: f32[T, {HIDDEN}] = boundary(%y; module="m", placements="tp:R")
    output %b"""


def attention_of_theirs(mesh: DeviceMesh, kv_heads: int, keys: ColwiseParallel) -> list[tuple[str, int]]:
    columns = ColwiseParallel(use_local_output=False)
    plan = {"q": columns, "k": keys, "v": keys, "o": RowwiseParallel()}
    return theirs(mesh, Attention(kv_heads), plan, torch.randn(TOKENS, HIDDEN))


def test_attention(mesh: DeviceMesh) -> None:
    """Heads shared out, and one sum behind the output's projection."""
    expected = attention_of_theirs(mesh, RANKS, ColwiseParallel(use_local_output=False))
    assert ours(attention(RANKS)) == expected == [("all_reduce", TOKENS * HIDDEN)]


def test_attention_of_fewer_kv_heads_than_ranks(mesh: DeviceMesh) -> None:
    """DTensor refuses to share 2 heads out over 8 ranks, and to make them whole takes two all_gathers; we
    repeat each head's weights, so that every rank makes the one that it reads."""
    apart = ColwiseParallel(use_local_output=False)
    with pytest.raises(RuntimeError, match="Cannot unflatten unevenly sharded tensor"):
        attention_of_theirs(mesh, 2, apart)
    whole = ColwiseParallel(output_layouts=Replicate(), use_local_output=False)
    expected = attention_of_theirs(mesh, 2, whole)
    assert expected == [("all_gather", TOKENS * 2 * HEAD_DIM)] * 2 + [("all_reduce", TOKENS * HIDDEN)]
    assert ours(attention(2)) == [("all_reduce", TOKENS * HIDDEN)]
