"""The pipeline: one list of passes. Each is tscompile/passes/<name>.py with `run(build: Build) -> None`."""

from __future__ import annotations

import importlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tscompile import check
from tscompile.assemble import assemble
from tscompile.build import Build, Options
from tscompile.checkpoint import Checkpoint
from tscompile.errors import InternalError
from tscompile.kernels.target import find_target
from tscompile.printer import print_graph
from tscompile.verify import verify

# name, and what the graph (or the build) is afterwards. The order matters where a line says why.
PASSES: tuple[tuple[str, str], ...] = (
    (
        "capture",
        "ops as the model file wrote them, all f32; weights as recipes, checked against the checkpoint",
    ),
    ("expand", "what no kernel does is done by ops that have one: latent attention absorbs kv_b"),
    (
        "precision",
        "casts to the plan's dtype, before placement so that a redistribute moves what is really stored",
    ),
    (
        "canonicalize",
        "projections apart, rows gathered before the head: what fit and propagate place; the casts stand",
    ),
    ("context", "with cp, attention in parts of the context, and merged: what propagate shares out over cp"),
    ("fit", "vocabulary and KV heads such that the ranks divide them, so that propagate can shard them"),
    ("stages", "every op, weight and KV cache is on one stage, if there are any; the other axes cut each"),
    ("propagate", "every value has a placement on every axis"),
    ("reshard", "a redistribute wherever a value's placement is not what its consumer takes"),
    ("collectives", "redistribute -> all_reduce, reduce_scatter, all_gather, all_to_all, send, slice"),
    ("localize", "shapes of one rank; nothing below knows of global shapes"),
    ("fuse", "every op is a group that becomes one kernel"),
    ("overlap", "collectives in two, with groups between that run meanwhile. Last that knows no target"),
    ("select", "build.targets: group -> kernel, and each weight's layout; before pack, which lays out"),
    ("emit", "build.targets[t].library: sources from templates, compiled, cached by content"),
    ("pack", "build.weights: the plan's weights, cut for the ranks, laid out, and the steps that made them"),
    ("arrange", "build.targets[t].program: buffers with offsets, launches: of one rank, the same for all"),
    ("text", "build.text: tokenizer and chat template, compared with their references"),
)
ALL = tuple(name for name, _ in PASSES)
BEFORE_SELECT = ALL[: ALL.index("select")]

Progress = Callable[[str], None]


def compile_plan(options: Options, say: Progress) -> dict[str, Any]:
    """A whole build: opens the checkpoint, runs every pass, writes the plan. The summary that `build --json`
    prints."""
    start = time.monotonic()
    for target in options.targets:
        find_target(target)  # before anything takes time
    build = Build(options, Checkpoint(options.weights), options.mesh)
    run(build, BEFORE_SELECT, say)
    summary: dict[str, Any] = {"passes": len(PASSES)}
    if options.verify:
        say(f"verify: the fused graph on {build.mesh} against the captured one on one rank, on random tokens")
        build.verified, difference = check.verify_build(build)
        summary["verify"] = build.verified | {"max_difference": difference}
    run(build, ALL[len(BEFORE_SELECT) :], say)
    say(f"writing {options.out}")
    assemble(build, _every_tenth(say))
    assert build.model is not None
    for note in build.notes:
        say(note)
    return summary | {
        "plan": str(options.out),
        "bytes": options.out.stat().st_size,
        "model": build.model.name,
        "architecture": build.model.architecture,
        "dtype": build.model.dtype,
        "targets": list(build.targets),
        "ranks": build.mesh.num_ranks,
        "groups": dict(Counter(group.group for group in build.graph.groups())),
        "fused": sum(r.matched for r in build.receipts if r.pattern not in ("overlap", "kernel")),
        "overlapped": sum(r.matched for r in build.receipts if r.pattern == "overlap"),
        "seconds": round(time.monotonic() - start, 3),
    }


def run(build: Build, passes: Sequence[str] = ALL, say: Progress = lambda _: None) -> None:
    """Runs `passes` in the order of PASSES; verifies the graph after each; with --dump DIR writes it to
    DIR/NN-name.txt."""
    for number, (name, after) in enumerate(PASSES, 1):
        if name not in passes:
            continue
        say(f"{number:2}/{len(PASSES)} {name}: {after}")
        importlib.import_module(f"tscompile.passes.{name}").run(build)
        try:
            for graph in build.buckets.values():
                verify(graph)
        except InternalError as error:
            raise InternalError(f"after the pass {name}: {error}") from None
        if build.options.dump:
            dump(build, build.options.dump, f"{number:02d}-{name}")


def _every_tenth(say: Progress) -> Callable[[int, int], None]:
    """Says how much of a large plan is written, each time another tenth is."""
    said = 0

    def progress(done: int, total: int) -> None:
        nonlocal said
        if total >= 2**28 and 10 * done // total > said:
            said = 10 * done // total
            say(f"  {done / 2**30:.1f} of {total / 2**30:.1f} GiB written")

    return progress


def dump(build: Build, folder: Path, name: str) -> None:
    """The graph, the programs and the receipts as they are now."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(print_graph(build.graph))
    for tokens, graph in build.smaller.items():
        (folder / f"{name}-up-to-{tokens}-tokens.txt").write_text(print_graph(graph))
    if name.endswith(("fuse", "overlap")):
        lines = [f"{r.pattern} at {r.where} ({r.source}): {r.reason or 'matched'}" for r in build.receipts]
        (folder / "receipts.txt").write_text("\n".join(lines) + "\n")
    for target in build.targets.values():
        if target.program:
            (folder / f"program-{target.target}.json").write_text(json.dumps(target.program, indent=1) + "\n")
