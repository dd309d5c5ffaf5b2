"""`tscompile plan`: meshes ranked from a config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BASE, MOE

from tscompile import cli, meshes, models
from tscompile.build import Build, Options
from tscompile.layers import Folded, Layers
from tscompile.mesh import Mesh
from tscompile.passes import canonicalize, context, expand, fit, precision, propagate
from tscompile.passes.capture import traced
from tscompile.price import Prices
from tscompile.search import settled

LARGE = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}


def config(folder: Path, **values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(LARGE | values))
    return folder


def test_every_product_of_axes() -> None:
    found = [str(mesh) for mesh in meshes.meshes(4, experts=False)]
    both = ["mesh(tp=4)", "mesh(tp=2, cp=2)", "mesh(cp=4)"]
    of_stages = ["mesh(pp=2, tp=2)", "mesh(pp=2, cp=2)", "mesh(pp=2, dp=2)", "mesh(pp=4)"]
    assert found == [*both, "mesh(dp=2, tp=2)", "mesh(dp=2, cp=2)", "mesh(dp=4)", *of_stages]
    assert len(meshes.meshes(8, experts=True)) == 35


def test_memory_and_order(tmp_path: Path) -> None:
    load = meshes.Load(context=4096, sequences=32)
    report = meshes.rank_meshes(config(tmp_path), 4, "sm_100a", load)
    rows = {" ".join(f"{a}={n}" for a, n in row["mesh"].items()): row for row in report["meshes"]}
    times = [row["decode_s"] for row in report["meshes"]]
    assert times == sorted(times)
    assert all(0 <= row["decode_collectives_s"] < row["decode_s"] < row["prefill_s"] for row in rows.values())
    # 2 caches x 4 layers x 8 heads x 128 x 2 bytes a token; a quarter on each of 4 ranks, however shared out
    kv = 2 * 4 * 8 * 128 * 2 * 4096 * 32
    assert {row["kv_bytes"] for row in rows.values() if not row["stages"]} == {kv // 4}
    # the layers' matrices, a quarter each; table and head between a quarter and whole
    layers = 2 * 4 * (8192 * 128 * (64 + 8 + 8 + 64) + 3 * 8192 * 28672)
    tables = 2 * 2 * 151936 * 8192
    held = rows["tp=4"]["weights_bytes"]
    assert layers // 4 + tables // 4 <= held <= layers // 4 + tables + 2**25
    assert rows["dp=4"]["weights_bytes"] >= held


def test_stages(tmp_path: Path) -> None:
    """A step is the sum of its stages; each has a layer or more, and not the others' weights."""
    report = meshes.rank_meshes(config(tmp_path), 4, "sm_100a", meshes.Load(context=4096, sequences=32))
    (row,) = (row for row in report["meshes"] if row["mesh"] == {"pp": 4})
    assert sum(stage["decode_s"] for stage in row["stages"]) == pytest.approx(row["decode_s"])
    assert sum(stage["layers"] for stage in row["stages"]) == 4
    whole = 2 * 4 * (8192 * 128 * (64 + 8 + 8 + 64) + 3 * 8192 * 28672) + 2 * 2 * 151936 * 8192
    held = [stage["weights_bytes"] for stage in row["stages"]]
    assert whole <= sum(held) < whole + 4 * 2**25  # each has the table of RoPE
    fullest = max(row["stages"], key=lambda stage: stage["weights_bytes"] + stage["kv_bytes"])
    assert {key: row[key] for key in ("weights_bytes", "kv_bytes")} == {
        key: fullest[key] for key in ("weights_bytes", "kv_bytes")
    }
    assert row["decode_collectives"] == 4  # three sends between stages, and the logits'
    assert "pp: memory of the fullest stage" in meshes.text(report)


def test_what_does_not_fit_is_last_and_says_why(tmp_path: Path) -> None:
    load = meshes.Load(context=40960, sequences=2000)
    report = meshes.rank_meshes(config(tmp_path), 2, "sm_90a", load)
    assert all("a rank lacks" in row["why_not"] for row in report["meshes"])


def test_heads_that_a_mesh_does_not_divide(tmp_path: Path) -> None:
    """Sequences, contexts and layers are shared out by any number."""
    small = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 4096}
    report = meshes.rank_meshes(config(tmp_path, **small), 3, "cpu-avx2", meshes.Load())
    *shared, heads = report["meshes"]
    assert [row["why_not"] for row in shared] == [""] * 3
    assert {axis for row in shared for axis in row["mesh"]} == {"dp", "cp", "pp"}
    assert heads["mesh"] == {"tp": 3}
    assert "tp can be 1, 2, 4, 8, 16, 32, 64" in heads["why_not"]


def test_experts_get_an_axis(tmp_path: Path) -> None:
    values = {**BASE, **MOE, "architectures": ["Qwen3MoeForCausalLM"], "num_attention_heads": 8}
    report = meshes.rank_meshes(config(tmp_path, **values), 2, "sm_90a", meshes.Load(256, 8))
    assert {"ep": 2} in [row["mesh"] for row in report["meshes"]]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(config(tmp_path)), "--gpus", "2", "--target", "sm_90a"]
    assert cli.main(arguments) == 0
    assert "tp=2" in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["topology"] == "h200"
    assert cli.main([*arguments[:-1], "sm_70"]) == 2
    assert "known are cpu-amx" in capsys.readouterr().err


def test_few_layers_stand_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report is that of every layer placed: over each axis, over two, and in stages."""
    values = {**BASE, **MOE, "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 14}
    values |= {"num_attention_heads": 8, "mlp_only_layers": [1]}
    asked = ({"tp": 4}, {"dp": 2, "ep": 2}, {"dp": 2, "cp": 2}, {"pp": 2, "tp": 2})
    monkeypatch.setattr(meshes, "meshes", lambda *_: [Mesh(tuple(mesh.items())) for mesh in asked])
    folder, load = config(tmp_path, **values), meshes.Load(4096, 16)
    few = meshes.rank_meshes(folder, 4, "sm_90a", load)

    def whole(layers: Layers, firsts: list[int], _: int) -> Folded:
        assert len(fold(layers, firsts).graph.ops) < 0.8 * len(layers.graph.ops)
        return fold(layers, firsts, len(layers.graph.ops))

    fold = Layers.fold
    monkeypatch.setattr(meshes.Layers, "fold", whole)
    for found, wanted in zip(
        few["meshes"], meshes.rank_meshes(folder, 4, "sm_90a", load)["meshes"], strict=True
    ):
        assert found["stages"] == [pytest.approx(stage) for stage in wanted["stages"]]
        assert found["notes"] == wanted["notes"]
        figures = {key: value for key, value in wanted.items() if key not in ("stages", "notes", "mesh")}
        assert {key: found[key] for key in figures} == pytest.approx(figures)
        assert found["mesh"] == wanted["mesh"]


@pytest.mark.parametrize("axis", ["tp", "dp", "cp"])
def test_a_step_takes_what_the_build_would_price(axis: str, tmp_path: Path) -> None:
    """What the search of a whole build adds up is the predicted step, and the price of holding weights."""
    load = meshes.Load(context=4096, sequences=32)
    folder = config(tmp_path, num_hidden_layers=8)
    report = meshes.rank_meshes(folder, 2, "sm_100a", load)
    (row,) = (row for row in report["meshes"] if row["mesh"] == {axis: 2})
    options = Options(models.find_for(folder), folder, targets=("sm_100a",), dtype="bf16")
    mesh = Mesh(((axis, 2),))
    builder, *_ = traced(options, json.loads((folder / "config.json").read_text()), mesh)
    build = Build(options, None, mesh, builder.graph)  # type: ignore[arg-type]
    for step in (expand, precision, canonicalize, context, fit):
        step.run(build)
    prices = Prices.of("sm_100a", load.sequences, load.sequences, load.context)
    (search,) = propagate.place(build, prices)
    cut = settled(build.graph, 1)
    held = sum(prices.resident(weight, cut.parts(weight)) for weight in build.graph.weights)
    assert row["decode_s"] == pytest.approx(search.cost - held)
