"""The kernels that real models need, by their shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tscompile.kernels import desc
from tscompile.kernels.desc import KernelDesc, args_of
from tscompile.kernels.gpu.select import choose
from tscompile.kernels.gpu.spec import GpuLaunch, Rows
from tscompile.kernels.gpu.target import GpuTarget

BUCKETS = (1, 2, 8, 32, 64, 128, 512)


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    qk_norm: bool


SHAPES = {
    "Llama-3.1-8B": Shape(4096, 32, 8, 128, 14336, 128256, False),
    "Llama-3.2-1B": Shape(2048, 32, 8, 64, 8192, 128256, False),
    "Qwen3-0.6B": Shape(1024, 16, 8, 128, 3072, 151936, True),
}


@dataclass(frozen=True)
class Routed:
    """Experts of a layer, and how tokens are routed to them."""

    hidden: int
    inner: int
    experts: int
    top: int
    scores: str = "softmax"
    scale: float = 1.0
    groups: int = 1
    kept: int = 1


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention."""

    heads: int
    rank: int = 512
    nope: int = 128
    rope: int = 64
    v: int = 128


ROUTED = {
    "Qwen3-30B-A3B": Routed(2048, 768, 128, 8),
    "DeepSeek-V3": Routed(7168, 2048, 256, 8, "sigmoid", 2.5, 8, 4),
    "Kimi-K2": Routed(7168, 2048, 384, 8, "sigmoid", 2.827),
}
LATENTS = {"DeepSeek-V3": Latent(128), "Kimi-K2": Latent(64)}
FEW = (1, 64)  # buckets of the two above


def kernels_of_models(target: GpuTarget) -> Iterator[GpuLaunch]:
    """Those of a step of a layer, of all models. What a target has no kernel for is left out."""
    for shape in SHAPES.values():
        yield from launches(shape, target)
    for shape in (*ROUTED.values(), *(LATENTS.values() if target.backend == "cuda" else ())):
        yield from launches(shape, target, FEW)


def descriptions(shape: Shape | Routed | Latent) -> Iterator[KernelDesc]:
    match shape:
        case Shape():
            return dense(shape)
        case Routed():
            return routed(shape)
        case Latent():
            return latent(shape)


def routed(shape: Routed) -> Iterator[KernelDesc]:
    words = args_of("logits", *(["bias:weight"] if shape.scores == "sigmoid" else []), "ids!", "weights!")
    how = (shape.scores, True, shape.scale, shape.groups, shape.kept)
    yield desc.Route(words, shape.experts, shape.top, *how)
    yield desc.SortRoutes(args_of("ids", "numbers:weight", "order!", "counts!"), shape.experts, shape.top)
    words, n = args_of("x", "counts", "order", "weight:weight", "out!"), 2 * shape.inner
    sizes = (shape.top, shape.experts)
    yield desc.Experts(words, *sizes, shape.hidden, n, "bf16", True, shape.inner, False, "bf16")
    words = args_of("x", "counts", "order", "weight:weight", "weights", "out!")
    yield desc.Experts(words, *sizes, shape.inner, shape.hidden, "bf16", False, 0, True, "f32")


def latent(shape: Latent) -> Iterator[KernelDesc]:
    row, scale = shape.rank + shape.rope, (shape.nope + shape.rope) ** -0.5
    words = args_of("x", "weight:weight", "table:weight", "out!")
    sizes = (shape.heads, shape.nope, shape.rank)
    yield desc.HeadLinear(words, *sizes, shape.rope, True, "f32", "bf16", "bf16")
    words = args_of("kv:kv", "row", "norm:weight", "table:weight")
    yield desc.LatentWrite(words, row, 1e-6, shape.rope, True, "f32", "bf16", 64)
    words = args_of("q", "kv:kv", "out!")
    yield desc.LatentAttention(words, shape.heads, row, shape.rank, "bf16", 64, scale, "bf16")
    words, sizes = args_of("x", "weight:weight", "out!"), (shape.heads, shape.rank, shape.v)
    yield desc.HeadLinear(words, *sizes, 0, False, "bf16", "bf16", "bf16")


def dense(shape: Shape) -> Iterator[KernelDesc]:
    """Of one layer, embedding and head; and of what no fusion took."""
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    attended = shape.heads * shape.head_dim
    yield desc.Embed(args_of("table:weight", "out!"), "token_ids", shape.hidden, "bf16", "rows")
    yield desc.RmsNorm(args_of("x", "weight:weight", "out!"), "T", 1, shape.hidden, 1e-5, "bf16")
    words = args_of("x", "delta", "weight:weight", "sum!", "out!")
    yield desc.RmsNorm(words, "T", 1, shape.hidden, 1e-5, "bf16")
    yield linear(width, shape.hidden)
    norms = ("q_norm:weight", "k_norm:weight") if shape.qk_norm else ()
    eps = 1e-6 if norms else 0.0
    heads = (shape.heads, shape.kv_heads, shape.head_dim)
    words = args_of("qkv", *norms, "table:weight", "kv:kv", "q!")
    yield desc.QkvWrite(words, *heads, eps, eps, shape.head_dim, False, "bf16", 64)
    yield desc.Attention(args_of("q", "kv:kv", "out!"), *heads, "bf16", 64, shape.head_dim**-0.5, 0, "bf16")
    yield linear(shape.hidden, attended)
    yield linear(2 * shape.inner, shape.hidden, swiglu=shape.inner)
    yield linear(shape.hidden, shape.inner)
    yield linear(shape.vocab, shape.hidden, gather=True)
    yield desc.GatherRows(args_of("x", "out!"), shape.hidden, "bf16")
    reads = ((0, 0, 0, 1), (0, shape.inner, 0, 1))
    nodes = (desc.Node("silu", (0,)), desc.Node("mul", (2, 1)))
    segment = desc.Segment(1, shape.inner, 0, 0, reads, nodes, (3,))
    leaves = (desc.Leaf("f32", 2 * shape.inner),)
    yield desc.Elementwise(args_of("a0", "y0!"), "T", shape.inner, leaves, (segment,), ("bf16",))


def linear(n: int, k: int, *, swiglu: int = 0, gather: bool = False) -> KernelDesc:
    words, out = args_of("x", "weight:weight", "out!"), "bf16" if swiglu else "f32"
    return desc.Linear(words, "L" if gather else "T", gather, 1, k, n, "bf16", 0, swiglu, out)


def launches(
    shape: Shape | Routed | Latent, target: GpuTarget, buckets: tuple[int, ...] = BUCKETS
) -> Iterator[GpuLaunch]:
    for made in descriptions(shape):
        for tokens in buckets:
            yield from choose(made, target, Rows(tokens, min(tokens, 64))).launches
