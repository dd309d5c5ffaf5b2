"""Measures coding agents on `tsruntime run`, and keeps a dated report and a picture in artifacts/bench.
`make bench-agent` runs it (about 12 minutes on two cores that prefill 200 tokens/s of a model of 0.6 billion
parameters); it ends by printing the report as one line of JSON.

`tsruntime bench agent` drives the demo model and one of Qwen3-0.6B's shape with random weights, each served
as its plan is by default. Sessions are as that command's own, in a size for a small machine: a long first
turn of which a system prompt is shared, turns that add a little, answers of a fixed length, time to think.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_checkpoint
import reports

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
WORK = ROOT / "build" / "bench"
DEMO = ROOT / "artifacts" / "demo"
STARTED_S = 60

# By model: what `tsruntime bench agent` is told.
WORKLOADS = {
    "demo": {"first": 400, "next": 50, "output": 50, "system": 200, "turns": "10-12", "think": 0.5},
    "qwen3-0.6b": {"first": 3000, "next": 200, "output": 60, "system": 500, "turns": "4-5", "think": 1.0},
}
LEVELS = {"demo": "1,2,4,8,16", "qwen3-0.6b": "1,2,4"}
QUICK = {"first": 200, "next": 40, "output": 8, "system": 100, "turns": "2-2", "think": 0.0}


def say(text: str) -> None:
    print(f"agent: {text}", file=sys.stderr, flush=True)


def build(name: str) -> Path:
    if name == "demo":
        checkpoint = DEMO
    else:
        checkpoint = WORK / name
        make_checkpoint.write(name, checkpoint)
        shutil.copy(DEMO / "chat_template.jinja", checkpoint)
    say(f"{name}: compile")
    plan = WORK / f"{name}.tsp"
    subprocess.run(
        [sys.executable, "-m", "tscompile.cli", "build", checkpoint, "-o", plan],
        check=True,
        cwd=ROOT,
        stdout=sys.stderr,
    )
    return plan


@contextlib.contextmanager
def served(plan: Path, executable: Path, log: Path) -> Iterator[str]:
    """The base URL of a server of the plan, which ends with the block."""
    with log.open("w") as out:
        command = [str(executable), "run", str(plan), "--port", "0"]
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield wait_for(server, log)
        finally:
            server.terminate()
            server.wait(STARTED_S)


def wait_for(server: subprocess.Popen[bytes], log: Path) -> str:
    """Its URL, which it tells in its log when it is ready."""
    end = time.monotonic() + STARTED_S
    while time.monotonic() < end and server.poll() is None:
        ready = re.search(r"ready at (http://\S+)", log.read_text())
        if ready:
            return ready.group(1)
        time.sleep(0.1)
    sys.exit(f"agent: the server did not come up:\n{log.read_text()}")


def drive(executable: Path, options: dict[str, Any]) -> Any:
    command = [str(executable), "bench", "agent", "--json"]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        sys.exit(f"agent: {' '.join(command)} failed with status {ended.returncode}")
    report = json.loads(ended.stdout)
    del report["url"]  # a port that happened to be free
    return report


def markdown(report: dict[str, Any], pictures: dict[str, str]) -> str:
    lines = [f"# {report['date']}, agents", "", f"{report['cpu']}, {report['threads']} threads.", ""]
    for model in report["models"]:
        w = model["workload"]
        low, high = w["turns"]
        lines += [
            f"## {model['name']}",
            "",
            f"Sessions of {low} to {high} turns; the first of {w['first_tokens']:,} tokens, "
            f"{w['system_tokens']:,} of them a system prompt that all share; then "
            f"{w['next_tokens']} a turn; answers of {w['output_tokens']}; {w['think_s']} s to think.",
            "",
            "| at once | turns | first token ms, p50 | p95 | p99 | token ms, p50 | p95 | p99 "
            "| tokens/s a user | in total | prefix hits |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for level in model["levels"]:
            first, token = level["first_token_ms"], level["per_token_ms"]
            times = " | ".join(f"{first[p]:.0f}" for p in ("p50", "p95", "p99"))
            times += " | " + " | ".join(f"{token[p]:.1f}" for p in ("p50", "p95", "p99"))
            speeds = f"{level['tokens_per_s_user']:.1f} | {level['tokens_per_s_total']:.1f}"
            hits = level["prefix_hit_rate"]
            share = "not told" if hits is None else f"{hits:.0%}"
            lines.append(f"| {level['concurrency']} | {level['turns']} | {times} | {speeds} | {share} |")
        lines += ["", f"![tokens a second per user and per device]({pictures[model['name']]})", ""]
    lines.append(
        "Of a user: the median turn's pace of tokens. In total: all output over all time, thinking included."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(WORKLOADS), help="comma-separated; default: both")
    parser.add_argument("--quick", action="store_true", help="a few tokens only: to try the bench itself")
    parser.add_argument("--out", type=Path, default=reports.FOLDER, metavar="DIR")
    parser.add_argument("--executable", type=Path, default=BIN / "tsruntime", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    models, pictures = [], {}
    for name in arguments.models.split(","):
        plan = build(name)
        pictures[name] = f"{date}-agent-{name}.svg"
        options, levels = (QUICK, "1,2") if arguments.quick else (WORKLOADS[name], LEVELS[name])
        with served(plan, arguments.executable, WORK / f"{name}.log") as url:
            svg = arguments.out / pictures[name]
            options = {"url": url, "name": name, "concurrency": levels, "svg": svg, **options}
            models.append(drive(arguments.executable, options))
    report = {
        "date": date,
        "cpu": reports.processor(),
        "threads": len(os.sched_getaffinity(0)),
        "models": models,
    }
    reports.keep(report, markdown(report, pictures), "agent", arguments.out)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
