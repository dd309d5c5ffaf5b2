"""What `tscompile inspect` says of a plan. Needs no torch: the reports lie in the plan."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
        "mesh": dict(manifest["mesh"]),
        "model": manifest["model"],
        "producer": manifest["producer"],
        "targets": [
            {
                **plan.json(f"tsp/program/{target}"),
                "kernels_bytes": len(plan.bytes(f"tsp/kernels/{target}")),
            }
            for target in manifest["targets"]
        ],
        "weights": [{**e, **shard_of(e["name"], steps)} for e in entries if e["kind"] == "weight"],
        "sections": [e for e in entries if e["kind"] != "weight"],
        "receipts": plan.json("tsp/receipts"),
        "verify": plan.json("tsp/verify"),
    }


def shard_of(entry: str, steps: Mapping[str, Any]) -> dict[str, Any]:
    """Of an entry's name: its weight, its coordinates on the axes that the weight is sharded over, and the
    steps that made it."""
    weight, _, at = entry.partition("@")
    pairs = [part.split("=") for part in at.split(",")] if at else []
    return {
        "weight": weight,
        "coords": {axis: int(index) for axis, index in pairs},
        "steps": steps[weight],
    }


def to_json(report: dict[str, Any]) -> str:
    return json.dumps(report, ensure_ascii=False)


def inspect_text(report: dict[str, Any]) -> str:
    """For people."""
    model, producer = report["model"], report["producer"]
    ends = ", ".join(map(str, model["eos_token_ids"])) or "none"
    mesh = ", ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    lines = [
        f"model     {model['name']} ({model['architecture']}), {model['dtype']}, vocabulary "
        f"{model['vocab_size']:,}, context {model['max_context']:,}, end tokens {ends}",
        f"ranks     {math.prod(report['mesh'].values())}: {mesh}",
        f"producer  tscompile {producer['tscompile']}, {producer['compiler']}",
        f"file      {size(report['bytes'])}, schema {report['schema']}; every hash was checked and is right",
        f"verified  {verify_text(report['verify'])}",
    ]
    lines += [
        "",
        "weights",
        *table(("name", "dtype", "stored shape", "bytes", "shards", "steps", "sha256"), weight_rows(report)),
    ]
    sections = ((e["name"], e["kind"], f"{e['bytes']:,}", e["sha256"][:16]) for e in report["sections"])
    lines += ["", "sections", *table(("name", "kind", "bytes", "sha256"), sections)]
    lines += ["", "fusion receipts", *receipt_lines(report["receipts"])]
    for target in report["targets"]:
        lines += ["", *target_lines(target)]
    return "\n".join(lines) + "\n"


def alike(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row once, in order, with `count`."""
    kept: dict[str, dict[str, Any]] = {}
    for row in rows:
        kept.setdefault(str(row), {**row, "count": 0})["count"] += 1
    return list(kept.values())


def of_any_layer(name: str) -> str:
    """layers.3.mlp -> layers.*.mlp"""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def verify_text(verify: dict[str, Any]) -> str:
    if not verify["verified"]:
        return "no: it was built without --verify"
    return (
        f"at build: {verify['ranks']} ranks of the fused graph against one of the model as captured, "
        f"{verify['steps']} steps, {verify['tokens']} tokens, {verify['logits']} rows of logits, within "
        f"{verify['tolerance']} of the largest"
    )


def weight_rows(report: dict[str, Any]) -> Iterable[Sequence[str]]:
    """A row a weight: shape and bytes are those of one shard, hashes those of each."""
    shards: dict[str, list[dict[str, Any]]] = {}
    for entry in report["weights"]:
        shards.setdefault(entry["weight"], []).append(entry)
    for name, entries in shards.items():
        first = entries[0]
        shape = " x ".join(map(str, first["shape"]))
        over = f"{len(entries)} over {', '.join(first['coords'])}" if first["coords"] else "whole"
        steps = " > ".join(step_text(step) for step in first["steps"])
        hashes = " ".join(entry["sha256"][:16] for entry in entries)
        yield name, first["dtype"], shape, f"{first['bytes']:,}", over, steps, hashes


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
    """A line a pattern: how often it matched; below it each place where it did not, and why; of kernels, what
    else than the cost model decided."""
    lines = []
    for pattern in dict.fromkeys(r["pattern"] for r in receipts):
        tried = [r for r in receipts if r["pattern"] == pattern]
        matched = sum(r["matched"] for r in tried)
        lines.append(f"  {pattern}: matched {matched} of {len(tried)}")
        lines += [
            f"    not at {r['where']} ({r['source']}): {r['reason']}" for r in tried if not r["matched"]
        ]
        if pattern == "kernel":
            lines += [f"    {r['where']}: {r['reason']}" for r in tried]
    return lines or ["  none"]


def target_lines(target: dict[str, Any]) -> list[str]:
    limits, kv = target["limits"], target["kv"]
    buffers = target["buffers"]
    unshared = sum(buffer["bytes"] for buffer in buffers)
    counts = [kv["layers"].count(index) for index in range(len(kv["groups"]))]
    most_layers = max(counts)  # a page holds the layers of one group
    caches = ", ".join(
        f"{count} of {group['kind']}" + (f" {group['window']}" if "window" in group else "")
        for count, group in zip(counts, kv["groups"], strict=True)
    )
    lines = [
        f"{target['target']}: steps of up to {limits['max_tokens']} tokens and {limits['max_seqs']} "
        f"sequences; kernels {size(target['kernels_bytes'])}",
        f"  arena {size(target['arena_bytes'])} for {len(buffers)} buffers of {size(unshared)}; KV cache "
        f"{size(kv['page_bytes'] * most_layers)} a page of {limits['page_size']} tokens; layers {caches}",
    ]

    def text(argument: dict[str, Any]) -> str:
        if "buffer" in argument:
            return f"%{buffers[argument['buffer']]['name']}"
        if "kv" in argument:
            return f"kv.{argument['kv']}"
        if "batch" in argument or "null" in argument:
            return str(argument.get("batch", "null"))
        return f"@{argument['weight']}" + "".join(f"@{axis}" for axis in argument.get("axes", ()))

    for step in target["buckets"]:
        rows = (
            (
                str(index),
                (launch.get("kernel") or collective_text(launch)) + grid_text(launch),
                launch["op"],
                " ".join(text(argument) for argument in launch["args"]),
            )
            for index, launch in enumerate(step["launches"])
        )
        lines.append(f"  up to {step['max_tokens']} tokens: {len(step['launches'])} launches")
        lines += table(("", "kernel or collective", "op", "arguments"), rows)
    return lines


def grid_text(launch: dict[str, Any]) -> str:
    """E.g. " [64 x 8 x 1]": of a kernel of a GPU target, its grid."""
    return f" [{' x '.join(map(str, launch['grid']))}]" if "grid" in launch else ""


def collective_text(launch: dict[str, Any]) -> str:
    """E.g. "all_reduce sum over tp, f32[T, 1 x 4096]": rows, times x the run of one rank. One in two launches
    is "start all_reduce ...", and "finish"."""
    if "collective" not in launch:
        return str(launch["phase"])
    kind = " ".join(filter(None, (launch.get("phase"), launch["collective"], launch.get("reduce"))))
    moved = f"{launch['dtype']}[{launch['rows']}, {launch['times']} x {launch['run']}]"
    return f"{kind} over {launch['axis']}, {moved}"


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
