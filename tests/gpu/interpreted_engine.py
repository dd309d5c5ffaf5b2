"""A small model through the engine on its GPU target, without a GPU: the fake driver's memory is the host's,
and Triton's interpreter runs each kernel that a graph launches. The same requests go through the CPU target
of the same plan.

Run by test_cuda_execution.py as a process of its own, as Triton reads TRITON_INTERPRET once:
    TRITON_INTERPRET=1 python interpreted_engine.py TARGET CHECKPOINT PLAN  ->  one JSON object
"""

from __future__ import annotations

import ctypes as c
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "runtime"), str(TESTS / "models")]

import engine as api  # noqa: E402
from fake_driver import FakeDriver, library_path  # noqa: E402

from tscompile import models, pipeline  # noqa: E402
from tscompile.assemble import assemble  # noqa: E402
from tscompile.build import Build, Options  # noqa: E402
from tscompile.checkpoint import Checkpoint  # noqa: E402
from tscompile.kernels.gpu.emit import emit  # noqa: E402
from tscompile.kernels.gpu.spec import GpuKernel  # noqa: E402
from tscompile.kernels.host import best_target  # noqa: E402

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "i32": torch.int32}
LIMITS = {"max_tokens": 4, "max_seqs": 2, "page_size": 32}
VOCAB = 64


class Kernels:
    """The plan's kernels, by symbol, as the interpreter runs them."""

    def __init__(self, build: Build, target: str) -> None:
        steps = [step for bucket in build.targets[target].buckets.values() for step in bucket.device.values()]
        launches = [launch for step in steps for launch in step.launches]
        self.specs: dict[str, GpuKernel] = {launch.kernel.symbol: launch.kernel for launch in launches}
        self.folder = tempfile.TemporaryDirectory(prefix="tscompile-")
        self.functions: dict[str, Any] = {}
        self.runs: dict[str, int] = {}

    def run(self, symbol: str, grid: tuple[int, int, int], addresses: list[int]) -> None:
        kernel = self.specs[symbol]
        assert addresses[len(kernel.params) :] == [0, 0]  # Triton's scratch pointers
        tensors = [
            torch.frombuffer((c.c_uint8 * 64).from_address(address), dtype=TORCH[param.dtype])
            for param, address in zip(kernel.params, addresses, strict=False)
        ]
        self.function(kernel)[grid](*tensors)
        self.runs[kernel.template] = self.runs.get(kernel.template, 0) + 1

    def function(self, kernel: GpuKernel) -> Any:
        if kernel.symbol not in self.functions:
            path = Path(self.folder.name) / f"{kernel.symbol}.py"
            path.write_text(emit(kernel, interpret=True))
            spec = importlib.util.spec_from_file_location(kernel.symbol, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.functions[kernel.symbol] = getattr(module, kernel.symbol)
        return self.functions[kernel.symbol]


def answers(path: Path, target: str) -> list[dict[str, Any]]:
    """Two requests, together: a prompt longer than a step, and a short one. What they say is forced, so that
    each output position has the same text before it on every target; what is compared is the model's own
    distribution."""
    prompts, forced = ([5, 9, 33, 17, 60, 2], [7]), (41, 12)
    with api.Engine(
        path, target=target, num_pages=8, num_threads=1, cuda_library=str(library_path()).encode()
    ) as engine:
        assert engine.target == target
        requests = [
            api.Request(
                prompt, max_tokens=2, ignore_eos=True, logit_bias=((token, 100.0),), num_logprobs=VOCAB
            )
            for prompt, token in zip(prompts, forced, strict=True)
        ]
        found = []
        for answer in engine.generate(requests):
            assert answer.finish == "length", answer.message
            tops = [sorted(zip(ids, logprobs, strict=True)) for ids, logprobs in answer.top]
            found.append({"tokens": answer.tokens, "logprobs": [[value for _, value in top] for top in tops]})
        return found


def main(target: str, checkpoint: Path, path: Path) -> None:
    options = Options(
        model=models.find_for(checkpoint),
        weights=checkpoint,
        out=path,
        dtype="bf16",
        targets=(target, best_target()),
        no_text=True,
        **LIMITS,
    )
    build = Build(options, Checkpoint(checkpoint), options.mesh)
    pipeline.run(build, pipeline.ALL, lambda _: None)
    assemble(build)
    kernels = Kernels(build, target)
    major, minor = divmod(int("".join(filter(str.isdigit, target))), 10)
    fake = FakeDriver(f"major={major};minor={minor}", kernels.run)
    on_gpu = answers(path, target)
    fake.check()
    print(json.dumps({"gpu": on_gpu, "cpu": answers(path, best_target()), "runs": kernels.runs}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
