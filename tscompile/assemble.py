"""Puts what the passes made into one plan.tsp: the last step of a build."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from tscompile import __version__, canonical, plan
from tscompile.build import Build
from tscompile.costs import costs
from tscompile.errors import InternalError
from tscompile.passes.pack import Packed
from tscompile.printer import print_graph
from tscompile.roofline import roofline

# What decides a plan beside the tensors, whose hashes the manifest has: these files' are in "producer", and
# that of a lockfile of kernels, as kernels.lock.
INPUTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def assemble(build: Build, progress: plan.Progress = lambda done, total: None) -> None:
    """Writes build.options.out. CompileError if the file system refuses; nothing is left then."""
    if build.model is None or not isinstance(build.weights, Packed) or not build.targets:
        raise InternalError("assemble before capture, select and pack")
    entries = build.weights.entries()
    for target in build.targets.values():
        entries.append(plan.blob(f"tsp/program/{target.target}", canonical.dumps(target.program)))
        entries.append(plan.blob(f"tsp/kernels/{target.target}", target.library))
    entries += [plan.blob(name, data) for name, data in sorted(build.text.items())]
    receipts = [dataclasses.asdict(receipt) for receipt in build.receipts]
    entries.append(plan.blob("tsp/graph", print_graph(build.graph).encode()))
    for tokens, graph in build.smaller.items():
        entries.append(plan.blob(f"tsp/graph/{tokens}", print_graph(graph).encode()))
    entries.append(plan.blob("tsp/receipts", canonical.dumps(receipts)))
    entries.append(plan.blob("tsp/pack", canonical.dumps(build.weights.report())))
    entries.append(plan.blob("tsp/placements", canonical.dumps(build.placed)))
    entries.append(plan.blob("tsp/costs", canonical.dumps(costs(build))))
    if bounds := roofline(build):
        entries.append(plan.blob("tsp/roofline", canonical.dumps(bounds)))
    entries.append(plan.blob("tsp/verify", canonical.dumps(build.verified)))
    plan.write(
        build.options.out,
        entries,
        model=dataclasses.asdict(build.model),
        mesh=build.mesh,
        targets=list(build.targets),
        producer=producer(build),
        progress=progress,
    )


def producer(build: Build) -> dict[str, Any]:
    """Who made the plan from what: versions, compilers, and the inputs' SHA-256."""
    compilers = sorted({target.compiler for target in build.targets.values()})
    files = [build.options.model, *(build.checkpoint.folder / name for name in INPUTS)]
    inputs = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}
    if lock := build.options.kernels_lock:
        inputs["kernels.lock"] = hashlib.sha256(lock.read_bytes()).hexdigest()
    return {"tscompile": __version__, "compiler": "; ".join(compilers), "inputs": inputs}
