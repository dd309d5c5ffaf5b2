"""The pipeline: one list of passes. Each is tscompile/passes/<name>.py with `run(build: Build) -> None`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from tscompile.build import Build
from tscompile.errors import InternalError
from tscompile.printer import print_graph
from tscompile.verify import verify

# name, and what the graph (or the build) is afterwards. The order matters where a line says why.
PASSES: tuple[tuple[str, str], ...] = (
    (
        "capture",
        "ops as the model file wrote them; all values f32, weights as recipes; checked against the checkpoint",
    ),
    (
        "precision",
        "casts to the plan's dtype, before placement so that a redistribute moves what is really stored",
    ),
    ("propagate", "every value has a placement on every axis"),
    ("reshard", "a redistribute wherever a value's placement is not what its consumer takes"),
    ("collectives", "redistribute -> all_reduce, reduce_scatter, all_gather, all_to_all, slice"),
    ("localize", "shapes of one rank; nothing below knows of global shapes"),
    ("fuse", "every op is a group that becomes one kernel. Last that knows no target"),
    ("select", "build.targets: group -> kernel, and each weight's layout; before pack, which lays out"),
    ("emit", "build.targets[t].library: sources from templates, compiled, cached by content"),
    ("pack", "build.weights: the plan's weights, laid out, and the steps that made them"),
    ("arrange", "build.targets[t].program: buffers with offsets, launches"),
    ("text", "build.text: tokenizer and chat template, compared with their references"),
)
ALL = tuple(name for name, _ in PASSES)
UP_TO_FUSE = ALL[:7]

Progress = Callable[[str], None]


def run(build: Build, passes: Sequence[str] = ALL, say: Progress = lambda _: None) -> None:
    """Runs `passes` in order; verifies the graph after each; writes DIR/NN-name.txt after each if --dump DIR was given."""
    for number, (name, after) in enumerate(PASSES, 1):
        if name not in passes:
            continue
        say(f"{name}: {after}")
        before = build.graph
        importlib.import_module(f"tscompile.passes.{name}").run(build)
        try:
            verify(build.graph)
        except InternalError as error:
            raise InternalError(f"after the pass {name}: {error}") from None
        if build.options.dump and build.graph is not before:
            dump(build, build.options.dump / f"{number:02d}-{name}.txt")


def dump(build: Build, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(print_graph(build.graph))
