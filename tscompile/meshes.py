"""`tscompile plan`: which mesh of ranks a model fits, and how long a step takes there, without a build.

From config.json alone: the model file is captured on the meta device, and every mesh is placed as a build
would place it for steps that decode, at the same prices; of layers that are alike, a few are
(tscompile/layers.py). Predicted times are those of the cost model: of the
kernels' arithmetic and reading at the machine's peak, and of the collectives, one after the other. They rank
meshes; no benchmark has set them.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

from tscompile import inspect, models
from tscompile.build import Build, Options
from tscompile.checkpoint import read_json
from tscompile.errors import CompileError
from tscompile.ir import DTYPES, Graph, Op, Value, Weight, stage_of
from tscompile.layers import KEPT, Folded, Layers
from tscompile.mesh import Mesh
from tscompile.ops.base import ints, num_bytes
from tscompile.passes import canonicalize, context, expand, fit, precision, propagate, reshard, stages
from tscompile.passes.capture import traced
from tscompile.placement import parse_placement
from tscompile.price import Prices, collective_of
from tscompile.search import Earlier, Solved, settled
from tscompile.sharding import divisors
from tscompile.topology import topology_of

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Load:
    """What is to be served: `sequences` at once, each with `context` tokens, and prompts in chunks."""

    context: int = 8192
    sequences: int = 64
    chunk: int = 8192  # tokens of a step that reads prompts


def rank_meshes(
    folder: Path, ranks: int, target: str, load: Load, say: Progress = lambda _: None
) -> dict[str, Any]:
    """The meshes of `ranks` ranks, those that fit first, the quickest to decode first among them. folder: has
    config.json. CompileError if nothing can be placed at all."""
    machine = topology_of(target)
    config = read_json(folder / "config.json")
    options = Options(models.find_for(folder), folder, targets=(target,))
    say(f"capturing {options.model.name} without weights")
    builder, *_ = traced(options, config, Mesh())
    build = Build(options, cast(Any, None), Mesh(), builder.graph)
    for step in (expand, precision, canonicalize):
        step.run(build)
    asked, rows = meshes(ranks, has_experts(build.graph)), list[dict[str, Any]]()
    planner = Planner(build.graph, options, load, target)
    for number, (mesh, row) in enumerate(zip(asked, planner.rows(asked), strict=True), 1):
        say(f"{number:2}/{len(asked)} {mesh}")
        rows.append(row)
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


class Planner:
    """Places one model on one mesh after the other. What meshes have in common is done once: what cp and tp
    alone change in the graph, and what the search of an axis has solved."""

    def __init__(self, graph: Graph, options: Options, load: Load, target: str) -> None:
        self.graph, self.options, self.load = graph, options, load
        self.decode, self.prefill = (
            Prices.of(target, tokens, load.sequences, load.context) for tokens in (load.sequences, load.chunk)
        )
        self.decoding, self.reading = dict[object, Solved](), dict[object, Solved]()
        self.fitted: dict[tuple[int, int], tuple[Layers, list[str]]] = {}
        self.pieces: dict[tuple[int, int], list[stages.Piece]] = {}

    def rows(self, meshes: Sequence[Mesh]) -> Iterator[dict[str, Any]]:
        """One a mesh, in order; every core works on some."""
        cores = min(len(os.sched_getaffinity(0)), len(meshes))
        if cores == 1:
            yield from map(self.row, meshes)
            return
        # Forked, so that they have the graph, and what was imported.
        with ProcessPoolExecutor(cores, get_context("fork"), _of_worker.append, (self,)) as pool:
            yield from pool.map(_row, meshes)

    def row(self, mesh: Mesh) -> dict[str, Any]:
        """What `tscompile plan` says of a mesh: memory, and times; or why there is none."""
        row: dict[str, Any] = {"mesh": dict(mesh.axes), "why_not": ""}
        try:
            placed = next(filter(None, (self._placed(mesh, kept) for kept in (KEPT, sys.maxsize))))
        except CompileError as error:
            return {**row, "why_not": str(error)}
        row |= _memory(placed.decoding, placed.folded, self.load) | {"notes": placed.notes}
        for name, prices, graph in (
            ("decode", self.decode, placed.decoding),
            ("prefill", self.prefill, placed.reading),
        ):
            reshard.reshard(graph)
            row |= _times(graph, placed.folded, prices, name)
        row["stages"] = _stages(placed.decoding, placed.folded, self.decode, self.load)
        short = row["weights_bytes"] + row["kv_bytes"] - self.decode.topology.memory_bytes
        if short > 0:
            row["why_not"] = f"a rank lacks {inspect.size(int(short))} of memory"
        return row

    def _placed(self, mesh: Mesh, kept: int) -> Placed | None:
        """With so many of the layers that are alike in a row; None if that does not say where all would
        lie."""
        layers, notes = self._fitted(mesh)
        folded = layers.fold(self._firsts(mesh, layers), kept)
        build = Build(self.options, cast(Any, None), mesh, folded.graph)
        build.graph.mesh = mesh
        if mesh.stage_axis >= 0:
            stages.put(build.graph, folded.firsts)
        searches = propagate.place(build, self.decode, self.decoding)
        said = [note for s in searches for note in propagate.whole_weights(s, folded.count)]
        reading = build.graph.copy()
        searches += propagate.replace(reading, self.prefill, self.reading)
        if not all(map(folded.steady, searches)):
            return None
        return Placed(folded, build.graph, reading, [*notes, *said])

    def _fitted(self, mesh: Mesh) -> tuple[Layers, list[str]]:
        """The model as `fit` leaves it, and what that noted."""
        key = (mesh.num_parts, dict(mesh.axes).get(fit.AXIS, 1))
        if key not in self.fitted:
            build = Build(self.options, cast(Any, None), mesh, self.graph.copy())
            context.run(build)
            fit.run(build)
            self.fitted[key] = Layers(build.graph), build.notes
        return self.fitted[key]

    def _firsts(self, mesh: Mesh, layers: Layers) -> list[int]:
        """The first op of each pipeline stage."""
        if mesh.stage_axis < 0:
            return [0]
        key = (mesh.num_parts, dict(mesh.axes).get(fit.AXIS, 1))
        if key not in self.pieces:
            self.pieces[key] = stages.pieces_of(layers.graph, self.decode)
        pieces = self.pieces[key]
        starts, _ = stages.starts_of(layers.graph, mesh, pieces, self.decode)
        return stages.first_ops(pieces, starts)


_of_worker: list[Planner] = []  # a worker process has one


def _row(mesh: Mesh) -> dict[str, Any]:
    return _of_worker[0].row(mesh)


@dataclass(frozen=True)
class Placed:
    """folded: what of the model is placed; decoding, reading: for either kind of step."""

    folded: Folded
    decoding: Graph
    reading: Graph
    notes: list[str]


def _memory(graph: Graph, folded: Folded, load: Load) -> dict[str, int]:
    """Bytes of one rank: of the stage that has most."""
    cut = settled(graph, len(graph.mesh.axes))
    of_stages = [_held(graph, folded, cut, load, stage) for stage in range(_num_stages(graph))]
    return max(of_stages, key=lambda held: sum(held.values()))


def _num_stages(graph: Graph) -> int:
    index = graph.mesh.stage_axis
    return graph.mesh.axes[index][1] if index >= 0 else 1


def _held(graph: Graph, folded: Folded, cut: Earlier, load: Load, stage: int) -> dict[str, int]:
    """Bytes of one rank of a stage."""
    counts, tokens = folded.of_each_value(graph), load.context * load.sequences
    weights, states = (
        [(v, counts[id(v)]) for v in values if stage_of(v) in (stage, None)]
        for values in (graph.weights, graph.states)
    )
    return {
        "weights_bytes": sum(count * (num_bytes([w], {}) // cut.parts(w)) for w, count in weights),
        "kv_bytes": sum(count * (tokens * _bytes_a_token(s) // cut.parts(s)) for s, count in states),
    }


def _stages(graph: Graph, folded: Folded, prices: Prices, load: Load) -> list[dict[str, Any]]:
    """What a rank of each pipeline stage holds, and the seconds of a step that it decodes in. A step runs the
    stages one after the other: only more batches in flight than one would keep all of them at work."""
    if graph.mesh.stage_axis < 0:
        return []
    cut, seconds = settled(graph, len(graph.mesh.axes)), [0.0] * _num_stages(graph)
    for op, count in folded.of_each_op(graph):
        found = [s for v in (op.inputs[0], op.outputs[0]) if (s := stage_of(v)) is not None]
        if found:  # what is sent is its sender's
            seconds[found[0]] += count * _seconds(graph, op, cut, prices)
    counts = folded.of_each_value(graph)
    return [
        {
            "decode_s": of_stage,
            "layers": sum(counts[id(state)] for state in graph.states if stage_of(state) == stage),
            **_held(graph, folded, cut, load, stage),
        }
        for stage, of_stage in enumerate(seconds)
    ]


def _bytes_a_token(state: Value) -> int:
    """Of one layer: keys and values by head, or one latent for both."""
    shape = ints(state.shape)
    return math.prod(shape) * (2 if len(shape) > 1 else 1) * DTYPES[state.dtype]


def _times(graph: Graph, folded: Folded, prices: Prices, name: str) -> dict[str, float]:
    """Of one step: seconds in all, and of the collectives, and how many they are."""
    cut, total, moving, collectives = settled(graph, len(graph.mesh.axes)), 0.0, 0.0, 0
    for op, count in folded.of_each_op(graph):
        seconds = count * _seconds(graph, op, cut, prices)
        total += seconds
        if op.kind == "redistribute" and seconds:
            moving, collectives = moving + seconds, collectives + count
    return {f"{name}_s": total, f"{name}_collectives_s": moving, f"{name}_collectives": collectives}


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
