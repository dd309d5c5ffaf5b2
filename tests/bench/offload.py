"""Measures the time to the first token of a long prompt whose pages were evicted: computed again, brought
back from host memory, brought back from disk, and never evicted. `make bench-offload` runs it; it writes a
dated report into artifacts/bench and ends by printing the report as one line of JSON.

In each round every way is taken once, one after the other, so that what disturbs one disturbs all. The file's
pages may still be in the system's page cache: --drop-caches asks the kernel (as root) to forget them before
each round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import reports

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "runtime"))

import engine as api  # noqa: E402

WAYS = ("computed", "from memory", "from disk", "never evicted")


def prompt(seed: int, length: int, vocab_size: int) -> list[int]:
    return random.Random(seed).choices(range(1, vocab_size), k=length)


def first_token_s(engine: api.Engine, tokens: list[int]) -> tuple[float, api.Answer]:
    """Of a request alone: until its only token has come."""
    began = time.perf_counter()
    (answer,) = engine.generate([api.Request(tokens, max_tokens=1, ignore_eos=True)])
    return time.perf_counter() - began, answer


def options_of(way: str, num_pages: int, tier_bytes: int, folder: Path) -> dict[str, Any]:
    tier = {"from memory": {"offload_bytes": tier_bytes}}
    tier["from disk"] = {"offload_bytes": tier_bytes, "offload_folder": folder}
    return {"num_pages": 3 * num_pages if way == "never evicted" else num_pages, **tier.get(way, {})}


def sync_and_drop() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1\n")


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    with api.Engine(given.plan, num_pages=1) as probe:
        stats = probe.stats()
    num_pages = -(-(given.prompt + 1) // stats.page_size) + 1  # one prompt fits, two do not
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    restored: dict[str, int] = {}
    with ExitStack() as stack:
        engines = {
            way: stack.enter_context(
                api.Engine(given.plan, **options_of(way, num_pages, given.tier_bytes, folder))
            )
            for way in WAYS
        }
        asked, other = (prompt(seed, given.prompt, stats.vocab_size) for seed in (1, 2))
        for engine in engines.values():
            first_token_s(engine, asked)
        for _ in range(given.rounds):
            for engine in engines.values():
                first_token_s(engine, other)
            if given.drop_caches:
                sync_and_drop()
            for way, engine in engines.items():
                seconds, answer = first_token_s(engine, asked)
                taken[way].append(seconds)
                restored[way] = answer.num_restored
    return {
        way: {"first_token_ms": round(1e3 * statistics.median(times), 2), "restored_tokens": restored[way]}
        for way, times in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, help="the plan that is run, such as artifacts/demo.tsp")
    parser.add_argument("--prompt", type=int, default=1900, metavar="N", help="its tokens (default 1900)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--tier-bytes", type=int, default=1 << 30, metavar="BYTES")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the system's)")
    parser.add_argument("--drop-caches", action="store_true")
    parser.add_argument("-o", "--out", type=Path, default=reports.FOLDER, metavar="FOLDER")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        ways = measure(given, Path(folder))
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{reports.processor()}, {os.cpu_count()} cores",
        "prompt": given.prompt,
        "plan": given.plan.name,
        "ways": ways,
    }
    lines = [
        f"# Time to first token of {given.prompt} tokens whose pages were evicted, {report['date']}",
        "",
        f"{report['machine']}; {given.plan.name}; medians of {given.rounds} rounds.",
        "",
        "| | first token, ms | tokens brought back |",
        "|---|---|---|",
        *(f"| {way} | {row['first_token_ms']} | {row['restored_tokens']} |" for way, row in ways.items()),
        "",
    ]
    reports.keep(report, "\n".join(lines), "offload", given.out)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
