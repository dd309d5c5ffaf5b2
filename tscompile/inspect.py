"""What `tscompile inspect` and `tscompile explain` say of a plan. Needs no torch: the reports lie in the
plan."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tscompile.ir import Value
from tscompile.parser import parse
from tscompile.placement import Replicate
from tscompile.reader import Plan


def inspect(path: Path) -> dict[str, Any]:
    """All that `inspect` shows, as JSON. Checks the plan whole, weights too; CompileError says what is wrong
    with it."""
    plan = Plan(path)
    plan.verify_weights()
    manifest = plan.manifest
    steps = {item["weight"]: item["steps"] for item in plan.json("tsp/pack")}
    entries = [
        {"name": name, **manifest["entries"][name]} for name in plan.entries if name in manifest["entries"]
    ]
    return {
        "bytes": plan.size,
        "schema": manifest["schema"],
        "model": manifest["model"],
        "producer": manifest["producer"],
        "targets": [
            {
                **plan.json(f"tsp/program/{target}"),
                "kernels_bytes": len(plan.bytes(f"tsp/kernels/{target}")),
            }
            for target in manifest["targets"]
        ],
        "weights": [{**e, "steps": steps[e["name"]]} for e in entries if e["kind"] == "weight"],
        "sections": [e for e in entries if e["kind"] != "weight"],
        "receipts": plan.json("tsp/receipts"),
    }


def explain(path: Path) -> dict[str, Any]:
    """How every value that a kernel makes, every weight and KV state lies over the ranks. Layers that are
    alike are told once."""
    plan = Plan(path)
    graph = parse(bytes(plan.bytes("tsp/graph")).decode())
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    made_by: list[tuple[str, Sequence[Value]]] = [("weight", graph.weights), ("input", graph.inputs)]
    made_by += [(group.group, group.outputs) for group in graph.groups()]
    for maker, values in made_by:
        for value in values:
            shape = [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
            placement = value.placement or (Replicate(),) * len(graph.mesh.axes)
            row = {
                "value": re.sub(r"(?<=\.)\d+(?=\.)", "*", value.name),
                "made_by": maker,
                "dtype": value.dtype,
                "shape": shape,
                "state": value.state,
                "placement": dict(zip(graph.mesh.names, map(str, placement), strict=True)),
            }
            kept = rows.setdefault(tuple(map(str, row.values())), {**row, "count": 0})
            kept["count"] += 1
    return {"mesh": dict(graph.mesh.axes), "values": list(rows.values())}


def to_json(report: dict[str, Any]) -> str:
    return json.dumps(report, ensure_ascii=False)


def inspect_text(report: dict[str, Any]) -> str:
    """For people."""
    model, producer = report["model"], report["producer"]
    ends = ", ".join(map(str, model["eos_token_ids"])) or "none"
    lines = [
        f"model     {model['name']} ({model['architecture']}), {model['dtype']}, vocabulary "
        f"{model['vocab_size']:,}, context {model['max_context']:,}, end tokens {ends}",
        f"producer  tscompile {producer['tscompile']}, {producer['compiler']}",
        f"file      {size(report['bytes'])}, schema {report['schema']}; every hash was checked and is right",
    ]
    lines += [
        "",
        "weights",
        *table(("name", "dtype", "stored shape", "bytes", "steps", "sha256"), weight_rows(report)),
    ]
    sections = ((e["name"], e["kind"], f"{e['bytes']:,}", e["sha256"][:16]) for e in report["sections"])
    lines += ["", "sections", *table(("name", "kind", "bytes", "sha256"), sections)]
    lines += ["", "fusion receipts", *receipt_lines(report["receipts"])]
    for target in report["targets"]:
        lines += ["", *target_lines(target)]
    return "\n".join(lines) + "\n"


def explain_text(report: dict[str, Any]) -> str:
    """For people: R replicated, S(dim) a part along dim, P(sum) a term of a sum."""
    axes = list(report["mesh"])
    ranks = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    rows = (
        (
            f"{'state ' if v['state'] else ''}{v['value']}",
            f"{v['dtype']}[{', '.join(map(str, v['shape']))}]",
            v["made_by"],
            f"x{v['count']}",
            *(v["placement"][axis] for axis in axes),
        )
        for v in report["values"]
    )
    note = "R: every rank holds it whole. S(d): each its part along dim d. P(sum): each a term of the sum."
    return (
        "\n".join([f"mesh  {ranks}", note, "", *table(("value", "type", "made by", "", *axes), rows)]) + "\n"
    )


def weight_rows(report: dict[str, Any]) -> Iterable[Sequence[str]]:
    for entry in report["weights"]:
        shape = " x ".join(map(str, entry["shape"]))
        steps = " > ".join(step_text(step) for step in entry["steps"])
        yield entry["name"], entry["dtype"], shape, f"{entry['bytes']:,}", steps, entry["sha256"][:16]


def step_text(step: dict[str, Any]) -> str:
    match step["step"]:
        case "read":
            return f"read {', '.join(t['name'] + ' ' + t['dtype'] for t in step['tensors'])}"
        case "cast":
            return f"cast to {step['to']}"
        case "merge" | "compute":
            return str(step["recipe"]).partition("(")[0]
        case "layout":
            return f"layout {step['layout']}"
        case other:
            return str(other)


def receipt_lines(receipts: Sequence[dict[str, Any]]) -> list[str]:
    """A line a pattern: how often it matched; below it each place where it did not, and why."""
    lines = []
    for pattern in dict.fromkeys(r["pattern"] for r in receipts):
        tried = [r for r in receipts if r["pattern"] == pattern]
        matched = sum(r["matched"] for r in tried)
        lines.append(f"  {pattern}: matched {matched} of {len(tried)}")
        lines += [
            f"    not at {r['where']} ({r['source']}): {r['reason']}" for r in tried if not r["matched"]
        ]
    return lines or ["  none"]


def target_lines(target: dict[str, Any]) -> list[str]:
    limits, kv = target["limits"], target["kv"]
    buffers = target["buffers"]
    unshared = sum(buffer["bytes"] for buffer in buffers)
    lines = [
        f"{target['target']}: {len(target['launches'])} launches a step of up to {limits['max_tokens']} "
        f"tokens and {limits['max_seqs']} sequences; kernels {size(target['kernels_bytes'])}",
        f"  arena {size(target['arena_bytes'])} for {len(buffers)} buffers of {size(unshared)}; KV cache "
        f"{size(kv['page_bytes'] * kv['num_layers'])} a page of {limits['page_size']} tokens",
    ]

    def text(argument: dict[str, Any]) -> str:
        if "buffer" in argument:
            return f"%{buffers[argument['buffer']]['name']}"
        return f"@{argument['weight']}" if "weight" in argument else f"kv.{argument['kv']}"

    rows = (
        (str(index), launch["kernel"], launch["op"], " ".join(text(argument) for argument in launch["args"]))
        for index, launch in enumerate(target["launches"])
    )
    return lines + table(("", "kernel", "op", "arguments"), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as they need to be; those of numbers to the right."""
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    right = [all(re.fullmatch(r"[\d,]*", row[i]) for row in rows[1:]) for i in range(len(head))]
    return [
        "  "
        + "  ".join(
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def size(num_bytes: int) -> str:
    """1536 -> "1.5 KiB"."""
    value, units = float(num_bytes), ["KiB", "MiB", "GiB", "TiB"]
    if value < 1024:
        return f"{num_bytes} bytes"
    while value >= 1024 and units:
        value, unit = value / 1024, units.pop(0)
    return f"{value:.1f} {unit}"
