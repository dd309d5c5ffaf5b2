"""inspect and explain say what is in the plan."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from plan_graphs import build

from tscompile import assemble
from tscompile.build import Receipt
from tscompile.errors import CompileError
from tscompile.explain import explain, explain_text
from tscompile.inspect import inspect, inspect_text, size, to_json
from tscompile.passes import arrange, pack


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = build(tmp_path)
    made.receipts = [
        Receipt("qkv", "layers.0.q", "models/small.py:4", True),
        Receipt("qkv", "layers.1.q", "models/small.py:4", False, "k has another input than q"),
    ]
    pack.run(made)
    arrange.run(made)
    assemble.assemble(made)
    return made.options.out


def test_inspect(path: Path) -> None:
    report = json.loads(to_json(inspect(path)))
    assert report["model"]["architecture"] == "SmallForCausalLM"
    assert [target["target"] for target in report["targets"]] == ["cpu-avx2", "cpu-amx"]
    assert [step["step"] for step in report["weights"][2]["steps"]] == ["read", "cast", "merge", "layout"]
    assert {e["name"] for e in report["sections"]} >= {
        "tsp/graph",
        "tsp/program/cpu-amx",
        "tsp/kernels/cpu-avx2",
    }
    assert sum(e["bytes"] for e in report["weights"]) < report["bytes"] == path.stat().st_size
    text = inspect_text(report)
    for wanted in (
        "SmallForCausalLM",
        "qkv: matched 1 of 2",
        "not at layers.1.q (models/small.py:4): k has another input than q",
        "read q F32, k F16, v F32 > cast to BF16 > concat > layout tiles",
        "cpu-avx2: steps of up to 512 tokens and 64 sequences",
        "up to 512 tokens: 6 launches",
        "%qkv.out @table kv.0 %q",
    ):
        assert wanted in text, wanted


def test_inspect_checks_the_weights(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[8 + int.from_bytes(whole[:8], "little")] ^= 1  # the first weight's first byte
    path.write_bytes(whole)
    with pytest.raises(CompileError, match="'embed' is damaged"):
        inspect(path)


def test_explain(path: Path) -> None:
    report = json.loads(to_json(explain(path)))
    assert report["mesh"] == {"tp": 1}
    (part,) = report["steps"]
    assert (part["min_tokens"], part["max_tokens"]) == (1, 512)
    q = next(v for v in part["values"] if v["value"] == "q")
    assert q == {
        "value": "q",
        "made_by": "qkv_write",
        "dtype": "bf16",
        "shape": ["T", 2, 16],
        "state": False,
        "placement": {"tp": "R"},
        "count": 1,
    }
    text = explain_text(report)
    assert "state kv.0" in text
    assert "collectives: none" in text
    assert [w["share"] for w in report["weights"]] == ["whole"] * len(report["weights"])
    assert "bf16[T, 2, 16]" in text


def test_alike_layers_are_told_once(tmp_path: Path) -> None:
    made = build(tmp_path)
    for group in made.graph.groups():
        for value in group.outputs:
            value.name = {"x": "layers.0.x", "normed": "layers.1.x", "qkv.out": "layers.1.y"}.get(
                value.name, value.name
            )
    made.graph.ops[1].outputs[0].dtype = "f32"  # x and normed are of one type now, but of two kinds
    for target in made.targets.values():
        for bucket in target.buckets.values():
            bucket.symbols.update({group.name: "k" for group in made.graph.groups()})
    pack.run(made)
    arrange.run(made)
    assemble.assemble(made)
    values = [v["value"] for v in explain(made.options.out)["steps"][0]["values"]]
    assert values.count("layers.*.x") == 2
    assert values.count("layers.*.y") == 1


def test_inspecting_needs_no_torch(path: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
from tscompile.explain import *
from tscompile.inspect import *
path = Path({str(path)!r})
print(inspect_text(inspect(path)), explain_text(explain(path)))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "SmallForCausalLM" in ended.stdout


def test_sizes() -> None:
    assert [size(n) for n in (0, 1023, 1536, 3 << 30, 5 << 50)] == [
        "0 bytes",
        "1023 bytes",
        "1.5 KiB",
        "3.0 GiB",
        "5120.0 TiB",
    ]
