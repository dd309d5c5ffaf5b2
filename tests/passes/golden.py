"""Text goldens: golden/<pass>.txt is the graph after a pass, and what the next pass's test begins with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tscompile.build import Build, Options
from tscompile.ir import Graph
from tscompile.mesh import Mesh
from tscompile.parser import parse
from tscompile.price import Prices
from tscompile.printer import print_graph
from tscompile.topology import Algorithm, Link
from tscompile.verify import verify

FOLDER = Path(__file__).resolve().parent / "golden"


def read(name: str) -> Graph:
    return parse((FOLDER / f"{name}.txt").read_text())


def build_of(graph: Graph, **options: Any) -> Build:
    """A build that has come as far as `graph`; it has no checkpoint."""
    chosen = Options(Path("model.py"), Path("checkpoint"), **options)
    return Build(chosen, None, graph.mesh, graph)  # type: ignore[arg-type]


def after(before: str, run: Any, mesh: Mesh | None = None, **options: Any) -> Build:
    """The build after the pass `run`, which began with golden/<before>.txt."""
    graph = read(before)
    graph.mesh = mesh or graph.mesh
    build = build_of(graph, **options)
    run(build)
    verify(build.graph)
    return build


def check(name: str, graph: Graph, request: pytest.FixtureRequest) -> None:
    """The graph's text is golden/<name>.txt; with --update-golden it becomes so."""
    check_lines(name, print_graph(graph).splitlines(), request)


def check_lines(name: str, lines: list[str], request: pytest.FixtureRequest) -> None:
    path, text = FOLDER / f"{name}.txt", "\n".join(lines) + "\n"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert text == path.read_text(), (
        f"{path.name} differs; if the change is meant, run pytest --update-golden and review"
    )


def prices(base_s: float, bytes_per_s: float, *, tokens: int = 64, target: str = "cpu-avx2") -> Prices:
    """Those of a target, with other links."""
    found = Prices.of(target, tokens)
    link = Link(bytes_per_s, (Algorithm("ring", base_s, 0.0),))
    machine = replace(found.topology, host=link, launch_s=0.0, read_bytes_per_s=1e10)
    return replace(found, topology=machine)
