"""Measures the control plane, and writes a dated report into artifacts/bench. `make bench-control` runs it;
it ends by printing the report as one line of JSON.

Google Benchmark decides what runs how often, and sums up; build/release's control_bench library does the work
and keeps the time of its timed part alone ("manual time"), so nothing of Python's is in the figures. There is
no model: a step is schedule, batch arrays, commit; a turn is all that the engine's step thread does between
two runs of a model, inbox and events included.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_benchmark as gb
import reports

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "build" / "release" / "tests" / "libcontrol_bench.so"
PAGE = 64
CONTEXT = 50_000
TURN = 800
GROWTH = 16_384 // PAGE  # pages that a context may grow by
CACHE = 200_000  # pages beside those that the sequences may want
CONTEXTS = (1_000, 10_000, CONTEXT, 200_000)
CACHES = (10_000, 100_000, 1_000_000)

# Regular expressions of what is measured side by side.
COMPARED = (
    "step/(4|64)/",
    "step/(8|1024)/",
    "turn/",
    f"(admit.*|request)/{CONTEXT}",
    "context/",
    "cache/",
    "(admit.*|request)/(1000|10000|200000)(/|$)",
)

# microseconds at most
BOUNDS = {
    "step/64/blank": 20,
    "step/64/full": 20,
    "step/1024/blank": 300,
    "step/1024/full": 300,
    "turn/64": 20,
    "turn/1024": 300,
    "admit/50000/blank": 50,
    "admit/50000/full": 50,
}


def library() -> ctypes.CDLL:
    if not LIBRARY.exists():
        sys.exit(f"control.py: {LIBRARY.relative_to(ROOT)} is missing: make engine")
    lib = ctypes.CDLL(str(LIBRARY))
    pointer, count, seconds = ctypes.c_void_p, ctypes.c_int32, ctypes.c_double
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "plane_open": (pointer, [count, count, count]),
        "plane_close": (None, [pointer]),
        "plane_decode": (None, [pointer, count]),
        "plane_fill": (None, [pointer]),
        "plane_step": (seconds, [pointer]),
        "plane_request": (seconds, [pointer]),
        "plane_admit": (None, [pointer, count, ctypes.POINTER(seconds)]),
        "engine_open": (pointer, [count, count, count]),
        "engine_close": (None, [pointer]),
        "engine_turn": (seconds, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class Bench:
    """Registers figures with Google Benchmark, whose repetitions come in random order, so that what the
    machine does meanwhile falls on all that are compared: planes and engines stay open."""

    def __init__(self, quick: bool) -> None:
        self.lib = library()
        self.iterations, self.repetitions = (4, 2) if quick else (100, 40)
        self.opened: dict[tuple[Any, ...], int] = {}

    def use(self, kind: str, seqs: int, context: int, pages: int, full: bool) -> int:
        """The plane or engine of that description, which is opened if it is not yet."""
        key = (kind, seqs, context, pages, full)
        if key not in self.opened:
            handle = self.opened[key] = getattr(self.lib, f"{kind}_open")(seqs, context, pages)
            if kind == "plane":
                if full:
                    self.lib.plane_fill(handle)
                self.lib.plane_decode(handle, seqs)
        return self.opened[key]

    def done(self) -> None:
        for (kind, *_), handle in self.opened.items():
            getattr(self.lib, f"{kind}_close")(handle)
        self.opened.clear()

    def add(self, name: str, once: Callable[[], float], iterations: int | None = None) -> None:
        """`once` says how many seconds its timed part took."""

        def body(state: Any) -> None:
            once()  # opens what it needs
            while state:
                state.set_iteration_time(once())

        options = gb.option.use_manual_time()(body)
        options = gb.option.unit(gb.kMicrosecond)(options)
        options = gb.option.iterations(iterations or self.iterations)(options)
        options = gb.option.repetitions(self.repetitions)(options)
        gb.register(options, name=name)

    def step(self, name: str, seqs: int, context: int, cache: int, full: bool) -> None:
        pages = seqs * (context // PAGE + 2 + GROWTH) + cache
        self.add(name, lambda: self.lib.plane_step(self.use("plane", seqs, context, pages, full)))

    def turn(self, seqs: int) -> None:
        pages = seqs * (CONTEXT // PAGE + 2 + GROWTH)
        self.add(
            f"turn/{seqs}", lambda: self.lib.engine_turn(self.use("engine", seqs, CONTEXT, pages, False))
        )

    def admit(self, context: int, full: bool) -> None:
        name = f"{context}/{'full' if full else 'blank'}"
        pages = CACHE
        parts = (ctypes.c_double * 3)()

        def part(index: int) -> float:
            before = parts[index]
            plane = self.use("plane", 0, context, pages, full)
            self.lib.plane_admit(plane, TURN, parts)
            return float(parts[index] - before)

        def whole() -> float:
            before = sum(parts[:2])
            part(0)
            return float(sum(parts[:2]) - before)

        self.add(f"admit/{name}", whole)
        self.add(f"admit.request/{name}", lambda: part(0))
        self.add(f"admit.schedule/{name}", lambda: part(1))
        self.add(f"admit.commit/{name}", lambda: part(2))

    def request(self, context: int) -> None:
        self.add(
            f"request/{context}",
            lambda: self.lib.plane_request(self.use("plane", 0, context, 2 * context // PAGE + 512, False)),
        )


def register(bench: Bench, quick: bool) -> None:
    for seqs in (4, 8) if quick else (64, 1024):
        for full in (False, True):
            bench.step(f"step/{seqs}/{'full' if full else 'blank'}", seqs, CONTEXT, CACHE, full)
        bench.turn(seqs)
    for full in (False, True):
        bench.admit(CONTEXT, full)
    if quick:
        return
    for context in CONTEXTS:
        bench.step(f"context/{context}", 64, context, CACHE, True)
    for cache in CACHES:
        bench.step(f"cache/{cache}", 64, CONTEXT, cache, True)
    for context in CONTEXTS:
        if context != CONTEXT:
            bench.admit(context, True)
        bench.request(context)


def figures(raw: dict[str, Any]) -> dict[str, dict[str, float]]:
    """name -> median and least of its repetitions' means, in microseconds."""
    times: dict[str, list[float]] = {}
    for run in raw["benchmarks"]:
        if run["run_type"] == "iteration":
            times.setdefault(run["run_name"].split("/iterations:")[0], []).append(run["real_time"])
    return {
        name: {"median_us": sorted(values)[len(values) // 2], "min_us": min(values)}
        for name, values in times.items()
    }


def markdown(report: dict[str, Any]) -> str:
    found, bounds = report["figures"], report["bounds_us"]

    def row(label: str, name: str) -> str:
        f = found[name]
        bound = f"{bounds[name]:g}" if name in bounds else ""
        return f"| {label} | {f['median_us']:.1f} | {f['min_us']:.1f} | {bound} |"

    def table(title: str, what: str, rows: list[tuple[str, str]]) -> list[str]:
        head = ["", f"## {title}", "", f"| {what} | median us | least us | bound us |", "|---|---|---|---|"]
        return head + [row(label, name) for label, name in rows if name in found]

    states = {"blank": "blank pages left", "full": "cache full of evictable pages"}
    steps = [
        (f"{name.split('/')[1]}, {states[name.split('/')[2]]}", name)
        for name in found
        if name.startswith("step/")
    ]
    steps += [(f"{n.split('/')[1]}, the engine's whole turn", n) for n in found if n.startswith("turn/")]
    parts = {
        "admit": "all",
        "admit.request": "check, copy, hash",
        "admit.schedule": "schedule",
        "admit.commit": "commit (beside)",
    }
    admits = [
        (f"{parts[kind]}, {states[state]}", f"{kind}/{CONTEXT}/{state}") for state in states for kind in parts
    ]
    lines = [
        f"# {report['date']}, control plane",
        "",
        f"{report['cpu']}. Pages of {PAGE} tokens, full attention. Microseconds: the median and the least of "
        f"{report['repetitions']} repetitions of {report['iterations']}, caches warm.",
    ]
    lines += table(f"A step, {CONTEXT:,} tokens of context", "decoding requests", steps)
    lines += table(f"Admitting a turn of {TURN} tokens on {CONTEXT:,} cached ones", "part", admits)
    lines += table(
        "A step of 64 against the length of contexts",
        "tokens of context",
        [(f"{c:,}", f"context/{c}") for c in CONTEXTS],
    )
    lines += table(
        "A step of 64 against the size of a full cache",
        "idle pages",
        [(f"{c:,}", f"cache/{c}") for c in CACHES],
    )
    lines += table(
        "Admission against the cached prefix, cache full",
        "tokens of prefix",
        [(f"{c:,}", f"admit/{c}/full") for c in CONTEXTS],
    )
    lines += table(
        "Checking, copying and hashing a prompt", "tokens", [(f"{c:,}", f"request/{c}") for c in CONTEXTS]
    )
    return "\n".join(lines) + "\n"


def measured(bench: Bench, only: str) -> dict[str, dict[str, float]]:
    """The figures of that name, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        flags = [f"--benchmark_out={out}", "--benchmark_display_aggregates_only=true"]
        flags += ["--benchmark_enable_random_interleaving=true", f"--benchmark_filter={only}"]
        gb.initialize([sys.argv[0], *flags])
        gb.run_benchmarks()
        bench.done()
        return figures(json.loads(out.read_text()))


def compared(quick: bool) -> dict[str, dict[str, float]]:
    """All figures: those that are compared side by side, in a process of their own, as what else is open
    decides which memory they get."""
    found: dict[str, dict[str, float]] = {}
    for only in COMPARED[:4] if quick else COMPARED:
        command = [sys.executable, __file__, "--only", only, *(["--quick"] if quick else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found |= json.loads(done.stdout.splitlines()[-1])["figures"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few rounds only: to try the bench itself")
    parser.add_argument("--only", default="", metavar="REGEX", help="those of that name; keeps no report")
    parser.add_argument(
        "--out", type=Path, default=reports.FOLDER, metavar="DIR", help="default: artifacts/bench"
    )
    arguments = parser.parse_args()
    bench = Bench(arguments.quick)
    register(bench, arguments.quick)
    found = measured(bench, arguments.only) if arguments.only else compared(arguments.quick)
    date = datetime.date.today().isoformat()
    report = {
        "date": date,
        "cpu": reports.processor(),
        "iterations": bench.iterations,
        "repetitions": bench.repetitions,
        "bounds_us": BOUNDS,
        "figures": found,
    }
    if not arguments.only:
        reports.keep(report, markdown(report), "control", arguments.out)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
