"""What `tscompile explain` says of a plan: where every value lies, what moves between ranks and what that is
predicted to cost, what each rank holds. Needs no torch: graph and weights lie in the plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tscompile.inspect import alike, of_any_layer, size, table
from tscompile.ir import DTYPES, Graph, Op, Sym, Value
from tscompile.parser import parse
from tscompile.placement import Replicate
from tscompile.reader import Plan
from tscompile.topology import Topology, topology_of

NOTE = (
    "R: every rank holds it whole. S(d): each its part along dim d; of rows of experts those of its experts, "
    "S(d,T): those of its tokens. P(sum): each a term of the sum. O: of a KV cache, each the tokens of "
    "its own sequences (dp) or positions (cp). stage(i): rank i alone."
)


def explain(path: Path) -> dict[str, Any]:
    """Layers that are alike are told once, with how many there are. A part for each bucket of tokens that is
    placed in its own way."""
    plan = Plan(path)
    target = plan.manifest["targets"][0]
    program = plan.json(f"tsp/program/{target}")
    placed = plan.json("tsp/placements")
    placements = {found["max_tokens"]: found["ops"] for found in placed["buckets"]}
    overlaps = {found["max_tokens"]: found["collectives"] for found in placed["overlaps"]}
    parts, fewer = [], 0
    for most, graph in graphs_of(plan, program["limits"]["max_tokens"]):
        sizes = [tokens for tokens in sizes_of(program["limits"]) if fewer < tokens < most]
        parts.append(
            {
                "min_tokens": fewer + 1,
                "max_tokens": most,
                "values": alike(values_of(graph)),
                "placements": placements.get(most, []),
                "collectives": alike(collectives_of(graph, target, program["limits"], [*sizes, most])),
                "overlaps": overlaps.get(most, []),
            }
        )
        fewer = most
    return {
        "mesh": dict(plan.manifest["mesh"]),
        "stages": list(stages_of(placed, program)),
        "steps": parts,
        "weights": alike(weights_of(plan, program)),
        "roofline": plan.json("tsp/roofline") if "tsp/roofline" in plan.entries else {},
    }


def graphs_of(plan: Plan, max_tokens: int) -> Iterator[tuple[int, Graph]]:
    """The most tokens of a step, and its graph; the smallest first."""
    prefix = "tsp/graph/"
    names = [name for name in plan.entries if name.startswith(prefix)]
    smaller = sorted((int(name.removeprefix(prefix)), name) for name in names)
    for most, name in [*smaller, (max_tokens, "tsp/graph")]:
        yield most, parse(bytes(plan.bytes(name)).decode())


def values_of(graph: Graph) -> Iterator[dict[str, Any]]:
    made_by: list[tuple[str, Sequence[Value]]] = [("weight", graph.weights), ("input", graph.inputs)]
    made_by += [(group.group, group.outputs) for group in graph.groups()]
    for maker, values in made_by:
        for value in values:
            placement = value.placement or (Replicate(),) * len(graph.mesh.axes)
            yield {
                "value": of_any_layer(value.name),
                "made_by": maker,
                "dtype": value.dtype,
                "shape": [dim if isinstance(dim, int) else str(dim) for dim in value.shape],
                "state": value.state,
                "placement": dict(zip(graph.mesh.names, map(str, placement), strict=True)),
            }


def sizes_of(limits: Mapping[str, int]) -> list[int]:
    """Tokens of a step: 1, 8, 64, ..., and the most that the plan allows."""
    most = limits["max_tokens"]
    return [*(8**i for i in range(math.ceil(math.log(most, 8)))), most]


def collectives_of(
    graph: Graph, target: str, limits: Mapping[str, int], sizes: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """sizes: tokens of a step. Predictions come from the target's topology, as those of the search that
    placed the model."""
    machine = topology_of(target)
    for group in graph.groups():
        for op in group.body:
            if "axis" not in op.attrs:
                continue
            ranks = graph.mesh.size(str(op.attrs["axis"]))
            ends: dict[str, Any] = {end: op.attrs[end] for end in ("src", "dst") if end in op.attrs}
            # stages are farthest apart
            apart = graph.mesh.num_ranks if ends else ranks
            yield {
                "collective": op.kind,
                **ends,
                "axis": op.attrs["axis"],
                "ranks": ranks,
                "value": of_any_layer(op.inputs[0].name),
                "fused_into": "" if group.group in ("collective", "start") else group.group,
                "buckets": [bucket(op, tokens, limits, machine, apart) for tokens in sizes],
            }


def bucket(op: Op, tokens: int, limits: Mapping[str, int], machine: Topology, ranks: int) -> dict[str, Any]:
    """Of a step of `tokens` tokens: the bytes of the whole value, and what the collective takes."""
    rows = min(tokens, limits["max_seqs"])
    sizes = {"T": tokens, "S": rows, "L": rows, "P": 1}
    num_bytes = max(bytes_of(value, sizes) for value in (*op.inputs, *op.outputs))
    if op.kind == "slice":
        return {"tokens": tokens, "bytes": num_bytes, "us": 0.0, "algorithm": "nothing moves"}
    seconds, algorithm = machine.link(ranks).best(op.kind, num_bytes, ranks)
    us = round((seconds + machine.launch_s) * 1e6, 2)
    return {"tokens": tokens, "bytes": num_bytes, "us": us, "algorithm": algorithm}


def bytes_of(value: Value, sizes: Mapping[str, int]) -> int:
    dims = (dim.size(sizes) if isinstance(dim, Sym) else dim for dim in value.shape)
    return math.prod(dims) * DTYPES[value.dtype]


def launches_of(program: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Of all buckets of tokens."""
    for step in program["buckets"]:
        yield from step["launches"]


def stages_of(placements: Mapping[str, Any], program: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row a pipeline stage: its first and last value, its predicted microseconds in a step of so many
    tokens as on one rank of the other axes, and what one of its ranks holds."""
    for row in placements["stages"]:
        launches = [x for x in launches_of(program) if x.get("stage") == row["stage"]]
        arguments = [argument for launch in launches for argument in launch["args"]]
        weights = {x["weight"]: x["bytes"] for x in arguments if "weight" in x}
        layers = {x["kv"] for x in arguments if "kv" in x}
        yield {**row, "layers": len(layers), "weights_bytes": sum(weights.values())}


def weights_of(plan: Plan, program: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row a weight as stored: what one rank holds of it, how many different shards there are, and the
    pipeline stages whose ranks alone hold it, if there are stages."""
    read: dict[str, set[int]] = {}
    for launch in launches_of(program):
        for argument in launch["args"]:
            if "weight" in argument and "stage" in launch:
                read.setdefault(argument["weight"], set()).add(launch["stage"])
    shards: dict[str, list[int]] = {}
    for name, entry in plan.manifest["entries"].items():
        if entry["kind"] == "weight":
            shards.setdefault(name.partition("@")[0], []).append(entry["bytes"])
    for name, sizes in shards.items():
        yield {
            "weight": of_any_layer(name),
            "bytes_a_rank": sizes[0],
            "bytes": sum(sizes),
            "share": f"1/{len(sizes)}" if len(sizes) > 1 else "whole",
            "stages": sorted(read.get(name, ())),
        }


def explain_text(report: dict[str, Any]) -> str:
    """For people."""
    lines = ["mesh  " + " x ".join(f"{axis}={ranks}" for axis, ranks in report["mesh"].items()), NOTE]
    lines += stage_lines(report["stages"])
    for part in report["steps"]:
        lines += ["", f"steps of {part['min_tokens']:,} to {part['max_tokens']:,} tokens", ""]
        lines += [*value_lines(part["values"], list(report["mesh"])), ""]
        lines += [*placement_lines(part), *collective_lines(part["collectives"])]
        lines += overlap_lines(part)
    held = size(sum(w["bytes_a_rank"] * w["count"] for w in report["weights"]))
    if report["stages"]:
        held = f"up to {size(max(stage['weights_bytes'] for stage in report['stages']))}"
    weights = (
        (
            w["weight"],
            f"x{w['count']}",
            f"{w['bytes_a_rank']:,}",
            w["share"],
            ", ".join(map(str, w["stages"])) or "every",
        )
        for w in report["weights"]
    )
    head = ("weight", "", "bytes", "share", "stage")
    lines += ["", f"weights: a rank holds {held}", *table(head, weights)]
    for target, bounds in report["roofline"].items():
        lines += roofline_lines(target, bounds)
    return "\n".join(lines) + "\n"


def roofline_lines(target: str, bounds: dict[str, Any]) -> list[str]:
    """What the kernels of a GPU target can take at best, by bucket of tokens."""
    lines = ["", f"kernels of {target}: bounds from shapes and machine, nothing measured; contexts of "]
    lines[-1] += f"{bounds['context']:,} tokens"
    head = ("kernels", "op", "", "GFLOP", "MB", "bound", "us", "blocks", "a SM", "threads", "waves")
    for bucket in bounds["buckets"]:
        rows = (
            (
                " + ".join(step["kernels"]),
                step["op"],
                f"x{step['count']}",
                f"{step['flops'] / 1e9:.3f}",
                f"{step['bytes'] / 1e6:.3f}",
                step["bound"],
                f"{step['ns'] / 1e3:.2f}",
                f"{step['blocks']:,}",
                str(step["blocks_per_sm"]),
                f"{step['occupancy_percent']} %",
                f"{step['waves']:,}",
            )
            for step in bucket["steps"]
        )
        total = sum(step["ns"] * step["count"] for step in bucket["steps"]) / 1e3
        lines += ["", f"steps of up to {bucket['max_tokens']:,} tokens: at best {total:,.1f} us"]
        lines += table(head, rows)
    return lines


def value_lines(values: Sequence[dict[str, Any]], axes: Sequence[str]) -> list[str]:
    rows = (
        (
            f"{'state ' if v['state'] else ''}{v['value']}",
            f"{v['dtype']}[{', '.join(map(str, v['shape']))}]",
            v["made_by"],
            f"x{v['count']}",
            *(v["placement"][axis] for axis in axes),
        )
        for v in values
    )
    return table(("value", "type", "made by", "", *axes), rows)


def stage_lines(stages: Sequence[dict[str, Any]]) -> list[str]:
    """The pipeline stages, if there are any."""
    if not stages:
        return []
    rows = (
        (
            str(s["stage"]),
            f"{s['first']} to {s['last']}",
            f"{s['us']:g} us",
            str(s["layers"]),
            size(s["weights_bytes"]),
        )
        for s in stages
    )
    title = (
        f"stages: predicted for a step of {stages[0]['tokens']:,} tokens; they work one after the other, so "
        "a step is their sum"
    )
    return ["", title, *table(("stage", "values", "takes", "layers", "weights"), rows)]


def placement_lines(part: dict[str, Any]) -> list[str]:
    """Why each op lies as it does."""
    if not part["placements"]:
        return []

    def other(found: dict[str, Any]) -> str:
        return f"{found['sharded']} ({found['placements']}) {found['us_more']:+g} us"

    rows = (
        (
            f"{row['op']} -> {', '.join(row['values'])}",
            f"x{row['count']}",
            row["at"],
            row["axis"],
            f"{row['sharded']} of {row['rule']}",
            row["placements"],
            f"{row['us']:g} us",
            "; ".join(other(found) for found in row["others"] if found["us_more"] is not None) or "-",
        )
        for row in part["placements"]
    )
    title = (
        f"why: the factor of each op's rule that is sharded, and what else the rule allows, in a step of "
        f"{part['max_tokens']:,} tokens, all else left as it is; weights and caches lie alike for all sizes"
    )
    head = ("op", "", "at", "axis", "sharded", "takes -> gives", "cost", "instead")
    return [title, *table(head, rows), ""]


def collective_lines(collectives: Sequence[dict[str, Any]]) -> list[str]:
    if not collectives:
        return ["collectives: none"]
    heads = [f"{b['tokens']} tokens" for b in collectives[0]["buckets"]]
    rows = (
        (
            c["collective"]
            + (f" {c['src']} -> {c['dst']}" if "src" in c else "")
            + (f" in {c['fused_into']}" if c["fused_into"] else ""),
            f"{c['axis']}={c['ranks']}",
            c["value"],
            f"x{c['count']}",
            *(f"{size(b['bytes'])}, {b['us']:g} us by {b['algorithm']}" for b in c["buckets"]),
        )
        for c in collectives
    )
    title = "collectives: bytes of the whole value and predicted time, by tokens of a step"
    if any(c["collective"] == "ragged_all_to_all" for c in collectives):
        title += "; ragged ones as if every expert had as many rows"
    return [title, *table(("collective", "over", "value", "", *heads), rows)]


def overlap_lines(part: dict[str, Any]) -> list[str]:
    """What runs while a collective is in flight, or why nothing does."""
    if not part["overlaps"]:
        return []
    rows = (
        (
            row["collective"],
            row["axis"],
            row["value"],
            f"x{row['count']}",
            f"{row['us']:g} us",
            f"{row['us_hidden']:g} us",
            f"{', '.join(row['beside'])} ({row['us_beside']:g} us)" if row["beside"] else row["why_not"],
        )
        for row in part["overlaps"]
    )
    hidden = sum(row["us_hidden"] * row["count"] for row in part["overlaps"])
    title = (
        f"overlap: in a step of {part['max_tokens']:,} tokens, what runs while collectives are in flight is "
        f"predicted to hide {hidden:g} us of them"
    )
    return ["", title, *table(("collective", "over", "value", "", "takes", "hidden", "beside"), rows)]
