"""Plans for device targets: what `tscompile build --target sm_90a` gives, on a machine without a GPU."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import checkpoints
import engine as api
import plans
import pytest
import sass
from checkpoints import Spec

from tscompile.errors import CompileError
from tscompile.explain import explain, explain_text
from tscompile.inspect import inspect, inspect_text
from tscompile.kernels.gpu.cubin import parameters
from tscompile.kernels.gpu.spec import BATCH, POINTER_BYTES, SCRATCH
from tscompile.kernels.gpu.target import GPU_TARGETS
from tscompile.kernels.host import best_target
from tscompile.layout import lay_back
from tscompile.reader import Plan
from tscompile.topology import topology_of

TARGET = GPU_TARGETS["sm_90a"]
NO_DRIVER = b"/nowhere/libcuda.so.1"
SMALL = {"max_tokens": 4, "max_seqs": 4, "page_size": 32}
SPEC = Spec(
    "qwen3", {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "tie_word_embeddings": True}
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device") / "checkpoint"
    checkpoints.make(SPEC, folder)
    return folder


@pytest.fixture(scope="module")
def path(checkpoint: Path) -> Path:
    out = checkpoint.parent / "plan.tsp"
    return plans.build(checkpoint, out, "bf16", (TARGET.name, best_target()), **SMALL)


@pytest.fixture(scope="module")
def program(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = Plan(path).json(f"tsp/program/{TARGET.name}")
    return found


def cubins(path: Path, program: dict[str, Any]) -> dict[str, bytes]:
    library = bytes(Plan(path).bytes(f"tsp/kernels/{TARGET.name}"))
    return {
        symbol: library[kernel["offset"] : kernel["offset"] + kernel["bytes"]]
        for symbol, kernel in program["kernels"].items()
    }


def test_every_launch_fits_its_cubin(path: Path, program: dict[str, Any]) -> None:
    """The cubin's own parameter table is the plan's packing, scratch pointers included; attributes are in
    range; every argument names something that is there."""
    found, buffers = cubins(path, program), program["buffers"]
    weights = {name for name, e in Plan(path).manifest["entries"].items() if e["kind"] == "weight"}
    assert [bucket["max_tokens"] for bucket in program["buckets"]] == [1, 2, 4]
    launched = set()
    for launch in (launch for bucket in program["buckets"] for launch in bucket["launches"]):
        kernel, arguments = program["kernels"][launch["kernel"]], launch["args"]
        launched.add(launch["kernel"])
        packed = [[POINTER_BYTES * i, POINTER_BYTES] for i in range(len(arguments))]
        assert (
            kernel["params"]
            == packed
            == [list(p) for p in parameters(found[launch["kernel"]], launch["kernel"])]
        )
        assert [argument.get("null") for argument in arguments[-2:]] == list(SCRATCH)
        for argument in arguments[:-2]:
            (kind,) = argument.keys() & {"buffer", "weight", "kv", "batch"}
            known = {"buffer": range(len(buffers)), "weight": weights, "batch": BATCH}
            assert argument[kind] in known.get(kind, range(len(program["kv"]["layers"])))
        x, y, z = launch["grid"]
        assert 1 <= x < 2**31
        assert 1 <= y < 2**16
        assert 1 <= z < 2**16
        assert kernel["threads"] % 32 == 0
        assert kernel["threads"] <= TARGET.block_threads
        assert kernel["shared_bytes"] <= TARGET.shared_bytes
        assert kernel["threads"] * kernel["registers"] <= TARGET.sm_registers
    assert launched == set(found)
    symbol = next(iter(found))
    assert [list(p) for p in sass.parameters(found[symbol])] == program["kernels"][symbol]["params"]
    assert all(b["offset"] % 64 == 0 and b["offset"] + b["bytes"] <= program["arena_bytes"] for b in buffers)


def test_work_between_kernels_is_apart(program: dict[str, Any]) -> None:
    """What splits give lies over nothing that their launches read or write."""
    shared = 0
    for bucket in program["buckets"]:
        for launch in bucket["launches"]:
            used = [program["buffers"][i] for i in {a["buffer"] for a in launch["args"] if "buffer" in a}]
            spans = sorted((b["offset"], b["offset"] + b["bytes"], b["name"]) for b in used)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), launch
            shared += any(name.endswith(".partial") for *_, name in spans)
    assert shared == 2 * 2 * len(program["buckets"])  # attention and its combine, in both layers


def test_selection_is_by_bucket(program: dict[str, Any]) -> None:
    """A linear of one or two rows streams its weights, one of more is on the tensor cores; grids grow."""
    kinds = [
        {launch["kernel"].rpartition("_")[0] for launch in bucket["launches"]}
        for bucket in program["buckets"]
    ]
    assert ["gemv" in found for found in kinds] == [True, True, False]
    assert ["linear" in found for found in kinds] == [False, False, True]
    embeds = [bucket["launches"][0] for bucket in program["buckets"]]
    assert len({launch["kernel"] for launch in embeds}) == 1
    assert [launch["grid"][0] for launch in embeds] == [1, 2, 4]


def test_same_bytes_in_another_folder(checkpoint: Path, path: Path, tmp_path: Path) -> None:
    again = plans.build(checkpoint, tmp_path / "again.tsp", "bf16", (TARGET.name, best_target()), **SMALL)
    assert again.read_bytes() == path.read_bytes()


def test_weights_lie_in_rows(path: Path) -> None:
    """Beside a CPU target's tiles, of the same values; what both read alike is there once."""
    plan, steps = Plan(path), {}
    for item in Plan(path).json("tsp/pack"):
        steps[item["weight"]] = item["steps"][-1]["layout"]
    assert steps["layers.0.self_attn.qkv.weight:rows"] == "rows"
    assert steps["layers.0.self_attn.qkv.weight:tiles"] == "tiles"
    assert "norm.weight" in steps
    shape = (2 * 64 * 4, 256)
    found = []
    for layout in ("rows", "tiles"):
        tensor = plan.tensor(f"layers.0.self_attn.qkv.weight:{layout}")
        found.append(lay_back(layout, tensor, shape))
    assert found[0].equal(found[1])


def test_what_explain_and_inspect_show(path: Path) -> None:
    report = explain(path)
    (bounds,) = report["roofline"].values()
    (step,) = [s for s in bounds["buckets"][0]["steps"] if s["op"] == "logits"]
    tokens, vocab, width = 1, 512, 256
    assert step["flops"] == 2 * tokens * vocab * width
    assert (
        step["bytes"] == 2 * vocab * width + 2 * tokens * width + 4 * tokens * vocab + 4
    )  # and one row's number
    assert (step["bound"], step["blocks"], step["waves"]) == ("memory", 512, 1)
    assert step["ns"] == round(1e9 * step["bytes"] / topology_of("sm_90a").read_bytes_per_s)
    (qkv,) = [s for s in bounds["buckets"][2]["steps"] if "qkv_write" in s["kernels"][0]]
    row = (4 + 2 * 2) * 64  # q, k and v of a token; a row of the table is 64 f32, positions and slots 4 bytes
    assert (qkv["count"], qkv["bytes"]) == (2, 4 * (4 * row + 2 * row + 4 * 64 + 2 * 4) + 2 * 4 * 64)
    text = explain_text(report)
    assert "kernels of sm_90a: bounds from shapes and machine, nothing measured" in text
    assert "steps of up to 4 tokens: at best" in text
    assert "attention_combine" in inspect_text(inspect(path))


def test_a_cpu_runs_its_own_target_of_the_same_plan(path: Path) -> None:
    with api.Engine(path, cuda_library=NO_DRIVER) as engine:
        assert engine.target == best_target()
        (answer,) = engine.generate([api.Request([7, 8, 9], max_tokens=4, ignore_eos=True)])
        assert len(answer.tokens) == 4
    with pytest.raises(
        api.EngineError,
        match=r"'sm_90a' does not run on this host; the plan has sm_90a, cpu-.*; sm_90a: there is no NVIDIA "
        r"driver",
    ):
        api.Engine(path, target="sm_90a", cuda_library=NO_DRIVER)


def test_the_engine_refuses_a_plan_for_gpus_alone(checkpoint: Path, tmp_path: Path) -> None:
    out = plans.build(checkpoint, tmp_path / "plan.tsp", "bf16", (TARGET.name,), **SMALL)
    with pytest.raises(
        api.EngineError,
        match=r"the plan has kernels for sm_90a, this host runs .*cpu-avx2.*; sm_90a: there is no NVIDIA "
        r"driver \(/nowhere/libcuda.so.1: .*\): install it",
    ) as refused:
        api.Engine(out, cuda_library=NO_DRIVER)
    assert refused.value.status == api.NO_TARGET


def test_what_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    def build(*targets: str, dtype: str = "bf16", **options: Any) -> None:
        plans.build(checkpoint, tmp_path / "plan.tsp", dtype, targets, **SMALL | options)

    with pytest.raises(
        CompileError, match=r"unknown target 'sm_80'; known are cpu-avx2, .*, sm_90a, sm_100a"
    ):
        build("sm_80")
    with pytest.raises(
        CompileError, match="sm_90a has kernels for bf16, not for f32: build with --dtype bf16"
    ):
        build("sm_90a", dtype="f32")
    with pytest.raises(
        CompileError, match=r"sm_100a: a plan of 2 ranks .* collectives .* build it for one rank"
    ):
        build("cpu-avx2", "sm_100a", tp=2)
    assert not (tmp_path / "plan.tsp").exists()
