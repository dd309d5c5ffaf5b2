"""Plans of GPU targets under the executable, with the fake driver where NVIDIA's would be."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import checkpoints
import engine as api
import plans
import pytest
from checkpoints import Spec

FAKE = api.library_path().parent / "tests" / "libts_fake_cuda.so"
SPEC = Spec("qwen3", {"vocab_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})


@pytest.fixture(scope="module")
def gpu_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    checkpoints.make(SPEC, folder / "checkpoint")
    limits = {"max_tokens": 4, "max_seqs": 2, "page_size": 32}
    return plans.build(folder / "checkpoint", folder / "gpu.tsp", "bf16", ("sm_90a",), **limits)


def generate(
    executable: Path, plan: Path, *more: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [
        executable,
        "generate",
        plan,
        "--ids",
        "5,9,7",
        "--max-tokens",
        "3",
        "--num-pages",
        "8",
        "--json",
        *more,
    ]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_the_driver_is_found_by_its_variable(executable: Path, gpu_plan: Path, tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"
    done = generate(executable, gpu_plan, TSRUNTIME_LIBCUDA=str(FAKE), FAKE_CUDA=f"log={log}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ids"] == [0]  # nothing is computed, and 0 is the end token
    calls = [json.loads(line)["call"] for line in log.read_text().splitlines()]
    assert "violation" not in calls
    at = calls.index("cuGraphLaunch")
    assert calls.count("cuGraphLaunch") == 1
    assert calls[at - 1] == "cuMemcpyHtoDAsync"
    assert calls[at + 1 : at + 3] == ["cuMemcpyDtoHAsync", "cuStreamSynchronize"]


def test_no_second_tier_yet(executable: Path, gpu_plan: Path) -> None:
    done = generate(executable, gpu_plan, "--kv-offload", "1M", TSRUNTIME_LIBCUDA=str(FAKE))
    assert done.returncode == 2
    assert "offload_bytes is 1048576, but sm_90a runs on a GPU" in done.stderr


@pytest.mark.parametrize(
    ("settings", "status", "said"),
    [
        ("version=12020", 3, ["the NVIDIA driver is for CUDA 12.2, wanted 12.3 or later: update the driver"]),
        (
            "major=8;minor=6",
            3,
            [
                "the plan has kernels for sm_90a, this host runs",
                "sm_90a runs on GPUs of compute capability 9.0, and here is Fake GPU of 8.6",
            ],
        ),
        ("devices=0", 3, ["the NVIDIA driver sees no GPU: CUDA_ERROR_NO_DEVICE"]),
        (
            "total=286720",
            1,
            [
                "not enough memory on Fake GPU: weights take ",
                "activations and work space ",
                "batch ",
                "and the KV cache 64.0 KiB (8 pages of 32 tokens, 8.0 KiB a page), but 280.0 KiB is free: "
                "ask for fewer pages",
            ],
        ),
        (
            "oom_at=1",
            1,
            [
                "Fake GPU has not enough memory for what is needed, ",
                "weights take ",
                "KV cache 64.0 KiB; 8.0 GiB ",
            ],
        ),
        ("host_oom_at=1", 1, ["getting pinned memory for the batch", "CUDA_ERROR_OUT_OF_MEMORY"]),
    ],
)
def test_what_a_gpu_lacks_is_named(
    executable: Path, gpu_plan: Path, settings: str, status: int, said: list[str]
) -> None:
    """One line, and the status: 3 for a host that does not run the plan, 1 for one too small."""
    done = generate(executable, gpu_plan, TSRUNTIME_LIBCUDA=str(FAKE), FAKE_CUDA=settings)
    assert done.returncode == status
    assert done.stderr.count("\n") == 1
    for text in said:
        assert text in done.stderr


def test_without_a_driver(executable: Path, gpu_plan: Path) -> None:
    done = generate(executable, gpu_plan, TSRUNTIME_LIBCUDA="/nowhere/libcuda.so.1")
    assert done.returncode == 3
    assert "the plan has kernels for sm_90a, this host runs" in done.stderr
    assert "sm_90a: there is no NVIDIA driver (/nowhere/libcuda.so.1: " in done.stderr
