"""What is to be seen on a machine with a GPU, in one run of a few minutes. Every cubin loads; every kernel
gives what float64 gives, over poisoned outputs; linear layers of real models are timed, by graph replay over
rotated cold weights, beside cuBLAS; a small model runs through the engine. Started by tests/gpu/lease.sh.

    lease.py prepare FOLDER           on any machine: kernels compiled, a plan, and what the CPU says of it
    lease.py run FOLDER OUT.json      with a GPU; --library names a driver, --quick takes few of each

Beside OUT.json comes kernels.lock, for `tscompile build --kernels-lock`: of the ways to compute each linear
that were timed, the quickest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "runtime"), str(TESTS / "models")]

import engine as api  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from driver import Driver, DriverError, Function  # noqa: E402
from kernels_of_models import SHAPES, Shape, descriptions, launches  # noqa: E402
from triton_arrays import CASES  # noqa: E402
from triton_case import GUARD, TARGET, Guarded  # noqa: E402

from tscompile.kernels import desc  # noqa: E402
from tscompile.kernels.gpu import lockfile  # noqa: E402
from tscompile.kernels.gpu.offers import Offer  # noqa: E402
from tscompile.kernels.gpu.select import choose, offered  # noqa: E402
from tscompile.kernels.gpu.spec import SCRATCH, GpuKernel, GpuLaunch, Rows  # noqa: E402
from tscompile.layout import stored_shape  # noqa: E402

SEEDS = 20  # cases of each kind
TIMED = (1, 8, 64, 512)  # tokens of a step
COLD_BYTES = 256 << 20  # of weights that a replay goes through: more than the L2 cache holds
REPLAYS = 20
PROMPTS = ([5, 9, 33, 17, 60, 2], [7])
FORCED = (41, 12)  # what each answer says, so that positions can be compared


# ---- on any machine ---------------------------------------------------------------------------------------


def kernels_of_cases(num: int) -> Iterator[GpuKernel]:
    for index, kind in enumerate(CASES):
        for seed in range(num):
            case = CASES[kind](np.random.default_rng([seed, index]))
            yield from (launch.kernel for launch in choose(case.made, TARGET, case.rows).launches)


def linears_of(shape: Shape) -> Iterator[desc.Linear]:
    yield from (made for made in descriptions(shape) if isinstance(made, desc.Linear) and not made.gather)


def rows_of(num: int) -> Rows:
    return Rows(num, min(num, 64))


def timed_offers(made: desc.Linear, num: int) -> list[Offer]:
    """The ways that are timed, the cost model's first: of each shape of tile the two deepest."""
    found: list[Offer] = []
    seen: dict[str, int] = {}
    for offer in offered(made, TARGET, rows_of(num)):
        shape = offer.config.partition(" stages=")[0]
        if offer.operand_bytes <= TARGET.tile_bytes and seen.get(shape, 0) < 2:
            seen[shape] = seen.get(shape, 0) + 1
            found.append(offer)
    return found


def launch_of(offer: Offer) -> GpuLaunch:
    (launch,) = offer.step.launches
    return launch


def prepare(folder: Path, num: int, tokens: tuple[int, ...] = TIMED) -> None:
    """Writes FOLDER/kernels.json, cubins, plan.tsp and expected.json. tokens: of the steps that linears are
    timed in."""
    import checkpoints
    import plans

    from tscompile.kernels.build import cache_folder
    from tscompile.kernels.gpu.build import compile_all, library_of
    from tscompile.kernels.host import best_target

    folder.mkdir(parents=True, exist_ok=True)
    kernels = {kernel.symbol: kernel for kernel in kernels_of_cases(num)}
    for shape in SHAPES.values():
        kernels |= {launch.kernel.symbol: launch.kernel for launch in launches(shape, TARGET, TIMED)}
        for made in linears_of(shape):
            ways = [launch_of(offer) for size in tokens for offer in timed_offers(made, size)]
            kernels |= {launch.kernel.symbol: launch.kernel for launch in ways}
    compiled, version = compile_all(list(kernels.values()), TARGET, cache=cache_folder())
    library, table = library_of(compiled, TARGET)
    (folder / "cubins").write_bytes(library)
    (folder / "kernels.json").write_text(json.dumps({"compiler": version, "kernels": table}))
    config = {"vocab_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    checkpoints.make(checkpoints.Spec("qwen3", config), folder / "checkpoint")
    limits = {"max_tokens": 4, "max_seqs": 2, "page_size": 32}
    plans.build(folder / "checkpoint", folder / "plan.tsp", "bf16", (TARGET.name, best_target()), **limits)
    (folder / "expected.json").write_text(json.dumps(log_probabilities(folder / "plan.tsp", best_target())))


def log_probabilities(path: Path, target: str, library: str | None = None) -> list[list[list[float]]]:
    """Of each request and output position, all tokens' by id."""
    given = library.encode() if library else None
    with api.Engine(path, target=target, num_pages=8, num_threads=1, cuda_library=given) as engine:
        requests = [
            api.Request(prompt, max_tokens=2, ignore_eos=True, logit_bias=((token, 100.0),), num_logprobs=64)
            for prompt, token in zip(PROMPTS, FORCED, strict=True)
        ]
        found = []
        for answer in engine.generate(requests):
            assert answer.finish == "length", answer.message
            found.append([[v for _, v in sorted(zip(*top, strict=True))] for top in answer.top])
        return found


# ---- with a GPU -------------------------------------------------------------------------------------------


class Kernels:
    """Those that were prepared, loaded."""

    def __init__(self, folder: Path, driver: Driver, *, beside_torch: bool) -> None:
        self.driver, self.beside_torch = driver, beside_torch
        made, library = json.loads((folder / "kernels.json").read_text()), (folder / "cubins").read_bytes()
        self.compiler = made["compiler"]
        self.functions: dict[str, Function] = {}
        self.refused: list[str] = []
        for symbol, kernel in made["kernels"].items():
            cubin = library[kernel["offset"] : kernel["offset"] + kernel["bytes"]]
            try:
                self.functions[symbol] = driver.load(cubin, symbol, kernel["threads"], kernel["shared_bytes"])
            except DriverError as error:
                self.refused.append(f"{symbol}: {error}")

    def start(self, kernel: GpuKernel, grid: tuple[int, int, int], arrays: list[Guarded]) -> None:
        """Runs a kernel over arrays, whose guards go with them."""
        held = []
        for array in arrays:
            data = array.whole.contiguous().view(torch.uint8).numpy()
            held.append((array, self.driver.allocate(data.nbytes), data))
            self.driver.write(held[-1][1], data.tobytes())
        params = [address + GUARD * array.whole.element_size() for array, address, _ in held]
        self.driver.launch(self.functions[kernel.symbol], grid, [*params, *(0 for _ in SCRATCH)])
        self.driver.synchronize()
        for _, address, data in held:
            data[:] = np.frombuffer(self.driver.read(address, data.nbytes), np.uint8)
            self.driver.free(address)


def check_kernels(kernels: Kernels, num: int) -> list[dict[str, Any]]:
    """A line a case: the largest differences from float64, or what is wrong."""
    found = []
    for index, kind in enumerate(CASES):
        for seed in range(num):
            case = CASES[kind](np.random.default_rng([seed, index]))
            line: dict[str, Any] = {
                "kind": kind,
                "seed": seed,
                "desc": case.made.text,
                "rows": str(case.rows),
            }
            try:
                line["differences"] = case.run(kernels.start)
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}"
            found.append(line)
    return found


def time_linears(kernels: Kernels, tokens: tuple[int, ...], cold: int, replays: int) -> list[dict[str, Any]]:
    """Microseconds of a launch, of random values, by each way that is offered, the cost model's first; and of
    torch.matmul of the same shapes where torch has a GPU."""
    found = []
    for name, shape in SHAPES.items():
        for made in linears_of(shape):
            for num in tokens:
                line = {"model": name, "n": made.n, "k": made.k, "swiglu": bool(made.swiglu), "tokens": num}
                line |= time_linear(kernels, made, num, cold, replays)
                found.append(line | {"bucket": lockfile.bucket_of(made, rows_of(num)), "desc": made.text})
    return found


def time_linear(kernels: Kernels, made: desc.Linear, num: int, cold: int, replays: int) -> dict[str, Any]:
    driver = kernels.driver
    row = stored_shape("rows", "bf16", (made.k,))[-1]
    weight_bytes = 2 * made.n * row
    copies = max(1, -(-cold // weight_bytes))
    sizes = {
        "x": 2 * num * made.k,
        "weight": weight_bytes * copies,
        "out": 4 * num * (made.swiglu or made.n),
        "sizes": 16,
    }
    at = {name: driver.allocate(size) for name, size in sizes.items()}
    random = np.random.default_rng(0)
    driver.write(at["sizes"], np.array([num, min(num, 64), min(num, 64), 1], np.int32).tobytes())
    driver.write(at["x"], bf16(random, num * made.k))
    part = bf16(random, min(weight_bytes // 2, 1 << 24))
    for begin in range(0, sizes["weight"], len(part)):
        driver.write(at["weight"] + begin, part[: sizes["weight"] - begin])
    ways: list[dict[str, Any]] = []
    for offer in timed_offers(made, num):
        launch = launch_of(offer)
        with driver.graph() as graph:
            for copy in range(copies):
                here = at | {"weight": at["weight"] + copy * weight_bytes}
                params = [here[p.name] for p in launch.kernel.params]
                driver.launch(
                    kernels.functions[launch.kernel.symbol],
                    launch.grid,
                    [*params, *(0 for _ in SCRATCH)],
                    programmatic=copy > 0,
                )
        replay = graph[0]
        seconds = best(lambda: driver.replay(replay), driver.synchronize, replays) / copies  # noqa: B023
        driver.drop(replay)
        ways.append({"kernel": launch.kernel.symbol, "config": offer.config, "us": 1e6 * seconds})
    for address in at.values():
        driver.free(address)
    line = ways[0] | {"copies": copies, "weight_bytes_per_s": weight_bytes / (ways[0]["us"] / 1e6)}
    if kernels.beside_torch:
        line["torch_us"] = 1e6 * time_torch(made.n, made.k, num, copies, replays)
    return line | {"offers": ways}


def locked(linears: list[dict[str, Any]], device: str, date: str) -> list[lockfile.Entry]:
    """Of each linear and bucket, the way that took least."""
    quickest = [(line, min(line["offers"], key=lambda way: way["us"])) for line in linears]
    return [
        lockfile.Entry(
            TARGET.name, line["desc"], line["bucket"], way["config"], round(way["us"], 3), device, date
        )
        for line, way in quickest
    ]


def time_torch(n: int, k: int, num: int, copies: int, replays: int) -> float:
    """Seconds of one torch.matmul, bf16, replayed as a graph over as many copies of the weight."""
    x = torch.randn(num, k, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    torch.matmul(x, weights[0].T)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            torch.matmul(x, weight.T)
    return best(graph.replay, torch.cuda.synchronize, replays) / copies


def best(replay: Any, synchronize: Any, replays: int) -> float:
    """The median of the seconds that a replay takes, by the host's clock: a graph is long beside a call."""
    taken = []
    for _ in range(replays + 2):
        synchronize()
        begin = time.perf_counter()
        replay()
        synchronize()
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken[2:]))


def bf16(random: np.random.Generator, num: int) -> bytes:
    values = torch.from_numpy(random.standard_normal(num, np.float32)).bfloat16()
    return values.view(torch.uint8).numpy().tobytes()


def run(folder: Path, out: Path, library: str | None, quick: bool) -> int:
    """Writes what was found, as soon as each part is done. The exit status: 1 if anything is wrong."""
    begin = time.monotonic()
    driver = Driver(library or "libcuda.so.1")
    report: dict[str, Any] = {
        "device": driver.name,
        "arch": driver.arch,
        "target": TARGET.name,
        "quick": quick,
    }

    def done(**parts: Any) -> None:
        report.update(parts, seconds=round(time.monotonic() - begin, 1))
        out.write_text(json.dumps(report, indent=1) + "\n")

    # torch finds its driver itself: with another one named, it is left out
    kernels = Kernels(folder, driver, beside_torch=library is None and torch.cuda.is_available())
    done(compiler=kernels.compiler, num_loaded=len(kernels.functions), refused=kernels.refused)
    cases = check_kernels(kernels, 1 if quick else SEEDS)
    done(cases=cases)
    expected = json.loads((folder / "expected.json").read_text())
    found = log_probabilities(folder / "plan.tsp", TARGET.name, library)
    differences = np.abs(np.array(found) - np.array(expected))
    done(engine={"max_difference": float(differences.max()), "limit": 0.15})
    linears = time_linears(kernels, TIMED[:1] if quick else TIMED, 0 if quick else COLD_BYTES, REPLAYS)
    done(linears=linears)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    out.with_name("kernels.lock").write_text(lockfile.text_of(locked(linears, driver.name, today)))
    wrong = [case for case in cases if "error" in case]
    good = not wrong and not kernels.refused and differences.max() < report["engine"]["limit"]
    print(f"{driver.name}: {len(kernels.functions)} kernels loaded, {len(kernels.refused)} refused; "
          f"{len(cases)} cases, {len(wrong)} wrong; {report['seconds']} s")  # fmt: skip
    for case in wrong[:10]:
        print(f"  {case['kind']} seed {case['seed']}: {case['error']}")
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    second = commands.add_parser("run")
    for each in (first, second):
        each.add_argument("folder", type=Path)
        each.add_argument("--quick", action="store_true")
    second.add_argument("out", type=Path)
    second.add_argument("--library")
    given = parser.parse_args()
    if given.command == "prepare":
        prepare(given.folder, 1 if given.quick else SEEDS, TIMED[:1] if given.quick else TIMED)
        return 0
    os.environ.setdefault("TS_ENGINE_LIBRARY", str(given.folder / "libtsengine.so"))
    return run(given.folder, given.out, given.library, given.quick)


if __name__ == "__main__":
    sys.exit(main())
