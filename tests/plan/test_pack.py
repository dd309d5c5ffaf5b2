"""pack: weights arrive in the plan as the recipes say, and the steps are recorded."""

from pathlib import Path

import torch
from plan_graphs import build, tensors

from tscompile.layout import lay_back
from tscompile.mesh import Mesh
from tscompile.passes import pack
from tscompile.recipe import Checkpoint, Interleave, ShardOf


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def test_weights_are_cast_merged_and_laid_out(tmp_path: Path) -> None:
    made = build(tmp_path)
    pack.run(made)
    given = tensors()
    qkv = torch.cat([given[name].float().bfloat16() for name in "qkv"])
    gate, up = (torch.cat([given[n], torch.zeros(8, 32)]).bfloat16().view(3, 16, 32) for n in ("gate", "up"))
    gate_up = torch.stack([gate, up], dim=1).view(96, 32)
    wanted = {"embed": given["embed"], "norm": given["norm"].float(), "qkv": qkv, "gate_up": gate_up}
    for name, tensor in wanted.items():
        packed = made.weights.weights[name]
        stored = packed.make()
        assert tuple(stored.shape) == packed.stored_shape
        back = lay_back(packed.layout, stored, tuple(tensor.shape))
        assert torch.equal(bits(back), bits(tensor)), name
    data = b"".join(bytes(piece) for piece in made.weights.weights["qkv"].entries()[0].data())
    assert len(data) == made.weights.weights["qkv"].num_bytes == 96 * 32 * 2


def test_casts_round_to_nearest_even() -> None:
    halfway = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 65504.0])
    assert halfway.bfloat16().float().tolist() == [1.0, 1 + 2 * 2**-7, 1 + 2**-7, 65536.0]
    assert halfway[3:].half().bfloat16().float().tolist() == [65536.0]


def test_every_step_is_recorded(tmp_path: Path) -> None:
    made = build(tmp_path)
    pack.run(made)
    steps = {item["weight"]: item["steps"] for item in made.weights.report()}
    assert list(steps) == ["embed", "norm", "qkv", "table", "gate_up"]
    assert [step["step"] for step in steps["embed"]] == ["read", "layout"]
    assert [step["step"] for step in steps["norm"]] == ["read", "cast", "layout"]
    assert [step["step"] for step in steps["table"]] == ["compute", "layout"]
    assert steps["qkv"] == [
        {
            "step": "read",
            "tensors": [
                {"name": "q", "dtype": "F32", "shape": (32, 32)},
                {"name": "k", "dtype": "F16", "shape": (32, 32)},
                {"name": "v", "dtype": "F32", "shape": (32, 32)},
            ],
        },
        {"step": "cast", "to": "BF16", "rounding": "nearest even"},
        {
            "step": "merge",
            "recipe": 'concat(checkpoint("q"), checkpoint("k"), checkpoint("v"); dim=0)',
            "shape": (96, 32),
        },
        {"step": "layout", "layout": "tiles", "shape": (6, 1, 16, 16, 2)},
    ]


def test_targets_share_what_they_can(tmp_path: Path) -> None:
    made = build(tmp_path)
    made.targets["cpu-amx"].layouts = {**made.targets["cpu-amx"].layouts, "embed": "tiles"}
    pack.run(made)
    assert [name for name in made.weights.weights if "embed" in name] == ["embed:rows", "embed:tiles"]
    assert len(made.weights.weights) == 6
    embed = next(weight for weight in made.graph.weights if weight.name == "embed")
    assert made.weights.find("cpu-amx", embed).name == "embed:tiles"
    assert made.weights.find("cpu-avx2", embed).name == "embed:rows"


def test_a_sharded_weight_is_an_entry_a_coordinate(tmp_path: Path) -> None:
    made = build(tmp_path)
    made.mesh = Mesh((("dp", 2), ("ep", 2), ("tp", 4)))
    by_name = {weight.name: weight for weight in made.graph.weights}
    by_name["qkv"].recipe, by_name["qkv"].shape = ShardOf(Checkpoint("q"), 0, "tp"), (8, 32)
    whole = Interleave((ShardOf(Checkpoint("gate"), 0, "ep"), ShardOf(Checkpoint("up"), 0, "ep")))
    by_name["gate_up"].recipe = ShardOf(whole, 1, "tp")
    by_name["gate_up"].shape = (64, 8)
    pack.run(made)
    names = [entry.name for entry in made.weights.entries()]
    qkv = [f"qkv@tp={i}" for i in range(4)]
    gate_up = [f"gate_up@ep={i},tp={j}" for i in range(2) for j in range(4)]
    assert names == ["embed", "norm", *qkv, "table", *gate_up]  # whole ones once
    packed = made.weights.find("cpu-amx", by_name["gate_up"])
    assert packed.argument() == {"weight": "gate_up", "bytes": 64 * 32 * 2, "axes": ["ep", "tp"]}
    assert made.weights.find("cpu-amx", by_name["embed"]).argument() == {"weight": "embed", "bytes": 50 * 64}
    given = tensors()
    for coords in packed.shards:
        back = lay_back("tiles", packed.make(coords), (64, 8)).view(2, 2, 16, 8)
        for which, part in enumerate((given["gate"], given["up"])):
            rows = part[20 * coords["ep"] :][:20, 8 * coords["tp"] :][:, :8].bfloat16()
            padded = torch.cat([rows, torch.zeros(12, 8, dtype=torch.bfloat16)])
            assert torch.equal(back[:, which].reshape(32, 8), padded), coords
    report = {item["weight"]: item for item in made.weights.report()}
    assert report["gate_up"]["axes"] == ["ep", "tp"]
    assert report["norm"]["axes"] == []
    assert report["qkv"]["steps"][2]["recipe"] == 'shard(checkpoint("q"); dim=0, axis="tp")'
