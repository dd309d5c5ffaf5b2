"""The bench's own parts: checkpoints of a shape, the price of a step, the report."""

import json
import subprocess
import sys
from pathlib import Path

import bench
import costs
import make_checkpoint
import plans
import pytest
from tokenizers import Tokenizer

from tscompile.checkpoint import Checkpoint

SMALL = make_checkpoint.LLAMA | make_checkpoint.BOTH
SMALL |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
PARAMETERS = 512 * 64 + 2 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64) + 64


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    make_checkpoint.SHAPES["small"] = SMALL
    try:
        make_checkpoint.write("small", folder / "small")
        make_checkpoint.write("small", folder / "small")  # is there: nothing to do
    finally:
        del make_checkpoint.SHAPES["small"]
    return plans.build(folder / "small", folder / "plan.tsp", "bf16")


def test_checkpoints_are_of_the_published_size() -> None:
    sizes = {}
    for name, config in make_checkpoint.SHAPES.items():
        shapes = [shape for _, shape in make_checkpoint.tensors(config)]
        sizes[name] = round(sum(rows * (shape[0] if shape else 1) for rows, *shape in shapes) / 1e6)
        assert sum(map(len, make_checkpoint.shards(config))) == len(shapes)
    assert sizes == {"qwen3-0.6b": 596, "llama-3.2-1b": 1236}


def test_the_control_plane_is_measured_and_reported(tmp_path: Path) -> None:
    script = Path(bench.__file__).with_name("control.py")
    done = subprocess.run(
        [sys.executable, script, "--quick", "--out", tmp_path], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout.splitlines()[-1])
    for name in ("step/4/blank", "step/8/full", "turn/8", "admit/50000/full", "admit.request/50000/blank"):
        assert 0 < report["figures"][name]["min_us"] <= report["figures"][name]["median_us"]
    (markdown,) = tmp_path.glob("*-control.md")
    assert "| 4, blank pages left |" in markdown.read_text()
    assert json.loads(markdown.with_suffix(".json").read_text()) == report


def test_the_made_up_vocabulary_is_a_tokenizer() -> None:
    made = make_checkpoint.vocabulary(3000)
    assert made == make_checkpoint.vocabulary(3000)
    tokenizer = Tokenizer.from_str(json.dumps(made))
    assert tokenizer.get_vocab_size() == 3000
    text = "def f(x):\n    return x  # é 漢 😀"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_small_shape_compiles_and_is_priced(plan: Path) -> None:
    assert len(Checkpoint(plan.parent / "small").tensors) == 2 + 2 * 9
    model = costs.Model(plan)
    assert model.num_parameters == PARAMETERS
    # heads of 16 are padded to 32
    assert model.kv_bytes_per_token == 2 * 2 * 2 * 32 * 2
    norms = 5 * 64
    weights = (PARAMETERS - norms) * 2 + norms * 4
    row, cache = 64 * 4 + 4, 2 * 2 * 2 * 16 * 2  # of the embedding, with its id; of one token
    assert model.decode_seconds(100, 1, 1.0, 1e30) == weights + row + (100 + 1) * cache
    linear = 2 * (PARAMETERS - norms)
    flops = model.decode_seconds(100, 1, 1e30, 1.0)
    attention = 2 * 4 * 64 * 100
    assert linear + attention < flops < 1.05 * (linear + attention)
    # two full steps of 512 tokens, each prompt's rows of logits but one
    assert model.prefill_seconds(128, 8, 1e30, 1.0) < 8 * 128 * flops


def test_the_report(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BIN", plan.parent)
    said = {"prompt": 64, "decode": 16, "batch": 2, "target": "cpu-avx2", "threads": 2, "start_ms": 5.0}
    said |= {"prefill_tokens_per_s": 1000.0, "decode_tokens_per_s": 50.0, "first_token_ms": 9.0}
    said |= {"resident_bytes": 1 << 30}
    (plan.parent / "tsruntime").write_text(f"#!/bin/sh\necho '{json.dumps(said)}'\n")
    (plan.parent / "tsruntime").chmod(0o755)
    measured = bench.measure("small", plan, 2, ((64, 16, 2, 1),))
    machine = {"cpu": "a processor", "threads": 2, "read_bytes_per_s": 1e9, "avx2_f32_flops_per_s": 1e10}
    bench.fractions(measured, plan, [machine, machine])
    run = measured["runs"][0]
    shape = costs.Model(plan)
    assert run["decode_of_floor"] == pytest.approx(shape.decode_seconds(72, 2, 1e9, 1e10) * 50 / 2)
    assert run["prefill_of_floor"] == pytest.approx(shape.prefill_seconds(64, 2, 1e9, 1e10) * 1000 / 128)
    both = {"before": machine, "after": machine}
    text = bench.markdown({"date": "2026-01-02", "isa": "avx2", "machine": both, "models": [measured]})
    assert "- read bytes: 1.0 / 1.0 GB/s" in text
    assert "| 64 | 2 | 1000 | " in text
    assert "resident at most 1.00 GiB" in text
