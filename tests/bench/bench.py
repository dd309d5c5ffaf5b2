"""Measures, and writes a dated report into artifacts/bench. `make bench` runs it; it ends by printing the
report as one line of JSON.

For the shapes of Qwen3-0.6B and Llama-3.2-1B, with random weights made on the spot: prefill and decode
tokens a second, resident memory, process start to first token; and, in the same run, what the machine can do
at most, so that each figure comes with the fraction of its floor: the time that reading the weights and the
KV cache once a step takes, or the products, whichever is more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import costs
import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
WORK = ROOT / "build" / "bench"
REPORTS = ROOT / "artifacts" / "bench"
PEAKS = {
    "cpu-avx2": "avx2_f32_flops_per_s",
    "cpu-avx512": "avx512_f32_flops_per_s",
    "cpu-amx": "amx_bf16_flops_per_s",
}

# (prompt, decode, batch, repeat): prefill is read off the long prompts, decode off the short ones and the
# longest
RUNS = (
    (512, 16, 1, 3),
    (2048, 16, 1, 1),
    (128, 64, 1, 3),
    (4096, 32, 1, 1),
    (128, 32, 8, 1),
    (128, 32, 16, 1),
)
QUICK = ((64, 16, 1, 1), (16, 8, 4, 1))


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def run(command: list[str | Path]) -> str:
    """The command's output. Its progress goes to our stderr; if it fails, so does the bench."""
    ended = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        sys.exit(f"bench: {' '.join(map(str, command))} failed with status {ended.returncode}")
    return ended.stdout


def machine(threads: int) -> dict[str, Any]:
    """What tests/bench/machine.cpp measures, and the processor's name."""
    program = WORK / "machine"
    source = Path(__file__).with_name("machine.cpp")
    run(["c++", "-std=c++20", "-O2", "-pthread", "-o", program, source])
    name = next(
        (
            line.partition(": ")[2]
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    return {"cpu": name, **json.loads(run([program, str(threads)]))}


def build(name: str) -> Path:
    """The plan of a shape, of this machine's best target, bf16."""
    checkpoint, plan = WORK / name, WORK / f"{name}.tsp"
    make_checkpoint.write(name, checkpoint)
    say(f"{name}: compile")
    start = time.monotonic()
    run([BIN / "tscompile", "build", checkpoint, "-o", plan])
    say(f"{name}: compiled in {time.monotonic() - start:.1f} s")
    time.sleep(3)  # until the file's times are old enough for the engine to remember its hashes
    return plan


def measure(name: str, plan: Path, threads: int, runs: Any) -> dict[str, Any]:
    """All runs of one model."""

    def bench(prompt: int, decode: int, batch: int, repeat: int) -> dict[str, Any]:
        tokens = (prompt + decode + 64) * batch
        command = [BIN / "tsruntime", "bench", plan, "--prompt", prompt, "--decode", decode, "--batch", batch]
        command += ["--threads", threads, "--repeat", repeat, "--kv-bytes", tokens * kv_bytes, "--json"]
        return json.loads(run([str(word) for word in command]))  # type: ignore[no-any-return]

    model = costs.Model(plan)
    kv_bytes = model.kv_bytes_per_token
    first = bench(16, 2, 1, 1)
    results = []
    for prompt, decode, batch, repeat in runs:
        say(f"{name}: prompt {prompt}, decode {decode}, batch {batch}")
        results.append(bench(prompt, decode, batch, repeat))
    known = bench(16, 2, 1, 1)
    return {
        "model": name,
        "parameters": model.num_parameters,
        "plan_bytes": plan.stat().st_size,
        "target": known["target"],
        "threads": known["threads"],
        "resident_bytes": max(result["resident_bytes"] for result in results),
        "start": {
            "new_file": {key: first[key] for key in ("start_ms", "first_token_ms")},
            "known_file": {key: known[key] for key in ("start_ms", "first_token_ms")},
        },
        "runs": results,
    }


def fractions(model: dict[str, Any], plan: Path, machines: list[dict[str, Any]]) -> None:
    """Adds to each run how much of the floor it reached, given the best that the machine showed before or
    after."""
    bandwidth = max(m["read_bytes_per_s"] for m in machines)
    peak = max(m[PEAKS[model["target"]]] for m in machines)
    shape = costs.Model(plan)
    for one in model["runs"]:
        prompt, decode, batch = one["prompt"], one["decode"], one["batch"]
        floor = shape.prefill_seconds(prompt, batch, bandwidth, peak)
        one["prefill_of_floor"] = floor * one["prefill_tokens_per_s"] / (prompt * batch)
        floor = shape.decode_seconds(prompt + decode // 2, batch, bandwidth, peak)
        one["decode_of_floor"] = floor * one["decode_tokens_per_s"] / batch


def markdown(report: dict[str, Any]) -> str:
    before = report["machine"]["before"]
    figures = [f"{before['cpu']}, {before['threads']} threads. Measured before / after the runs:", ""]
    for key in before:
        if key.endswith("_per_s"):
            unit = "GB/s" if "bytes" in key else "GFLOP/s"
            values = " / ".join(f"{report['machine'][when][key] / 1e9:.1f}" for when in ("before", "after"))
            figures.append(f"- {key.removesuffix('_per_s').replace('_', ' ')}: {values} {unit}")
    lines = [f"# {report['date']}, {report['isa']}", "", *figures, ""]
    for model in report["models"]:
        new, known = model["start"]["new_file"], model["start"]["known_file"]
        size, resident = model["plan_bytes"] / 2**30, model["resident_bytes"] / 2**30
        lines += [
            f"## {model['model']}'s shape, random weights, bf16, {model['target']}",
            "",
            f"- plan {size:.2f} GiB, resident at most {resident:.2f} GiB",
            f"- process start to first token {known['first_token_ms']:.0f} ms, {new['first_token_ms']:.0f} "
            "ms with a file new to the machine, whose weights are hashed",
            "",
            "| prompt | batch | prefill tokens/s | of floor | decode tokens/s | of floor |",
            "|---|---|---|---|---|---|",
        ]
        for r in model["runs"]:
            prefill = f"{r['prefill_tokens_per_s']:.0f} | {r['prefill_of_floor']:.0%}"
            decode = f"{r['decode_tokens_per_s']:.1f} | {r['decode_of_floor']:.0%}"
            lines.append(f"| {r['prompt']:,} | {r['batch']} | {prefill} | {decode} |")
        lines.append("")
    lines += [
        "The floor: a step takes at least the time to read the weights that it uses and the KV cache once,",
        "at the bandwidth above, and the time of its products at the peak of the target's instructions;",
        "the larger of the two counts.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", default=",".join(make_checkpoint.SHAPES), help="comma-separated; default: all"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="a few tokens only: to try the bench itself")
    parser.add_argument("--out", type=Path, default=REPORTS, metavar="DIR", help="default: artifacts/bench")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    names = arguments.models.split(",")
    plans = {name: build(name) for name in names}
    say("the machine itself")
    before = machine(arguments.threads)
    runs = QUICK if arguments.quick else RUNS
    models = [measure(name, plan, arguments.threads, runs) for name, plan in plans.items()]
    say("the machine again")
    after = machine(arguments.threads)
    for model in models:
        fractions(model, plans[model["model"]], [before, after])
    isa = models[0]["target"].removeprefix("cpu-")
    date = datetime.date.today().isoformat()
    report = {"date": date, "isa": isa, "machine": {"before": before, "after": after}, "models": models}
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{date}-{isa}"
    file.with_suffix(".md").write_text(markdown(report))
    file.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    say(f"wrote {file.with_suffix('.md')}")
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
