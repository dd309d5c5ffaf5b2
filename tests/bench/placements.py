"""What placing costs, and what is placed: a dated report into artifacts/bench. `make bench-placements` runs
it; it ends by printing the report as one line of JSON.

1. Time and memory of `propagate` for 1 to 100 layers of DeepSeek-V3's shape: about linear in the layers, with
   those that are alike solved once.
2. Collectives of one layer, and the bytes that a rank receives in them, for each family on each mesh, beside
   those of Megatron-LM's hand-written layers:

   tp, dense        2 all_reduce of [T, H] a layer, one behind attention, one behind the MLP (Shoeybi et al.,
                    2019, section 3)
   tp, sequence     each of these a reduce_scatter and, before the next block, an all_gather (Korthikanti et
   parallel         al., 2022, section 4.2.2)
   experts, by      dispatch gathers tokens over all ranks of tp x ep, combining scatters their sums: an
   all_gather       all_gather and a reduce_scatter of [T, H], and two all_gathers of the routing map, 1 byte
                    an expert, and the probabilities, 4 bytes
                    (megatron/core/transformer/moe/token_dispatcher.py, MoEAllGatherTokenDispatcher)
   experts, by      the rows of each token's k experts to these and back: two all_to_all of [T * k, H] over ep
   all_to_all       (there, MoEAlltoAllTokenDispatcher)

A rank of n receives (n - 1) / n of a value of S bytes that is gathered or scattered, twice that of one that
is reduced, and (n - 1) / n^2 of one that goes from all to all. Megatron's activations are bf16; our residual
stream, and every sum, is f32.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tscompile import models  # noqa: E402
from tscompile.build import Build, Options  # noqa: E402
from tscompile.ir import Graph, Op  # noqa: E402
from tscompile.mesh import Mesh  # noqa: E402
from tscompile.passes import canonicalize, expand, fit, precision, propagate, reshard  # noqa: E402
from tscompile.passes.capture import traced  # noqa: E402
from tscompile.placement import Shard, parse_placement  # noqa: E402
from tscompile.price import Prices, collective_of  # noqa: E402
from tscompile.search import Earlier, Search, settled  # noqa: E402

REPORTS = ROOT / "artifacts" / "bench"
TARGET, RANKS = "sm_90a", 8
TOKENS = (64, 8192)  # a step that decodes, and one that reads prompts
LAYERS = (1, 2, 4, 10, 25, 50, 100)
IDLE_LOAD = 0.3
DENSE = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
DENSE |= {"max_position_embeddings": 40960}
# Sizes as the published config.json files have them
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        **DENSE,
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    "Mistral-7B-v0.3": {
        **DENSE,
        "architectures": ["MistralForCausalLM"],
        "intermediate_size": 14336,
        "vocab_size": 32768,
    },
    "Qwen3-8B": {
        **DENSE,
        "architectures": ["Qwen3ForCausalLM"],
        "intermediate_size": 12288,
        "vocab_size": 151936,
    },
    "Qwen3-30B-A3B": {
        **DENSE,
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "vocab_size": 151936,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "vocab_size": 129280,
        "max_position_embeddings": 40960,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
    },
}
MESHES = ({"tp": 8}, {"dp": 8}, {"dp": 2, "tp": 4}, {"ep": 8}, {"ep": 4, "tp": 2})


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def captured(name: str, layers: int) -> Build:
    """The model as it is before `fit`, bf16, from a config.json alone."""
    config = {**SHAPES[name], "num_hidden_layers": layers, "tie_word_embeddings": False}
    if "first_k_dense_replace" in config:
        config["first_k_dense_replace"] = min(config["first_k_dense_replace"], layers - 1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        options = Options(models.find_for(Path(folder)), Path(folder), targets=(TARGET,), dtype="bf16")
        builder, *_ = traced(options, config, Mesh())
    build = Build(options, cast(Any, None), Mesh(), builder.graph)
    for step in (expand, precision, canonicalize):
        step.run(build)
    return build


def on_mesh(build: Build, mesh: dict[str, int]) -> Build:
    """A copy, ready to be placed."""
    copy = Build(build.options, cast(Any, None), Mesh(tuple(mesh.items())), build.graph.copy())
    copy.graph.mesh = copy.mesh
    fit.run(copy)
    return copy


# --- what placing costs ---


def propagation(layers: int) -> list[dict[str, Any]]:
    build, prices = captured("DeepSeek-V3", layers), Prices.of(TARGET, TOKENS[0])
    rows = []
    for mesh in ({"tp": 8}, {"dp": 8}, {"ep": 4, "tp": 2}):
        graph = on_mesh(build, mesh).graph
        axis, ranks = next(iter(mesh.items()))
        search = Search(graph, axis, ranks, prices)
        search.best()
        seconds = []
        for _ in range(3):
            fresh = on_mesh(build, mesh)
            start = time.process_time()
            propagate.place(fresh, prices)
            seconds.append(time.process_time() - start)
        fresh = on_mesh(build, mesh)
        tracemalloc.start()
        propagate.place(fresh, prices)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        row = {"layers": layers, "mesh": mesh, "ops": len(graph.ops), "cpu_s": round(min(seconds), 4)}
        rows.append({**row, "peak_bytes": peak, "segments_solved": search.solved})
    return rows


# --- what a layer's collectives are ---


def received(kind: str, num_bytes: float, ranks: int) -> float:
    """Bytes that a rank receives of a value of `num_bytes`."""
    part = (ranks - 1) / ranks * num_bytes
    in_parts = dict.fromkeys(("all_to_all", "ragged_all_to_all"), part / ranks)  # both sides have a part each
    return {"all_reduce": 2 * part, **in_parts}.get(kind, part)


def collectives(graph: Graph, prices: Prices) -> tuple[Counter[str], float]:
    """How many of each kind, and the bytes that a rank receives."""
    cut, counts, total = settled(graph, len(graph.mesh.axes)), Counter[str](), 0.0
    for op in graph.ops:
        if op.kind == "redistribute":
            kind, num_bytes, ranks = _moved(graph, op, cut, prices)
            if kind != "slice":
                counts[kind] += 1
                total += received(kind, num_bytes, ranks)
    return counts, total


def _moved(graph: Graph, op: Op, cut: Earlier, prices: Prices) -> tuple[str, float, int]:
    """(collective, bytes of the value that the ranks of its axis have together, ranks)."""
    source, target = (parse_placement(str(op.attrs[end])) for end in ("source", "target"))
    ranks = graph.mesh.size(str(op.attrs["axis"]))
    others = cut.parts(op.inputs[0]) // (ranks if isinstance(source, Shard) else 1)
    return collective_of(source, target), prices.bytes_of(op.inputs[0]) / others, ranks


def layer_of(name: str, builds: tuple[Build, Build], mesh: dict[str, int], tokens: int) -> dict[str, Any]:
    """One layer's collectives: what a model has more of with another layer."""
    prices, found = Prices.of(TARGET, tokens), []
    for build in builds:
        placed = on_mesh(build, mesh)
        propagate.place(placed, prices)
        reshard.run(placed)
        found.append(collectives(placed.graph, prices))
    (few, less), (many, more) = found
    return {
        "family": name,
        "mesh": mesh,
        "tokens": tokens,
        "collectives": dict(sorted((many - few).items())),
        "received_bytes": round(more - less),
        "megatron": megatron(SHAPES[name], mesh, tokens),
    }


def megatron(shape: dict[str, Any], mesh: dict[str, int], tokens: int) -> list[dict[str, Any]]:
    """Hand-written counts and bytes for as many ranks: tp as ours; attention is data parallel over our dp;
    experts lie over all ranks, as ours do over dp, ep and tp. Heads that we share out over ep are shared out
    over tp there."""
    data, ranks = mesh.get("dp", 1), math.prod(mesh.values())
    shared, own = ranks // data, tokens // data
    sequence = [("all_gather", 1), ("reduce_scatter", 1)] if shared > 1 else []
    x = own * shape["hidden_size"] * 2
    attention = [(kind, count, x, shared) for kind, count in sequence]
    experts = shape.get("num_experts") or shape.get("n_routed_experts")
    if not experts:
        sums = [("all_reduce", 2, x, shared)] if shared > 1 else []
        return [_total("all_reduce", sums), _total("sequence parallel", attention * 2)]
    rows = tokens * shape["hidden_size"] * 2
    routing = tokens * experts
    gathered = [("all_gather", 1, size, ranks) for size in (rows, routing, 4 * routing)]
    to_all = [("all_to_all", 2, rows * shape["num_experts_per_tok"], ranks)]
    return [
        _total("experts by all_gather", [*attention, *gathered, ("reduce_scatter", 1, rows, ranks)]),
        _total("experts by all_to_all", [*attention, *to_all]),
    ]


def _total(name: str, moves: list[tuple[str, int, int, int]]) -> dict[str, Any]:
    counts = Counter[str]()
    for kind, count, _, _ in moves:
        counts[kind] += count
    total = sum(count * received(kind, size, ranks) for kind, count, size, ranks in moves)
    return {"layer": name, "collectives": dict(sorted(counts.items())), "received_bytes": round(total)}


# --- the report ---


def markdown(report: dict[str, Any]) -> str:
    quiet = "idle" if report["idle"] else "NOT idle, so times say little"
    lines = [
        f"# {report['date']}, placements",
        "",
        f"{report['cpu']}; load {report['load'][0]:.1f} before, {report['load'][1]:.1f} after: {quiet}.",
        f"Prices of {TARGET}, {RANKS} ranks.",
        "",
        "## propagate, DeepSeek-V3's shape",
        "",
        "| mesh | layers | ops | CPU ms | ms a layer | peak MiB | segments solved |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["propagation"]:
        per_layer, peak = row["cpu_s"] * 1e3 / row["layers"], row["peak_bytes"] / 2**20
        lines.append(
            f"| {named(row['mesh'])} | {row['layers']} | {row['ops']:,} | {row['cpu_s'] * 1e3:,.0f} "
            f"| {per_layer:.1f} | {peak:.1f} | {row['segments_solved']} |"
        )
    lines += ["", "## One layer: collectives, and what a rank receives in them", ""]
    lines += ["| family | mesh | tokens | ours | MB | Megatron-LM | MB |", "|---|---|---|---|---|---|---|"]
    for row in report["layers"]:
        ours = f"{counted(row['collectives'])} | {row['received_bytes'] / 1e6:,.2f}"
        for i, theirs in enumerate(row["megatron"]):
            head = [row["family"], named(row["mesh"]), f"{row['tokens']:,}"] if not i else ["", "", ""]
            also = f"{theirs['layer']}: {counted(theirs['collectives'])}"
            mine = ours if not i else " | "
            lines.append(f"| {' | '.join(head)} | {mine} | {also} | {theirs['received_bytes'] / 1e6:,.2f} |")
    module = sys.modules[__name__].__doc__ or ""
    return "\n".join([*lines, "", "```", module[module.index("2. Collectives") + 3 :].rstrip(), "```"]) + "\n"


def named(mesh: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in mesh.items())


def counted(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="to try the bench itself")
    parser.add_argument("--out", type=Path, default=REPORTS, metavar="DIR", help="default: artifacts/bench")
    arguments = parser.parse_args()
    before, rows, costs = os.getloadavg()[0], [], []
    for layers in LAYERS[:3] if arguments.quick else LAYERS:
        say(f"propagate, {layers} layers")
        costs += propagation(layers)
    for name in list(SHAPES)[-2:] if arguments.quick else SHAPES:
        builds = captured(name, 6), captured(name, 7)
        for mesh in MESHES if "experts" in json.dumps(SHAPES[name]) else MESHES[:3]:
            say(f"{name} on {named(mesh)}")
            rows += [layer_of(name, builds, mesh, tokens) for tokens in TOKENS]
    load = (before, os.getloadavg()[0])
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    report = {
        "date": datetime.date.today().isoformat(),
        "cpu": names[0].partition(": ")[2] if names else platform.machine(),
        "load": load,
        "idle": before < IDLE_LOAD,
        "target": TARGET,
        "propagation": costs,
        "layers": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{report['date']}-placements"
    file.with_suffix(".md").write_text(markdown(report))
    file.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    say(f"wrote {file.with_suffix('.md')}")
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
