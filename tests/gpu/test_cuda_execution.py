"""Plans of GPU targets, run by the engine on the fake driver: what it asks of the driver is what the plan
says, and what comes out is what the CPU target of the same plan gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import engine as api
import plans
import pytest
from checkpoints import Spec
from fake_driver import FakeDriver, library_path

from tscompile.kernels.gpu.spec import BATCH
from tscompile.kernels.host import best_target
from tscompile.layout import round_up
from tscompile.reader import Plan

HERE = Path(__file__).resolve().parent
LIMITS = {"max_tokens": 4, "max_seqs": 2, "page_size": 32}
DENSE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
SPEC = Spec("qwen3", DENSE)
ROUTED = {"num_hidden_layers": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS = {**DENSE, **ROUTED, "num_experts": 6}
LATENTS = {
    **DENSE,
    **ROUTED,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 0,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
}
LATENTS.pop("head_dim")
ALWAYS = {"embed", "rms_norm", "linear", "gemv", "attention_combine"}
GQA = {"qkv_write", "attention"}
MOE = {"route", "sort_routes", "experts", "experts_gemv", "experts_combine"}
MLA = {"head_linear", "latent_write", "latent_attention"}
# a family, and the kernels that its steps run
FAMILIES = {
    "qwen3": (SPEC, ALWAYS | GQA),
    "qwen3-moe": (Spec("qwen3-moe", EXPERTS), ALWAYS | GQA | MOE),
    "deepseek-v3": (Spec("deepseek_v3", LATENTS), ALWAYS | MLA | MOE | {"elementwise"}),
}
GPUS = {"sm_90a": "major=9;minor=0", "sm_100a": "major=10;minor=0"}
NUM_PAGES = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda") / "checkpoint"
    checkpoints.make(SPEC, folder)
    return folder


@pytest.fixture(scope="module")
def both(checkpoint: Path) -> Path:
    """A plan of both GPU targets."""
    return plans.build(checkpoint, checkpoint.parent / "gpus.tsp", "bf16", tuple(GPUS), **LIMITS)


def opened(path: Path, target: str) -> api.Engine:
    library = str(library_path()).encode()
    return api.Engine(path, target=target, num_pages=NUM_PAGES, num_threads=1, cuda_library=library)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_distribution_as_on_the_cpu(family: str, tmp_path: Path) -> None:
    """Real kernels, in Triton's interpreter, over prompts in chunks, decodes and two sequences a step. Both
    round to bf16, but sum in other orders, and the interpreter truncates: so log probabilities differ a
    little."""
    spec, kernels = FAMILIES[family]
    checkpoints.make(spec, tmp_path / "checkpoint")
    command = [
        sys.executable,
        str(HERE / "interpreted_engine.py"),
        "sm_90a",
        str(tmp_path / "checkpoint"),
        str(tmp_path / "plan.tsp"),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    for on_gpu, on_cpu in zip(found["gpu"], found["cpu"], strict=True):
        assert on_gpu["tokens"] == on_cpu["tokens"]
        for mine, theirs in zip(on_gpu["logprobs"], on_cpu["logprobs"], strict=True):
            assert len(mine) == len(theirs) == spec.config["vocab_size"]
            assert max(mine) - min(mine) > 2  # so that a wrong one would show
            assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) < 0.15
    assert set(found["runs"]) == kernels
    if family == "qwen3-moe":
        check_bytes_of_experts(Plan(tmp_path / "plan.tsp").json("tsp/roofline")["sm_90a"]["buckets"])


def check_bytes_of_experts(buckets: list[dict[str, Any]]) -> None:
    """Of experts' weights those that are routed to are read, each once."""
    hidden, inner = EXPERTS["hidden_size"], EXPERTS["moe_intermediate_size"]
    experts, top = EXPERTS["num_experts"], EXPERTS["num_experts_per_tok"]
    for bucket in buckets:
        tokens = bucket["max_tokens"]
        routes = tokens * top
        step = next(s for s in bucket["steps"] if s["kernels"][0].startswith("experts"))  # gate and up
        numbers = 4 * routes + 4 * experts
        weights = min(routes, experts) * 2 * inner * hidden
        assert step["bytes"] == 2 * tokens * hidden + numbers + 2 * weights + 2 * routes * inner


@pytest.mark.parametrize("target", GPUS)
def test_launches_are_those_of_the_plan(both: Path, target: str) -> None:
    """Grids, threads, shared memory, edges and every parameter, for each bucket; each lies whole within the
    memory that the engine took for it."""
    fake = FakeDriver(GPUS[target])
    plan = Plan(both)
    program = plan.json(f"tsp/program/{target}")
    with opened(both, target) as engine:
        assert engine.target == target
        (answer,) = engine.generate([api.Request([5, 9, 33, 17, 60, 2], max_tokens=2, ignore_eos=True)])
        assert answer.tokens == [0, 0]  # kernels do nothing here, and the arena is zero
    weights, offset = {}, 0
    sizes = {name: entry["bytes"] for name, entry in plan.manifest["entries"].items()}
    used = [launch["args"] for bucket in program["buckets"] for launch in bucket["launches"]]
    for name in dict.fromkeys(arg["weight"] for args in used for arg in args if "weight" in arg):
        weights[name] = offset
        offset += round_up(sizes[name], 256)
    slab = NUM_PAGES * program["kv"]["page_bytes"]
    memory = {call["allocation"]: call["bytes"] for call in fake.calls("allocated")}
    assert [memory[1], memory[2], memory[3]] == [
        offset,
        slab * len(program["kv"]["layers"]),
        program["arena_bytes"],
    ]
    launches = iter(fake.calls("cuLaunchKernelEx"))
    for bucket in program["buckets"]:
        arrays = batch_offsets(bucket["max_tokens"], min(bucket["max_tokens"], LIMITS["max_seqs"]))
        for number, wanted in enumerate(bucket["launches"]):
            found, kernel = next(launches), program["kernels"][wanted["kernel"]]
            assert found["kernel"] == wanted["kernel"]
            assert [found["x"], found["y"], found["z"]] == wanted["grid"]
            assert (found["threads"], found["shared"]) == (kernel["threads"], kernel["shared_bytes"])
            assert found["programmatic"] == (number > 0)
            places = [place(arg, program, weights, arrays, slab) for arg in wanted["args"]]
            assert found["params"] == " ".join("null" if p is None else f"{p[0]}+{p[1]}" for p in places)
            for arg, at in zip(wanted["args"], places, strict=True):
                if at is None:
                    continue
                size = arg.get("bytes", slab if "kv" in arg else 4)
                if "buffer" in arg:
                    size = program["buffers"][arg["buffer"]]["bytes"]
                assert at[1] % 64 == 0
                assert at[1] + size <= memory[at[0]]
    assert next(launches, None) is None
    wide = {k for k, kernel in program["kernels"].items() if kernel["shared_bytes"] > 48 << 10}
    assert len(fake.calls("cuFuncSetAttribute")) == len(wide)
    fake.check()


def batch_offsets(tokens: int, seqs: int) -> dict[str, int]:
    """Where the arrays of the batch lie, for one cache group (csrc/cuda_batch.h)."""
    order = {
        "sizes": 4,
        "token_ids": tokens,
        "positions": tokens,
        "query_start": seqs + 1,
        "context_len": seqs,
        "logit_rows": seqs,
        "slots": tokens,
    }
    offsets, at = {}, 0
    for name, ints in order.items():
        offsets[name] = at
        at += round_up(4 * ints, 64)
    assert set(offsets) | {"page_table"} == set(BATCH)
    return offsets | {"page_table": at}


def place(
    argument: dict[str, Any],
    program: dict[str, Any],
    weights: dict[str, int],
    arrays: dict[str, int],
    slab: int,
) -> tuple[int, int] | None:
    """Allocation (weights, KV cache, arena, batch) and offset."""
    match argument:
        case {"weight": name}:
            return 1, weights[name]
        case {"kv": layer}:
            return 2, layer * slab
        case {"buffer": index}:
            return 3, program["buffers"][index]["offset"]
        case {"batch": array}:
            return 4, arrays[array]
        case _:
            return None


def test_the_host_takes_the_target_that_runs(both: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Of a plan of several, that of the GPU that is there; without one the CPU's, or an error that says what
    is missing."""
    library = str(library_path()).encode()
    fake = FakeDriver(GPUS["sm_100a"])
    with api.Engine(both, num_pages=NUM_PAGES, cuda_library=library) as engine:
        assert engine.target == "sm_100a"
    fake.check()
    FakeDriver("major=8;minor=0")
    with pytest.raises(
        api.EngineError,
        match=r"the plan has kernels for sm_90a, sm_100a, this host runs .*; sm_90a: .* 9\.0, and here is "
        r"Fake GPU of 8\.0; sm_100a: .* 10\.0, and here is Fake GPU of 8\.0",
    ) as refused:
        api.Engine(both, cuda_library=library)
    assert refused.value.status == api.NO_TARGET
    mixed = plans.build(checkpoint, tmp_path / "mixed.tsp", "bf16", ("sm_90a", best_target()), **LIMITS)
    with api.Engine(mixed, num_pages=NUM_PAGES, cuda_library=library) as engine:
        assert engine.target == best_target()
    FakeDriver("version=12020")
    with pytest.raises(api.EngineError, match=r"is for CUDA 12\.2, wanted 12\.3 or later: update the driver"):
        api.Engine(mixed, cuda_library=library)
    with api.Engine(mixed, num_pages=NUM_PAGES, target=best_target(), cuda_library=library) as engine:
        assert engine.target == best_target()


def test_what_does_not_fit_is_told_by_part(both: Path) -> None:
    FakeDriver(GPUS["sm_90a"] + ";total=600000")
    with pytest.raises(
        api.EngineError,
        match=r"not enough memory on Fake GPU: weights take .*, activations and work space .*, batch .* and "
        r"the KV cache 4\.0 GiB .*, but 585\.9 KiB is free: ask for fewer pages",
    ) as refused:
        api.Engine(both, target="sm_90a", kv_bytes=4 << 30, cuda_library=str(library_path()).encode())
    assert refused.value.status == api.NO_MEMORY


def test_a_lost_gpu_ends_the_engine(both: Path) -> None:
    """The request that was running is told why, and so is whoever comes after it."""
    FakeDriver(GPUS["sm_90a"] + ";lose_at=2")
    with opened(both, "sm_90a") as engine:
        (answer,) = engine.generate([api.Request([5, 9], max_tokens=4, ignore_eos=True)])
        assert (len(answer.tokens), answer.finish) == (1, "error")
        assert "Fake GPU is lost: a step failed: CUDA_ERROR_LAUNCH_FAILED" in answer.message
        with pytest.raises(api.EngineError, match="Fake GPU is lost"):
            engine.submit(api.Request([5]))
