"""The command line. Progress goes to stderr, results to stdout.

Exit status: 0; 2 for the user's errors; 70 for our bugs."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tscompile import __version__
from tscompile.build import Options
from tscompile.errors import CompileError, InternalError
from tscompile.kernels.gpu.target import GPU_TARGETS
from tscompile.kernels.target import TARGETS

BUILD_EXAMPLES = """\
examples:
  a checkpoint's folder; the model file is found by its architecture
    tscompile build Qwen3-0.6B
  a model file of your own (docs/writing-a-model.md)
    tscompile build my_model.py --weights CHECKPOINT
  for other machines than this one
    tscompile build Qwen3-0.6B -o plan.tsp --target cpu-avx2,cpu-amx --dtype bf16
"""
EXAMPLES = """\
examples:
  tscompile build Qwen3-0.6B -o plan.tsp      compile a checkpoint into one file
  tscompile inspect plan.tsp                  what the plan holds
  tsruntime run plan.tsp                      serve it
"""
DTYPES = {"bf16": "bf16", "fp32": "f32"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `tscompile`. Returns the exit status."""
    try:
        return _needing_packages(lambda: _run(_parser().parse_args(arguments)))
    except CompileError as error:
        print(f"tscompile: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output went away
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (nothing is left to close it)
        return 0
    except OSError as error:
        print(f"tscompile: error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("TSCOMPILE_TRACEBACK"):
            raise
        what = str(error) if isinstance(error, InternalError) else f"{type(error).__name__}: {error}"
        print(
            f"tscompile: internal error: {what}\nThis is a bug in tscompile, not in your model. "
            "TSCOMPILE_TRACEBACK=1 shows where; please report it with the command that you ran.",
            file=sys.stderr,
        )
        return 70


def _needing_packages(run: Callable[[], int]) -> int:
    try:
        return run()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "tscompile":
            raise
        raise CompileError(
            f"the Python package {error.name} is not installed, and compiling needs it: "
            "pip install 'tscompile[build]'. (Serving a plan needs none.)"
        ) from None


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tscompile", description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    parser.description = "Compiles a language model ahead of time into one file, plan.tsp."
    parser.add_argument("--version", action="version", version=f"tscompile {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _build_options(commands)
    _plan_options(commands)
    for name, text in (
        ("inspect", "what a plan holds"),
        ("explain", "why a plan is as it is: placements, collectives and their cost, weights a rank"),
    ):
        command = commands.add_parser(name, help=text, description=f"Shows {text}.")
        command.add_argument("plan", type=Path, metavar="PLAN")
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _build_options(commands: Any) -> None:
    build = commands.add_parser(
        "build",
        help="compile a model and a checkpoint into a plan",
        description="Compiles a model and a checkpoint into a plan.",
        epilog=BUILD_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("model", type=Path, help="a model file (.py), or a checkpoint's folder")
    build.add_argument(
        "--weights", type=Path, metavar="DIR", help="the checkpoint's folder, if a model file was given"
    )
    build.add_argument(
        "-o", "--out", type=Path, default=Path("plan.tsp"), metavar="PLAN", help="default: plan.tsp"
    )
    build.add_argument(
        "--target",
        default="",
        metavar="T[,T]",
        help=f"CPUs: {', '.join(TARGETS)}; GPUs (a build needs none): {', '.join(GPU_TARGETS)}; "
        "default: this machine's best",
    )
    build.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of weights and KV cache; default: bf16"
    )
    build.add_argument(
        "--max-context",
        type=_count,
        default=0,
        metavar="N",
        help="tokens a sequence may have; default: what config.json says",
    )
    build.add_argument(
        "--page-size",
        type=_count,
        default=64,
        metavar="N",
        help="tokens of a KV page that a rank holds, a multiple of 32; default: 64",
    )
    build.add_argument(
        "--kernels-lock",
        type=Path,
        metavar="FILE",
        help="of GPU targets: take the kernels that a device has found quickest, as this file says",
    )
    build.add_argument(
        "--no-text", action="store_true", help="leave tokenizer and chat template out: token ids in and out"
    )
    _mesh_options(build)
    build.add_argument(
        "--dump", type=Path, metavar="DIR", help="write the graph after each pass, as DIR/NN-pass.txt"
    )
    build.add_argument(
        "--verify",
        action="store_true",
        help="run the model as captured on one rank and as fused on every rank on random tokens, compare, "
        "and write into the plan what was compared",
    )
    build.add_argument("--json", action="store_true", help="print a summary of the build as one JSON object")


def _plan_options(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="which meshes of ranks a model fits, and how quick they are",
        description="Ranks meshes by predicted step time, from config.json alone; builds nothing.",
    )
    plan.add_argument("model", type=Path, metavar="MODEL", help="a folder with config.json")
    plan.add_argument("--gpus", type=_count, required=True, metavar="N", help="ranks to use")
    plan.add_argument("--target", required=True, metavar="T", help="e.g. sm_90a, sm_100a, cpu-avx512")
    plan.add_argument("--context", type=_count, default=8192, metavar="N", help="tokens a sequence has")
    plan.add_argument("--concurrency", type=_count, default=64, metavar="N", help="sequences at once")
    plan.add_argument("--json", action="store_true", help="print one JSON object")


def _mesh_options(build: argparse.ArgumentParser) -> None:
    for axis, ranks in (
        ("tp", "tensor-parallel ranks"),
        ("ep", "expert-parallel ranks"),
        ("dp", "ranks that share sequences out"),
        ("cp", "ranks that share each sequence's KV cache out"),
        ("pp", "pipeline stages"),
    ):
        build.add_argument(f"--{axis}", type=_count, default=1, metavar="N", help=f"{ranks}; default: 1")
    build.add_argument(
        "--tokens",
        type=_count,
        default=0,
        metavar="N",
        help="tokens of the step that placements are chosen for; default: the most a step can have",
    )


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "build":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary files go
        _say("loading torch")
        from tscompile import models, pipeline  # torch takes a second: only for a build

        options = _options(arguments, models.find_for)
        summary = pipeline.compile_plan(options, _say)
        print(json.dumps(summary) if arguments.json else _sentence(summary))
        return 0
    if arguments.command == "plan":
        _say("loading torch")
        from tscompile import meshes

        load = meshes.Load(arguments.context, arguments.concurrency)
        ranked = meshes.rank_meshes(arguments.model, arguments.gpus, arguments.target, load, say=_say)
        print(json.dumps(ranked) if arguments.json else meshes.text(ranked), end="")
        return 0
    from tscompile import explain, inspect

    report, text = {
        "inspect": (inspect.inspect, inspect.inspect_text),
        "explain": (explain.explain, explain.explain_text),
    }[arguments.command]
    found = report(arguments.plan)
    print(inspect.to_json(found) if arguments.json else text(found))
    return 0


def _options(arguments: argparse.Namespace, find_for: Callable[[Path], Path]) -> Options:
    """The command line, checked. find_for: a checkpoint's folder -> the model file that knows it."""
    model, weights, out = arguments.model, arguments.weights, arguments.out
    if model.is_dir():
        if weights is not None:
            raise CompileError(
                f"{model} is a checkpoint's folder, so --weights {weights} has no place: give one of them"
            )
        weights, model = model, find_for(model)
    elif weights is None:
        if not model.exists():
            raise CompileError(f"{model} does not exist: give a model file, or a checkpoint's folder")
        raise CompileError(f"{model} is a model file: add --weights and the checkpoint's folder")
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise CompileError(
            f"-o {out}: " + ("is a folder" if out.is_dir() else f"there is no folder {out.parent}")
        )
    return Options(
        model=model,
        weights=weights,
        out=out,
        targets=tuple(target for target in arguments.target.split(",") if target),
        dtype=DTYPES[arguments.dtype],
        dump=arguments.dump,
        verify=arguments.verify,
        no_text=arguments.no_text,
        kernels_lock=arguments.kernels_lock,
        tp=arguments.tp,
        ep=arguments.ep,
        dp=arguments.dp,
        cp=arguments.cp,
        pp=arguments.pp,
        tokens=arguments.tokens,
        max_context=arguments.max_context,
        page_size=arguments.page_size,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _sentence(summary: dict[str, Any]) -> str:
    size = summary["bytes"] / 2**20
    targets = ", ".join(summary["targets"])
    return f"{summary['plan']}: {size:.1f} MiB, {summary['dtype']}, {targets}, in {summary['seconds']:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
