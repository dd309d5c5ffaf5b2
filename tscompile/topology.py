"""What a target's machine can do, from tscompile/topologies/*.json: numbers of one rank, and of the links
between ranks. Every number there says where it comes from.

Collectives follow the alpha-beta model (Thakur, Rabenseifner and Gropp, 2005), with n ranks, a value of S
bytes as it is before it is cut up, and B bytes/s each way:

    algorithm   all_reduce                              all_gather, reduce_scatter
    ring        base + 2 (n-1) hop + 2 (n-1)/n S/B      base + (n-1) hop + (n-1)/n S/B
    tree        base + 2 log2(n) hop + 2 S/B            -
    nvls        base + S/B                              base + (n-1)/n S/B         the switch adds and copies
    direct      base + 2 hop + 2 S/B                    base + hop + S/B           shared memory

all_to_all: base + hop + (n-1)/n S/n/B, send: base + hop + S/B, over whichever algorithm's links are quickest.
A ragged_all_to_all, of rows of experts, is an all_to_all, as if every expert had as many.

Of these terms (base, hop, S/B) some are waiting or are done by other hardware than computes: what runs
meanwhile hides them (`Link.beside`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tscompile.errors import CompileError

FOLDER = Path(__file__).resolve().parent / "topologies"


@dataclass(frozen=True)
class Algorithm:
    """One way to do collectives: what each costs before a byte moves, and a hop."""

    name: str
    base_s: float
    hop_s: float

    def seconds(self, collective: str, num_bytes: float, ranks: int, bytes_per_s: float) -> float:
        """Infinite for what the algorithm does not do."""
        whole, part = num_bytes / bytes_per_s, (ranks - 1) / ranks * num_bytes / bytes_per_s
        if collective in ("all_to_all", "ragged_all_to_all", "send"):
            return self.base_s + self.hop_s + (whole if collective == "send" else part / ranks)
        times = 2 if collective == "all_reduce" else 1
        match self.name:
            case "ring":
                return self.base_s + times * ((ranks - 1) * self.hop_s + part)
            case "tree" if collective == "all_reduce":
                return self.base_s + 2 * math.ceil(math.log2(ranks)) * self.hop_s + 2 * whole
            case "nvls":
                return self.base_s + (whole if collective == "all_reduce" else part)
            case "direct":
                return self.base_s + times * (self.hop_s + whole)
        return math.inf


@dataclass(frozen=True)
class Link:
    """Between ranks of one host, or of several. bytes_per_s: of one rank, each way. beside: of "base", "hop"
    and "bytes", the terms of a collective's cost that take nothing from what the rank computes meanwhile."""

    bytes_per_s: float
    algorithms: tuple[Algorithm, ...]
    beside: frozenset[str] = frozenset()

    def best(self, collective: str, num_bytes: float, ranks: int) -> tuple[float, str]:
        """(seconds, the algorithm) of a collective over a value of `num_bytes`."""
        costs = [(a.seconds(collective, num_bytes, ranks, self.bytes_per_s), a.name) for a in self.algorithms]
        return min(costs)

    def hidden(self, collective: str, num_bytes: float, ranks: int) -> float:
        """Seconds of it that run beside other work, if there is enough."""
        seconds, name = self.best(collective, num_bytes, ranks)
        (best,) = (algorithm for algorithm in self.algorithms if algorithm.name == name)
        base_s, hop_s = (
            0.0 if term in self.beside else cost
            for term, cost in (("base", best.base_s), ("hop", best.hop_s))
        )
        bytes_per_s = math.inf if "bytes" in self.beside else self.bytes_per_s
        return seconds - Algorithm(name, base_s, hop_s).seconds(collective, num_bytes, ranks, bytes_per_s)


@dataclass(frozen=True)
class Topology:
    name: str
    ranks_a_host: int
    flops_per_s: Mapping[str, float]  # by dtype
    read_bytes_per_s: float
    memory_bytes: float
    launch_s: float
    split_s: float  # what a collective in two launches takes more than in one
    host: Link
    network: Link

    def link(self, ranks: int) -> Link:
        """What joins that many ranks."""
        return self.host if ranks <= self.ranks_a_host else self.network


def known_targets() -> dict[str, str]:
    """target -> the topology that says what it can do."""
    return {target: path.stem for path, data in _files() for target in data["targets"]}


@cache
def topology_of(target: str) -> Topology:
    """CompileError if no file knows the target."""
    for path, data in _files():
        if target in data["targets"]:
            return Topology(
                name=path.stem,
                ranks_a_host=data["ranks_a_host"],
                flops_per_s={k: float(v) for k, v in data["flops_per_s"].items() if k != "source"},
                read_bytes_per_s=float(data["read_bytes_per_s"]["value"]),
                memory_bytes=float(data["memory_bytes"]["value"]),
                launch_s=float(data["launch_s"]["value"]),
                split_s=float(data["split_s"]["value"]),
                host=_link(data["links"]["host"]),
                network=_link(data["links"]["network"]),
            )
    raise CompileError(f"unknown target {target!r}; known are {', '.join(sorted(known_targets()))}")


@cache
def _files() -> tuple[tuple[Path, dict[str, Any]], ...]:
    return tuple((path, json.loads(path.read_text())) for path in sorted(FOLDER.glob("*.json")))


def _link(data: dict[str, Any]) -> Link:
    algorithms = (Algorithm(name, **terms) for name, terms in data["algorithms"].items())
    return Link(float(data["bytes_per_s"]), tuple(algorithms), frozenset(data["beside"]["terms"]))
