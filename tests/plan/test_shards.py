"""Plans of several ranks, of every test configuration: each shard's bytes put together again are the
checkpoint's, and the program names what is there. Kernels are left out: all ranks run those of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SPECS, reference
from safetensors.torch import load_file
from torch import Tensor

from tscompile import models, pipeline
from tscompile.assemble import assemble
from tscompile.build import Build, Options
from tscompile.checkpoint import Checkpoint as Folder
from tscompile.errors import CompileError
from tscompile.explain import explain, explain_text
from tscompile.inspect import inspect, inspect_text
from tscompile.layout import lay_back
from tscompile.mesh import Mesh
from tscompile.parser import parse
from tscompile.reader import Plan
from tscompile.recipe import (
    Arange,
    Checkpoint,
    Concat,
    Interleave,
    Pad,
    Recipe,
    Repeat,
    RopeTable,
    ShardOf,
    Slice,
    Stack,
    View,
)

PASSES = [name for name in pipeline.ALL if name not in ("emit", "text")]


def planned(folder: Path, out: Path, tp: int, **options: Any) -> Build:
    """The build, its plan written to `out`, kernels but for their library."""
    chosen = Options(models.find_for(folder), folder, out, ("cpu-avx2",), **{"dtype": "f32", **options})
    build = Build(dataclasses.replace(chosen, tp=tp), Folder(folder), Mesh((("tp", tp),)))
    pipeline.run(build, PASSES)
    for target in build.targets.values():
        target.library, target.compiler = b"\x7fELF", "none"
    assemble(build)
    return build


def leaves(recipe: Recipe, local: Tensor, shapes: dict[str, tuple[int, ...]], ranks: int) -> Iterator[Any]:
    """(recipe, what a rank has of it) of the checkpoint's tensors that were merged into `local`."""
    if isinstance(recipe, Concat):
        at = 0
        for part in recipe.parts:
            rows = shape_of(part, shapes, ranks)[recipe.dim]
            yield from leaves(part, local.narrow(recipe.dim, at, rows), shapes, ranks)
            at += rows
        assert at == local.shape[recipe.dim]
    elif isinstance(recipe, Interleave):
        dim = recipe.dim
        rest = local.movedim(dim, 0)
        tiles = rest.reshape(-1, len(recipe.parts), recipe.tile, *rest.shape[1:])
        for index, part in enumerate(recipe.parts):
            own = tiles[:, index].flatten(0, 1)
            rows = shape_of(part, shapes, ranks)[dim]
            assert not own[rows:].any()
            yield from leaves(part, own[:rows].movedim(0, dim), shapes, ranks)
    else:
        yield recipe, local


def shape_of(recipe: Recipe, shapes: dict[str, tuple[int, ...]], ranks: int) -> list[int]:
    """What a rank has of it."""
    if isinstance(recipe, Checkpoint):
        return list(shapes[recipe.name])
    if isinstance(recipe, Stack):
        return [len(recipe.parts), *shape_of(recipe.parts[0], shapes, ranks)]
    assert isinstance(recipe, (ShardOf, Repeat, Pad, Slice)), recipe
    shape = shape_of(recipe.part, shapes, ranks)
    match recipe:
        case ShardOf(_, dim):
            shape[dim] //= ranks
        case Repeat(_, dim, _, times):
            shape[dim] *= times
        case Pad(_, dim, size):
            shape[dim] = size
        case Slice(_, dim, start, stop):
            shape[dim] = stop - start
    return shape


def whole(recipe: Recipe, given: dict[str, Tensor]) -> Tensor:  # noqa: PLR0911 (one a kind)
    """What a leaf is before it is sharded."""
    match recipe:
        case Checkpoint(name):
            return given[name]
        case Arange(count):
            return torch.arange(count).float()
        case Stack(parts):
            return torch.stack([whole(part, given) for part in parts])
        case Slice(part, dim, start, stop):
            return whole(part, given).narrow(dim, start, stop - start)
        case View(part, shape, order):
            return whole(part, given).reshape(shape).permute(order)
        case Pad(part, 0, size):
            tensor = whole(part, given)
            return torch.cat([tensor, torch.zeros(size - len(tensor), *tensor.shape[1:])])
        case Repeat(part, 0, parts, times):
            tensor = whole(part, given)
            return tensor.unflatten(0, (parts, -1)).repeat_interleave(times, 0).flatten(0, 1)
    raise AssertionError(recipe)


def check_weights(plan: Plan, given: dict[str, Tensor], ranks: int) -> None:
    """Every weight of the plan's graph, from its entries."""
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    layouts = {item["weight"]: item["steps"][-1]["layout"] for item in plan.json("tsp/pack")}
    for weight in parse(bytes(plan.bytes("tsp/graph")).decode()).weights:
        names = (
            [weight.name] if weight.name in plan.entries else [f"{weight.name}@tp={r}" for r in range(ranks)]
        )
        found: dict[Recipe, list[Tensor]] = {}
        for name in names:
            shape = tuple(dim for dim in weight.shape if isinstance(dim, int))
            local = lay_back(layouts[weight.name], plan.tensor(name), shape)
            for leaf, part in leaves(weight.recipe, local, shapes, ranks):
                found.setdefault(leaf, []).append(part)
        for leaf, parts in found.items():
            if isinstance(leaf, ShardOf):
                assert len(parts) == ranks
                assert torch.equal(torch.cat(parts, leaf.dim), whole(leaf.part, given)), weight.name
            elif not isinstance(leaf, RopeTable):
                assert len(parts) == 1, f"{weight.name} is the same on all ranks"
                assert torch.equal(parts[0], whole(leaf, given))


def check_program(plan: Plan, ranks: int) -> None:
    """Every weight that a launch names is there for every rank; collectives move what their buffers hold."""
    program = plan.json("tsp/program/cpu-avx2")
    read = set()
    for bucket in program["buckets"]:
        for launch in bucket["launches"]:
            for argument in launch["args"]:
                if "weight" in argument:
                    over = range(ranks) if argument.get("axes") else [None]
                    for rank in over:
                        name = argument["weight"] + ("" if rank is None else f"@tp={rank}")
                        assert plan.manifest["entries"][name]["bytes"] == argument["bytes"]
                        read.add(name)
            if "collective" in launch:
                check_buffers(launch, program, bucket["max_tokens"], ranks)
        assert bucket["logits"]["stride"] >= program["limits"]["vocab_size"]
    assert [bucket["max_tokens"] for bucket in program["buckets"]][-1] == program["limits"]["max_tokens"]
    assert read == {name for name, entry in plan.manifest["entries"].items() if entry["kind"] == "weight"}


def check_buffers(launch: dict[str, Any], program: dict[str, Any], max_tokens: int, ranks: int) -> None:
    """They are apart, and as large as the largest step's values."""
    given, taken, *counts = (program["buffers"][argument["buffer"]] for argument in launch["args"])
    if counts:  # of rows of experts, as many as are routed there
        assert launch["collective"] == "ragged_all_to_all"
        return
    by_tokens, most_rows = launch.get("parts") == "tokens", {"T": max_tokens, "1": 1}
    rows = most_rows.get(launch["rows"], min(max_tokens, program["limits"]["max_seqs"]))
    part = 4 * rows * launch["times"] * launch["run"] * (-(-max_tokens // ranks) if by_tokens else 1)
    grows = {
        "all_reduce": (1, 1),
        "all_gather": (1, ranks),
        "slice": (ranks, 1),
        "reduce_scatter": (ranks, 1),
        "all_to_all": (ranks, ranks),
    }[launch["collective"]]
    assert (given["bytes"], taken["bytes"]) == (part * grows[0], part * grows[1])
    apart = given["offset"] + given["bytes"] <= taken["offset"]
    assert apart or taken["offset"] + taken["bytes"] <= given["offset"]


@pytest.mark.parametrize("name", SPECS)
def test_shards_are_the_checkpoints(name: str, tmp_path: Path) -> None:
    model = reference(SPECS[name])
    model.save_pretrained(tmp_path)
    given = load_file(tmp_path / "model.safetensors")
    for ranks in (2, 4):
        out = tmp_path / f"{ranks}.tsp"
        if name == "llama-mqa-odd-sizes":  # three heads
            with pytest.raises(CompileError, match=f"tp={ranks} does not divide"):
                planned(tmp_path, out, ranks)
            continue
        planned(tmp_path, out, ranks)
        plan = Plan(out)
        plan.verify_weights()
        assert plan.manifest["mesh"] == [["tp", ranks]]
        check_weights(plan, given, ranks)
        check_program(plan, ranks)


def test_a_sharded_plan_is_the_same_in_any_folder(tmp_path: Path) -> None:
    plans = []
    for folder in (tmp_path / "a", tmp_path / "some" / "where"):
        reference(SPECS["qwen3-tied"]).save_pretrained(folder)
        planned(folder, folder / "plan.tsp", 2, dtype="bf16")
        plans.append((folder / "plan.tsp").read_bytes())
    assert plans[0] == plans[1]
    assert str(tmp_path).encode() not in plans[0]


def test_inspect_shows_ranks_shards_and_collectives(tmp_path: Path) -> None:
    reference(SPECS["llama-mha"]).save_pretrained(tmp_path)
    planned(tmp_path, tmp_path / "plan.tsp", 4)
    report = inspect(tmp_path / "plan.tsp")
    assert report["mesh"] == {"tp": 4}
    shards = [w for w in report["weights"] if w["weight"] == "layers.0.self_attn.qkv.weight"]
    assert [w["coords"] for w in shards] == [{"tp": rank} for rank in range(4)]
    assert len({w["sha256"] for w in shards}) == 4
    small, large = (report["targets"][0]["buckets"][i]["launches"] for i in (0, -1))
    assert [launch["collective"] for launch in small if "collective" in launch] == ["all_reduce"] * 4
    assert {"reduce_scatter", "all_gather"} <= {launch.get("collective") for launch in large}
    text = inspect_text(report)
    for wanted in (
        "ranks     4: tp=4",
        "verified  no: it was built without --verify",
        "4 over tp",
        "all_reduce sum over tp, f32[T, 1 x 64]",
        "@layers.0.self_attn.qkv.weight@tp",
        "all_reduce_residual_rms_norm: matched 4 of 5",
    ):
        assert wanted in text, wanted
    assert sum("layers.0.self_attn.qkv.weight " in line for line in text.splitlines()) == 1


def test_explain_tells_what_moves_and_what_a_rank_holds(tmp_path: Path) -> None:
    reference(SPECS["llama-mha"]).save_pretrained(tmp_path)
    planned(tmp_path, tmp_path / "plan.tsp", 2)
    report = explain(tmp_path / "plan.tsp")
    part = report["steps"][0]  # of few tokens
    counts = {(c["collective"], c["value"]): c["count"] for c in part["collectives"]}
    assert counts["all_reduce", "layers.*.mlp.down_proj.out"] == 2, "one a layer"
    down = next(c for c in part["collectives"] if "down_proj" in c["value"])
    assert (down["axis"], down["ranks"]) == ("tp", 2)
    # a term of the sum is [tokens, hidden] of f32, whatever the ranks
    sums = [c for step in report["steps"] for c in step["collectives"] if "down_proj" in c["value"]]
    assert {c["collective"] for c in sums} == {"all_reduce", "reduce_scatter"}
    steps = [step for c in sums for step in c["buckets"]]
    assert {1, 8, 64, 512} <= {b["tokens"] for b in steps}
    assert all(b["bytes"] == b["tokens"] * 64 * 4 and b["us"] > 0 for b in steps)
    of_sums = [b["us"] for b in steps if b["tokens"] >= 64]
    assert of_sums == sorted(of_sums)
    why = {row["values"][0]: row for row in report["steps"][-1]["placements"]}
    every = [other for step in report["steps"] for row in step["placements"] for other in row["others"]]
    assert all(other["us_more"] is None or other["us_more"] >= 0 for other in every), (
        "what was chosen costs least"
    )
    (small,) = (row for row in part["placements"] if row["values"] == ["layers.*.mlp.down_proj.out"])
    assert small["others"] == [], "its weights lie as the largest step wants them"
    row = why["layers.*.mlp.down_proj.out"]
    assert (row["rule"], row["sharded"], row["placements"]) == (
        "a k, n k -> a n",
        "k",
        "S(1), S(1) -> P(sum)",
    )
    assert (row["count"], row["at"].partition(":")[0]) == (2, "models/llama.py")
    instead = {other["sharded"]: other["us_more"] for other in row["others"]}
    assert set(instead) == {"nothing", "n", "sums"}
    assert instead["sums"] is None, "its input is no sum, and none can be made of it"
    weights = {w["weight"]: w for w in report["weights"]}
    gate_up, norm = weights["layers.*.mlp.gate_up.weight"], weights["norm.weight"]
    assert (gate_up["share"], gate_up["bytes"]) == ("1/2", 2 * gate_up["bytes_a_rank"])
    assert (norm["share"], norm["bytes"]) == ("whole", norm["bytes_a_rank"])
    text = explain_text(report)
    assert "all_reduce in all_reduce_rms_norm" in text
    assert "k of a k, n k -> a n" in text
