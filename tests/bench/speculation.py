"""Measures speculative decoding against none, and keeps a dated report in artifacts/bench.
`make bench-speculation` runs it (about 10 minutes); it ends by printing the report as one line of JSON.

Two engines over one plan, one that guesses and one that does not, answer the same requests in turn; outputs
must be the same bit for bit. Speed is output tokens after the first per second; of each workload the medians
of all repetitions, and the median of the ratios of neighbouring runs.

    edit    a model of Qwen3-0.6B's shape that copies with small edits (copying_checkpoint.py) is shown a
            source file and gives it back with some names changed; greedy
    fresh   the same model says one of 16 tokens at random, each about as likely: three tokens alike are found
            in the text all the time, and say nothing of the next
    code    the demo model writes Python at temperature 1: text that repeats as code does
    again   the demo model is asked at temperature 1 what the same tenant asked before, with the same seed
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import copying_checkpoint
import reports
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "runtime"))
from engine import Answer, Engine, Request  # noqa: E402

WORK = ROOT / "build" / "bench"
DEMO = ROOT / "artifacts" / "demo"
FILE = "tscompile/costs.py"
MARKER = "# The whole file follows, with the names changed as was asked for:\n# ---- the file ----\n"
EDIT_EVERY = 40  # tokens, about
PROMPTS = (
    'def read_lines(path):\n    """',
    "class Queue:\n",
    "import os\nimport sys\n\n\ndef main():\n",
    "def test_parse_header(self):\n",
)
BOUNDS = {"edit": 2.0, "fresh": 0.97, "code": 0.97}


def say(text: str) -> None:
    print(f"speculation: {text}", file=sys.stderr, flush=True)


def build(checkpoint: Path, plan: Path) -> Path:
    say(f"compile {checkpoint.name}")
    command = [sys.executable, "-m", "tscompile.cli", "build", str(checkpoint), "-o", str(plan)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
    return plan


def edits_of(ids: list[int], tokenizer: Tokenizer) -> dict[int, int]:
    """Names that become other names, the more frequent first, until about one token of EDIT_EVERY changes."""
    words = {
        token: name.replace("\u0120", " ")
        for name, token in tokenizer.get_vocab().items()
        if name.lstrip("\u0120").isalpha() and len(name) > 4
    }
    unused = iter(sorted(set(words) - set(ids)))
    edits: dict[int, int] = {}
    num_edits = 0
    for token, count in Counter(token for token in ids if token in words).most_common()[2:]:
        if (num_edits + count) * EDIT_EVERY > len(ids):
            continue
        edits[token] = next(unused)
        num_edits += count
    return edits


@dataclass(frozen=True)
class Workload:
    name: str
    plan: Path
    requests: list[Request]
    repeat: int
    ask_before: bool = False  # once, not measured


def timed(engine: Engine, request: Request) -> tuple[Answer, float]:
    """The answer, and the seconds from its first token to its last."""
    waiting = {engine.submit(request): Answer()}
    (number,) = waiting
    first = 0.0
    while not engine.poll(waiting, 600_000):
        first = first or time.perf_counter()
    return waiting[number], time.perf_counter() - first


def ask(
    engines: dict[str, Engine], requests: list[Request], round_: int
) -> tuple[dict[str, list[Answer]], dict[str, float]]:
    """Each request to both engines, one behind the other, so that what the machine does meanwhile falls on
    both. By engine the answers, and the output tokens after the first a second, over all."""
    answers: dict[str, list[Answer]] = {name: [] for name in engines}
    seconds = dict.fromkeys(engines, 0.0)
    for i, request in enumerate(requests):
        for name in list(engines) if (round_ + i) % 2 == 0 else reversed(list(engines)):
            answer, took = timed(engines[name], request)
            answers[name].append(answer)
            seconds[name] += took
    num_tokens = {name: sum(len(a.tokens) - 1 for a in found) for name, found in answers.items()}
    return answers, {name: num_tokens[name] / seconds[name] for name in engines}


def measure(workload: Workload, threads: int) -> dict[str, Any]:
    """Both engines, over the same requests."""
    # No more pages than the workload needs, for each repetition's tenant; more than that are never asked for.
    longest = max(len(r.prompt) + r.max_tokens for r in workload.requests)
    num_pages = 4 * (longest // 64 + 1) * len(workload.requests)
    options = {"num_threads": threads, "num_pages": num_pages}
    speeds: dict[str, list[float]] = {"without": [], "with": []}
    with (
        Engine(workload.plan, **options) as plain,
        Engine(workload.plan, max_draft=16, **options) as guessing,
    ):
        engines = {"without": plain, "with": guessing}
        counts = []
        for round_ in range(workload.repeat):
            asked = [replace(r, cache_salt=b"tenant %d" % round_) for r in workload.requests]
            if workload.ask_before:
                for engine in engines.values():
                    engine.generate(asked)
            before = guessing.stats()
            answers, found = ask(engines, asked, round_)
            after = guessing.stats()
            fields = ("num_steps", "num_drafted_tokens", "num_accepted_tokens")
            counts.append([getattr(after, field) - getattr(before, field) for field in fields])
            for name, speed in found.items():
                speeds[name].append(speed)
            say(f"{workload.name}: {found['without']:.1f} and {found['with']:.1f} tokens/s")
            if [a.output for a in answers["with"]] != [a.output for a in answers["without"]]:
                sys.exit(f"speculation: {workload.name}: guessing changed the output")
        target = plain.target
    steps, drafted, accepted = counts[-1]
    result = {
        "workload": workload.name,
        "target": target,
        "prompt_tokens": sum(len(r.prompt) for r in workload.requests),
        "output_tokens": sum(len(a.tokens) for a in answers["with"]),
        "without_tokens_per_s": statistics.median(speeds["without"]),
        "with_tokens_per_s": statistics.median(speeds["with"]),
        "ratios": [w / wo for w, wo in zip(speeds["with"], speeds["without"], strict=True)],
        "steps": steps,
        "drafted": drafted,
        "accepted": accepted,
    }
    result["ratio"] = statistics.median(result["ratios"])
    result["outputs"] = [a.tokens for a in answers["with"]]
    return result


def workloads(quick: bool) -> tuple[list[Workload], list[int]]:
    """And what the edited file should be."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    text = (ROOT / FILE).read_text()
    ids = tokenizer.encode(text, add_special_tokens=False).ids[: 200 if quick else None]
    marker = tokenizer.encode(MARKER, add_special_tokens=False).ids
    end = tokenizer.token_to_id("<|endoftext|>")
    edits = edits_of(ids, tokenizer)
    checkpoint = WORK / "copying"
    copying_checkpoint.write(checkpoint, DEMO / "tokenizer.json", edits)
    copying = build(checkpoint, WORK / "copying.tsp")
    demo = build(DEMO, WORK / "demo.tsp")
    edit = Request([*marker, *ids, end, *marker], max_tokens=len(ids) + 16)
    bias = [(token, 1e4) for token in range(1000, 1016)]
    length = 60 if quick else 300
    few = 60 if quick else 100
    fresh = [
        Request(marker, max_tokens=few, temperature=200.0, seed=seed, logit_bias=bias, ignore_eos=True)
        for seed in range(1, 4)
    ]
    code = [
        Request(
            tokenizer.encode(prompt, add_special_tokens=False).ids,
            max_tokens=length,
            temperature=1.0,
            seed=seed,
            ignore_eos=True,
        )
        for seed, prompt in enumerate(PROMPTS)
    ]
    again = [replace(request, max_tokens=length * 4) for request in code]
    found = [
        Workload("edit", copying, [edit], 1 if quick else 3),
        Workload("fresh", copying, fresh, 2 if quick else 11),
        Workload("code", demo, code, 3 if quick else 61),
        Workload("again", demo, again, 2 if quick else 5, ask_before=True),
    ]
    return found, [*(edits.get(token, token) for token in ids), end]


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# {report['date']}, speculative decoding",
        "",
        f"{report['cpu']}, {report['threads']} threads, {report['workloads'][0]['target']}. "
        "Each with and without guessing, in turn; medians.",
        "",
        "| workload | output tokens | without, tokens/s | with | ratio (range) | wanted | steps | drafted "
        "| accepted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for w in report["workloads"]:
        speeds = f"{w['without_tokens_per_s']:.1f} | {w['with_tokens_per_s']:.1f}"
        ratio = f"{w['ratio']:.2f} ({min(w['ratios']):.2f} to {max(w['ratios']):.2f})"
        bound = BOUNDS.get(w["workload"])
        wanted = f"{bound}: {'held' if w['ratio'] >= bound else 'NOT held'}" if bound else ""
        counts = f"{w['steps']} | {w['drafted']} | {w['accepted']}"
        lines.append(f"| {w['workload']} | {w['output_tokens']} | {speeds} | {ratio} | {wanted} | {counts} |")
    lines += ["", "Outputs are the same bit for bit, with and without.", "", "## Workloads", ""]
    doc = (__doc__ or "").split("\n\n")[2]
    lines += [f"```text\n{doc}\n```", ""]
    lines += [
        f"The file of `edit` is {FILE}, {report['edit']['tokens']} tokens, {report['edit']['edited']} of "
        f"which change; {report['edit']['wrong']} tokens of the answer are not what an exact edit would be. "
        "The edits are in the weights, not read from the prompt. What copies is attention over the prompt, "
        "by heads that were built by hand; a step costs what any of a model of that shape costs.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=0, help="default: every core")
    parser.add_argument("--only", help="comma-separated workloads; default: all")
    parser.add_argument("--quick", action="store_true", help="a few tokens only: to try the bench itself")
    parser.add_argument("--out", type=Path, default=reports.FOLDER, metavar="DIR")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    found, wanted = workloads(arguments.quick)
    only = arguments.only.split(",") if arguments.only else [w.name for w in found]
    results = [measure(workload, arguments.threads) for workload in found if workload.name in only]
    outputs = {result["workload"]: result.pop("outputs") for result in results}
    (given,) = outputs.get("edit", [wanted])
    tokens = len(wanted) - 1
    ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(
        (ROOT / FILE).read_text(), add_special_tokens=False
    )
    edit = {
        "file": FILE,
        "tokens": tokens,
        "edited": sum(a != b for a, b in zip(wanted[:tokens], ids.ids, strict=False)),
        "wrong": sum(a != b for a, b in zip(given, wanted, strict=False)) + abs(len(given) - len(wanted)),
    }
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpu": reports.processor(),
        "threads": arguments.threads or len(os.sched_getaffinity(0)),
        "edit": edit,
        "workloads": results,
    }
    reports.keep(report, markdown(report), "speculation", arguments.out)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
