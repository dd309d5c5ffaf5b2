"""`tscompile plan`: which mesh of ranks a model fits, and how long a step takes there, without a build.

From config.json alone: the model file is captured on the meta device, and every mesh is placed as a build
would place it for steps that decode, at the same prices. Predicted times are those of the cost model: of the
kernels' arithmetic and reading at the machine's peak, and of the collectives, one after the other. They rank
meshes; no benchmark has set them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tscompile import inspect, models
from tscompile.build import Build, Options
from tscompile.checkpoint import read_json
from tscompile.errors import CompileError
from tscompile.ir import DTYPES, Graph, Op, Value, Weight, stage_of
from tscompile.mesh import Mesh
from tscompile.ops.base import ints, num_bytes
from tscompile.passes import canonicalize, context, expand, fit, precision, propagate, reshard, stages
from tscompile.passes.capture import traced
from tscompile.placement import parse_placement
from tscompile.price import Prices, collective_of
from tscompile.search import Earlier, settled
from tscompile.sharding import divisors
from tscompile.topology import topology_of


@dataclass(frozen=True)
class Load:
    """What is to be served: `sequences` at once, each with `context` tokens, and prompts in chunks."""

    context: int = 8192
    sequences: int = 64
    chunk: int = 8192  # tokens of a step that reads prompts


def rank_meshes(folder: Path, ranks: int, target: str, load: Load, dtype: str = "bf16") -> dict[str, Any]:
    """The meshes of `ranks` ranks, those that fit first, the quickest to decode first among them. folder: has
    config.json. CompileError if nothing can be placed at all."""
    machine = topology_of(target)
    config = read_json(folder / "config.json")
    options = Options(models.find_for(folder), folder, targets=(target,), dtype=dtype)
    builder, *_ = traced(options, config, Mesh())
    build = Build(options, cast(Any, None), Mesh(), builder.graph)
    for step in (expand, precision, canonicalize):
        step.run(build)
    rows = [
        _row(build.graph, options, mesh, load, target) for mesh in meshes(ranks, has_experts(build.graph))
    ]
    rows.sort(key=lambda row: (row["why_not"] != "", row.get("decode_s", math.inf)))
    if all("decode_s" not in row for row in rows):
        raise CompileError(f"no mesh of {ranks} ranks can hold the model: {rows[0]['why_not']}")
    return {
        "model": config.get("architectures", ["?"])[0],
        "target": target,
        "topology": machine.name,
        "context": load.context,
        "concurrency": load.sequences,
        "memory_bytes": int(machine.memory_bytes),
        "meshes": rows,
    }


def meshes(ranks: int, experts: bool) -> list[Mesh]:
    """Every product of pp, dp, ep, tp and cp of that many ranks, ep for experts."""
    found = []
    for pp in divisors(ranks):
        for dp in divisors(ranks // pp):
            for ep in divisors(ranks // pp // dp) if experts else [1]:
                for cp in divisors(ranks // pp // dp // ep):
                    tp = ranks // pp // dp // ep // cp
                    sizes = (("pp", pp), ("dp", dp), ("ep", ep), ("tp", tp), ("cp", cp))
                    found.append(Mesh(tuple((axis, n) for axis, n in sizes if n > 1) or (("tp", 1),)))
    return found


def has_experts(graph: Graph) -> bool:
    return any(value.routed for value in graph.values())


def _row(graph: Graph, options: Options, mesh: Mesh, load: Load, target: str) -> dict[str, Any]:
    row: dict[str, Any] = {"mesh": dict(mesh.axes), "why_not": ""}
    decode, prefill = (
        Prices.of(target, tokens, load.sequences, load.context) for tokens in (load.sequences, load.chunk)
    )
    build = Build(options, cast(Any, None), mesh, graph.copy())
    build.graph.mesh = mesh
    try:
        context.run(build)
        fit.run(build)
        if mesh.stage_axis >= 0:
            stages.cut(build.graph, decode)
        propagate.place(build, decode)
        reading = build.graph.copy()
        propagate.replace(reading, prefill)
    except CompileError as error:
        return {**row, "why_not": str(error)}
    row |= _memory(build.graph, load) | {"notes": build.notes}
    for name, prices, placed in (("decode", decode, build.graph), ("prefill", prefill, reading)):
        reshard.reshard(placed)
        row |= _times(placed, settled(placed, len(mesh.axes)), prices, name)
    row["stages"] = _stages(build.graph, decode, load)
    short = row["weights_bytes"] + row["kv_bytes"] - decode.topology.memory_bytes
    if short > 0:
        row["why_not"] = f"a rank lacks {inspect.size(int(short))} of memory"
    return row


def _memory(graph: Graph, load: Load) -> dict[str, int]:
    """Bytes of one rank: of the stage that has most."""
    cut = settled(graph, len(graph.mesh.axes))
    of_stages = [_held(graph, cut, load, stage) for stage in range(_num_stages(graph))]
    return max(of_stages, key=lambda held: sum(held.values()))


def _num_stages(graph: Graph) -> int:
    index = graph.mesh.stage_axis
    return graph.mesh.axes[index][1] if index >= 0 else 1


def _held(graph: Graph, cut: Earlier, load: Load, stage: int) -> dict[str, int]:
    """Bytes of one rank of a stage."""
    weights = sum(num_bytes([w], {}) // cut.parts(w) for w in graph.weights if stage_of(w) in (stage, None))
    tokens = load.context * load.sequences
    states = [state for state in graph.states if stage_of(state) in (stage, None)]
    return {
        "weights_bytes": weights,
        "kv_bytes": sum(tokens * _bytes_a_token(state) // cut.parts(state) for state in states),
    }


def _stages(graph: Graph, prices: Prices, load: Load) -> list[dict[str, Any]]:
    """What a rank of each pipeline stage holds, and the seconds of a step that it decodes in. A step runs the
    stages one after the other: only more batches in flight than one would keep all of them at work."""
    if graph.mesh.stage_axis < 0:
        return []
    cut, seconds = settled(graph, len(graph.mesh.axes)), [0.0] * _num_stages(graph)
    for op in graph.ops:
        found = [s for v in (op.inputs[0], op.outputs[0]) if (s := stage_of(v)) is not None]
        if found:  # what is sent is its sender's
            seconds[found[0]] += _seconds(graph, op, cut, prices)
    return [
        {
            "decode_s": of_stage,
            "layers": sum(stage_of(state) == stage for state in graph.states),
            **_held(graph, cut, load, stage),
        }
        for stage, of_stage in enumerate(seconds)
    ]


def _bytes_a_token(state: Value) -> int:
    """Of one layer: keys and values by head, or one latent for both."""
    shape = ints(state.shape)
    return math.prod(shape) * (2 if len(shape) > 1 else 1) * DTYPES[state.dtype]


def _times(graph: Graph, cut: Earlier, prices: Prices, name: str) -> dict[str, float]:
    """Of one step: seconds in all, and of the collectives, and how many they are."""
    total = moving = 0.0
    count = 0
    for op in graph.ops:
        seconds = _seconds(graph, op, cut, prices)
        total += seconds
        if op.kind == "redistribute" and seconds:
            moving, count = moving + seconds, count + 1
    return {f"{name}_s": total, f"{name}_collectives_s": moving, f"{name}_collectives": count}


def _seconds(graph: Graph, op: Op, cut: Earlier, prices: Prices) -> float:
    if op.kind == "redistribute":
        return _moving(graph, op, prices, cut.parts(op.inputs[0]))
    parts, _ = cut.op(op)
    held = min((cut.parts(v) for v in op.inputs if isinstance(v, Weight)), default=1)
    return prices.op(op, parts, held)


def _moving(graph: Graph, op: Op, prices: Prices, parts: int) -> float:
    source, target = (parse_placement(str(op.attrs[end])) for end in ("source", "target"))
    kind = collective_of(source, target)
    # stages are farthest apart
    ranks = graph.mesh.num_ranks if kind == "send" else graph.mesh.size(str(op.attrs["axis"]))
    if kind == "slice":
        return 0.0
    own = ranks if str(source).startswith("S") else 1  # parts over this axis are what is being moved
    return prices.collective(kind, prices.bytes_of(op.inputs[0]) * own // parts, ranks)[0]


def text(report: dict[str, Any]) -> str:
    """For people."""
    head = ("mesh", "weights", "KV cache", "decode ms", "tokens/s", "collectives", "prefill ms", "")
    rows = []
    for row in report["meshes"]:
        mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items())
        if "decode_s" not in row:
            rows.append((mesh, *[""] * 6, row["why_not"]))
            continue
        share = f"{row['decode_collectives']}, {row['decode_collectives_s'] / row['decode_s']:.0%}"
        rows.append(
            (
                mesh,
                inspect.size(row["weights_bytes"]),
                inspect.size(row["kv_bytes"]),
                f"{row['decode_s'] * 1e3:.2f}",
                f"{report['concurrency'] / row['decode_s']:,.0f}",
                share,
                f"{row['prefill_s'] * 1e3:.1f}",
                row["why_not"] or "fits",
            )
        )
    first = (
        f"{report['model']} on {report['target']} ({report['topology']}, "
        f"{inspect.size(report['memory_bytes'])} a rank): {report['concurrency']} sequences "
        f"of {report['context']:,} tokens"
    )
    note = "predicted: a rank's memory, a step that decodes all sequences, one that reads 8,192 tokens"
    if any("pp" in row["mesh"] for row in report["meshes"]):
        note += "\npp: memory of the fullest stage; stages work one after the other, on one batch at a time"
    return "\n".join([first, note, "", *inspect.table(head, rows)]) + "\n"
