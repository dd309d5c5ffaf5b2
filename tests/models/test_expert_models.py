"""Mixture-of-experts checkpoints: how they may lie, how they are split over ranks, and what config.json may
not say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MOE, SPECS, Spec
from safetensors.torch import load_file, save_file
from test_interpret import captured, logits, saved

from tscompile.errors import CompileError
from tscompile.ir import Weight

LAYER = "model.layers.1.mlp.experts"


def rewrite(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> None:
    """Changes a checkpoint's tensors, and keys of its config.json (None: taken away)."""
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    changed = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def test_stacked_tensors_and_old_config(tmp_path: Path) -> None:
    """What transformers 4 calls num_experts, and experts as modules of transformers 5 hold them."""
    saved(SPECS["qwen3-moe"], tmp_path)
    tokens, chunks = torch.randint(500, (40,)).tolist(), [33, 1, 6]
    apart = logits(captured(tmp_path), tokens, chunks)
    tensors, count = load_file(tmp_path / "model.safetensors"), MOE["num_experts"]
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{path}.{e}.{name}_proj.weight") for e in range(count)])
            for name in ("gate", "up", "down")
        )
        tensors |= {f"{path}.gate_up_proj": torch.cat([gate, up], 1), f"{path}.down_proj": down}
    rewrite(tmp_path, tensors, num_experts=count, num_local_experts=None)
    assert torch.equal(logits(captured(tmp_path), tokens, chunks), apart)


def test_every_group_is_found(tmp_path: Path) -> None:
    saved(SPECS["qwen3-moe-some-layers-dense"], tmp_path)
    build = captured(tmp_path, dtype="bf16")
    found = Counter(group.group for group in build.graph.groups())
    assert found["route"] == found["sort_routes"] == 1
    assert found["experts"] == 2
    assert not found["elementwise"]
    assert [r.matched for r in build.receipts if r.pattern == "gate_up_swiglu"] == [True] * 5
    (up, down) = (group for group in build.graph.groups() if group.group == "experts")
    assert [op.kind for op in up.body] == ["dispatch", "expert_linear", "swiglu", "cast"]
    assert [op.kind for op in down.body] == ["expert_linear", "combine"]


@pytest.mark.parametrize(
    ("config", "ranks", "gate_up", "down"),
    [
        ({"num_experts": 6}, 4, [6, 32, 64], [6, 64, 12]),  # four ranks do not divide six experts
        ({"num_experts": 8, "moe_intermediate_size": 50}, 4, [2, 128, 64], [2, 64, 50]),
    ],
)
def test_what_ranks_hold(
    config: dict[str, int], ranks: int, gate_up: list[int], down: list[int], tmp_path: Path
) -> None:
    saved(Spec("qwen3-moe", {**MOE, **config}), tmp_path)
    graph = captured(tmp_path, tp=ranks).graph
    weights = [op.inputs[-1] for group in graph.groups() for op in group.body if op.kind == "expert_linear"]
    assert all(isinstance(weight, Weight) for weight in weights)
    assert [list(weight.shape) for weight in weights] == [gate_up, down] * 2


def broken(folder: Path, **config: Any) -> str:
    rewrite(folder, **config)
    with pytest.raises(CompileError) as error:
        captured(folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_experts_per_tok": 17}, "num_experts_per_tok is 17, wanted at most num_local_experts, 16"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0, wanted an integer from 1 to 2147483647"),
        ({"num_local_experts": None}, "num_experts is missing, wanted an integer from 1 to 2147483647"),
        ({"num_local_experts": "8"}, "num_local_experts is '8', wanted an integer from 1 to 2147483647"),
        ({"mlp_only_layers": [2]}, "mlp_only_layers is [2], wanted a list of layers from 0 to 1"),
        ({"mlp_only_layers": 1}, "mlp_only_layers is 1, wanted a list of layers from 0 to 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0, wanted an integer from 1 to 2147483647"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, wanted true or false"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size is -1, wanted an integer from 1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', wanted one of silu"),
    ],
)
def test_odd_configurations(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(SPECS["qwen3-moe"], tmp_path)
    assert f"config.json: {message}" in broken(tmp_path, **config)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    saved(SPECS["qwen3-moe"], tmp_path)
    assert "is [48, 64] in model.safetensors, but config.json makes it [40, 64]" in broken(
        tmp_path, moe_intermediate_size=40
    )
    assert "(num_local_experts=15)" in broken(tmp_path, moe_intermediate_size=48, num_local_experts=15)
    assert "lacks model.layers.0.mlp.gate_proj.weight [128, 64]" in broken(
        tmp_path, num_local_experts=16, mlp_only_layers=[0]
    )
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{LAYER}.3.up_proj.weight"]
    rewrite(tmp_path, tensors, mlp_only_layers=[])
    assert broken(tmp_path).startswith(f"the checkpoint lacks {LAYER}.3.up_proj.weight [48, 64]. Is models/")
