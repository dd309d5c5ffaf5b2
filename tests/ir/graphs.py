"""Random graphs: well-typed by construction, with every kind of dim, attr, recipe and placement that the text
must carry."""

from __future__ import annotations

import random

from tscompile.errors import Source
from tscompile.ir import BATCH_ARRAYS, Attr, Graph, Group, Op, Value, Weight, unique
from tscompile.mesh import Mesh
from tscompile.ops import ShapeError, lookup
from tscompile.placement import Partial, Placement, Replicate, Shard
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
)

UNARY = ("neg", "silu", "sigmoid", "relu", "gelu_tanh")


def random_recipe(rng: random.Random, depth: int = 0) -> Recipe:
    names = ("a", "b.c-d", 'quoted "name"\\', "naïve.权重")
    if depth == 3 or rng.random() < 0.4:
        return Checkpoint(rng.choice(names))
    parts = tuple(random_recipe(rng, depth + 1) for _ in range(rng.randint(1, 3)))
    return rng.choice(
        [
            Concat(parts, rng.randint(0, 1)),
            Interleave(parts, 16, rng.randint(0, 1)),
            Stack(parts),
            Arange(7),
            Slice(parts[0], 0, 3, 7),
            ShardOf(parts[0], 1, "tp"),
            Pad(parts[0], 0, 12),
            Repeat(parts[0], 1, 2, 4),
            RopeTable(4, (1.0, rng.random() * 1e-9), 1.25),
        ]
    )


def random_placement(rng: random.Random, rank: int) -> Placement:
    choices: list[Placement] = [Replicate(), Partial(), Partial("max")]
    return rng.choice(choices + [Shard(dim) for dim in range(rank)])


def random_graph(seed: int) -> Graph:
    """Elementwise chains over [T, n] with casts, reshapes, splits, concats and linears; some of it in
    groups."""
    rng = random.Random(seed)
    graph = Graph(f"g{seed}", rng.choice([Mesh(), Mesh((("dp", 2), ("tp", 4)))]))
    ids = Value("token_ids", BATCH_ARRAYS["token_ids"], "i32")
    graph.inputs = [ids, Value("kv.0", (2, 8), rng.choice(["f32", "bf16"]), state=True)]
    table = Weight("w0", (10, 16), "f32", recipe=random_recipe(rng))
    graph.weights = [table]
    live = list(emit(graph, rng, "embedding", [ids, table], {"vocab_axis": ""}))
    for _ in range(rng.randint(1, 25)):
        live += step(graph, rng, live)
    graph.outputs = [live[-1]]
    for value in graph.values():
        value.placement = tuple(random_placement(rng, len(value.shape)) for _ in graph.mesh.axes)
    wrap_some(graph, rng)
    return graph


def step(graph: Graph, rng: random.Random, live: list[Value]) -> list[Value]:  # noqa: PLR0911 (one a kind)
    x = rng.choice(live)
    width = x.shape[-1]
    assert isinstance(width, int)
    match rng.randint(0, 6):
        case 0:
            return emit(graph, rng, rng.choice(UNARY), [x], {})
        case 1:
            return emit(graph, rng, "scale", [x], {"value": rng.choice([0.1, -3.0, 1e-30, 2.5e20])})
        case 2:
            return emit(graph, rng, rng.choice(["add", "mul", "sub"]), [x, rng.choice(live)], {})
        case 3 if width > 2:
            return emit(graph, rng, "split", [x], {"sizes": (1, width - 1)})
        case 4:
            return emit(graph, rng, "concat", [x, rng.choice(live), x], {})
        case 5 if len(x.shape) == 2:
            weight = Weight(
                f"w{len(graph.weights)}", (rng.randint(1, 9), width), "f32", recipe=random_recipe(rng)
            )
            graph.weights.append(weight)
            return emit(graph, rng, "linear", [x, weight], {})
        case 6:
            return emit(
                graph, rng, "reshape", [x], {"shape": (-1, *([1] * rng.randint(0, 2)), x.row_elements)}
            )
    return []


def emit(
    graph: Graph, rng: random.Random, kind: str, inputs: list[Value], attrs: dict[str, Attr]
) -> list[Value]:
    """The op's outputs, or nothing if its rule says that the inputs do not fit."""
    try:
        types = lookup(kind).infer(inputs, attrs)
    except ShapeError:
        return []
    number = sum(len(op.outputs) for op in graph.ops)
    outputs = [Value(f"v.{number + i}", t.shape, t.dtype) for i, t in enumerate(types)]
    source = rng.choice([None, Source("models/a b.py", rng.randint(1, 999))])
    graph.ops.append(Op(kind, inputs, outputs, attrs, source))
    return outputs


def wrap_some(graph: Graph, rng: random.Random) -> None:
    """Some single ops become groups of one."""
    for index, op in enumerate(graph.ops):
        if rng.random() < 0.3:
            graph.ops[index] = Group(
                "group", unique(op.inputs), list(op.outputs), {}, op.source, group="elementwise", body=[op]
            )
