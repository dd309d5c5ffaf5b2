"""Every family on every mesh of up to 8 ranks: the program of N simulated ranks gives on each what the model
gives on one, for steps of any number of tokens and sequences."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from checkpoints import Spec
from plans import prices, rows_free
from test_interpret import PAGE_SIZE, captured, saved

from tscompile import pipeline
from tscompile.build import Build
from tscompile.errors import CompileError
from tscompile.interpret import Interpreter, Sequences
from tscompile.ir import Sym, stage_of
from tscompile.mesh import Mesh
from tscompile.passes import propagate
from tscompile.placement import Owned
from tscompile.recipe import axes_of

PLACING = pipeline.ALL.index("context")
BEFORE, AFTER = pipeline.BEFORE_SELECT[:PLACING], pipeline.BEFORE_SELECT[PLACING:]
MOE = {"num_experts_per_tok": 3, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 509},
    "mistral": {"sliding_window": 40, "head_dim": 16},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True},
    "qwen3-moe": {**MOE, "head_dim": 16, "num_experts": 12},
    "deepseek_v3": {
        **MOE,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "n_routed_experts": 12,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
}
CONTEXT_PAGE = 4  # tokens of a page that each of several cp ranks holds: every context crosses some
# Query heads and KV heads, those of which the ranks that share heads out are a multiple or a divisor
HEADS, HEADS_OF_THREE = (8, 2), (6, 3)
MOST_STAGES = 6  # that one layer, the embedding and the head can be cut into


def meshes(ranks: int, axes: Sequence[str] = ("pp", "dp", "ep", "tp", "cp")) -> list[dict[str, int]]:
    """Every product of the axes that has so many ranks."""
    if ranks == 1 or not axes:
        return [{}] if ranks == 1 else []
    divides = [n for n in range(1, ranks + 1) if ranks % n == 0]
    return [
        {**({axes[0]: n} if n > 1 else {}), **rest} for n in divides for rest in meshes(ranks // n, axes[1:])
    ]


def named(mesh: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in mesh.items())


MESHES = {named(mesh): mesh for ranks in range(2, 9) for mesh in meshes(ranks)}


def placed(build: Build, mesh: dict[str, int], page_size: int = PAGE_SIZE) -> Build:
    """What the passes from `context` on make of a captured graph, with pages of that size."""
    build = copy.copy(build)
    build.mesh = Mesh(tuple(mesh.items()))
    build.graph, build.receipts, build.notes = copy.deepcopy(build.graph), [], []
    build.graph.mesh = build.mesh
    for op in build.graph.ops:
        if "page_size" in op.attrs:
            op.attrs["page_size"] = page_size
    pipeline.run(build, AFTER)
    return build


@dataclass(frozen=True)
class Family:
    """A checkpoint's captured graph, and the program of one rank, by the size of a page."""

    captured: Build
    one: dict[int, Build] = field(default_factory=dict)

    def program(self, page_size: int) -> Build:
        if page_size not in self.one:
            self.one[page_size] = placed(self.captured, {"tp": 1}, page_size)
        return self.one[page_size]


Families = dict[tuple[str, tuple[int, int], int], Family]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """By name, heads and layers."""
    found = {}
    for family, config in FAMILIES.items():
        for (heads, kv_heads), layers in ((HEADS, 1), (HEADS_OF_THREE, 1), (HEADS, 2)):
            folder = tmp_path_factory.mktemp(f"{family}-{heads}-{layers}")
            shared = heads if "kv_lora_rank" in config else kv_heads
            sizes = {"num_attention_heads": heads, "num_key_value_heads": shared}
            sizes |= {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": layers}
            saved(Spec(family, {**sizes, **config}), folder)
            build = captured(folder, BEFORE)
            found[family, (heads, kv_heads), layers] = Family(build)
    return found


def random_steps(rng: random.Random) -> list[dict[str, list[int]]]:
    """Steps of some sequences, each of some tokens: numbers that no number of ranks divides for long."""
    return [
        {name: [rng.randrange(300) for _ in range(rng.choice([1, 1, 2, 7, 13]))] for name in names}
        for names in (rng.sample("abcdefghijk", rng.randint(1, 11)) for _ in range(3))
    ]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_every_mesh(
    family: str,
    mesh: str,
    families: Families,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens are sharded wherever that is cheaper. Prints the seed if it fails."""
    sizes = MESHES[mesh]
    seed = sum(map(ord, family + mesh))
    print(f"seed {seed}")
    monkeypatch.setattr(propagate, "prices_of", lambda _: prices(1e-8, 1e12))
    heads = HEADS_OF_THREE if sizes.get("tp", 1) % 3 == 0 else HEADS
    given = families[family, heads, 2 if sizes.get("pp", 1) > MOST_STAGES else 1]
    if sizes.get("tp") in (5, 7) and "kv_lora_rank" not in FAMILIES[family]:
        with pytest.raises(CompileError, match=r"does not divide the 2 KV heads .* tp can be 1, 2, 4, 8"):
            placed(given.captured, sizes)
        return
    program = placed(given.captured, sizes, CONTEXT_PAGE if "cp" in sizes else PAGE_SIZE)
    _is_right(program, given, seed)
    _is_shared_out(program, sizes)


@pytest.mark.parametrize("mesh", ["tp=2", "tp=4", "ep=4", "dp=2 tp=2", "pp=2 tp=2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_small_steps_placed_otherwise(
    family: str,
    mesh: str,
    families: Families,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums are reduced whole in small steps and scattered in large ones, over the same weights and caches:
    steps of either kind, in any order, give what one rank does."""
    seed = sum(map(ord, family + mesh))
    print(f"seed {seed}")
    slow, quick = (prices(base, 1e12) for base in (1e-4, 1e-8))
    monkeypatch.setattr(propagate, "prices_of", lambda at: slow if 1 <= at.tokens <= 16 else quick)
    given = families[family, HEADS, 1]
    program = placed(given.captured, MESHES[mesh])
    assert list(program.buckets) == [16, 512]
    small, large = (
        Counter(op.kind for group in graph.groups() for op in group.body)
        for graph in program.buckets.values()
    )
    assert large["reduce_scatter"] > small["reduce_scatter"]
    weights = [{w.name: w.recipe for w in graph.weights} for graph in program.buckets.values()]
    assert weights[0] == weights[1]
    _is_right(program, given, seed)


@pytest.mark.parametrize("mesh", ["ep=2", "ep=4", "dp=2", "dp=4", "dp=2 ep=2", "ep=2 tp=2", "dp=2 ep=2 tp=2"])
@pytest.mark.parametrize(
    "family", [family for family, config in FAMILIES.items() if MOE.items() <= config.items()]
)
def test_rows_of_experts_move(
    family: str,
    mesh: str,
    families: Families,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it is cheapest that tokens are sharded where they are routed: each route's row goes to the rank
    of its expert and back."""
    seed = sum(map(ord, family + mesh))
    print(f"seed {seed}")
    monkeypatch.setattr(propagate, "prices_of", lambda _: rows_free())
    given = families[family, HEADS, 1]
    program = placed(given.captured, MESHES[mesh])
    moved = Counter(op.kind for group in program.graph.groups() for op in group.body)
    assert moved["ragged_all_to_all"] == 2, moved
    _is_right(program, given, seed)


# Of the collectives of a layer or two, how many at least run beside something.
OVERLAPS = {
    **{("deepseek_v3", mesh): 8 for mesh in ("tp=2", "ep=2", "dp=2", "dp=2 tp=2", "pp=2 tp=2", "tp=2 cp=4")},
    ("qwen3-moe", "tp=2"): 1,
    ("qwen3-moe", "dp=2 ep=2"): 4,
    ("qwen3", "cp=2"): 2,
}


@pytest.mark.parametrize(("family", "mesh"), OVERLAPS)
def test_collectives_run_beside_what_they_do_not_need(
    family: str,
    mesh: str,
    families: dict[tuple[str, tuple[int, int]], Family],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each started and finished in two places, with kernels between; every rank gives what one does."""
    monkeypatch.setattr(propagate, "prices_of", lambda _: prices(1e-8, 1e12))
    given = families[family, HEADS, 1]
    program = placed(given.captured, MESHES[mesh], CONTEXT_PAGE if "cp" in mesh else PAGE_SIZE)
    kinds = [group.group for group in program.graph.groups()]
    starts = [index for index, kind in enumerate(kinds) if kind == "start"]
    assert len(starts) == kinds.count("finish") >= OVERLAPS[family, mesh]
    for index in starts:
        between = kinds[index + 1 : kinds.index("finish", index)]
        assert between
        assert not {"start", "collective", "all_reduce_rms_norm"} & set(between)
    _is_right(program, given, 7)


def _is_right(program: Build, given: Family, seed: int) -> None:
    """Every rank gives what one rank alone does."""
    sizes = dict(program.mesh.axes)
    owners, parts = sizes.get("dp", 1), sizes.get("cp", 1)
    page_size = CONTEXT_PAGE * parts if parts > 1 else PAGE_SIZE
    num_slots = page_size * owners * (1024 // page_size // owners)
    read = given.captured.checkpoint.read
    one = Interpreter(given.program(page_size).graph, read, num_slots)
    many = {
        most: Interpreter(graph, read, num_slots, program.mesh) for most, graph in program.buckets.items()
    }
    share_caches(list(many.values()))
    sequences, wrong = Sequences(page_size, num_slots, owners), 0.0
    for step in random_steps(random.Random(seed)):
        batch = sequences.batch(step)
        bucket = next(most for most in many if len(batch.token_ids) <= most)
        ((wanted,),), found = one.run(batch), many[bucket].run(batch)
        assert len(found) == math.prod(sizes.values())
        for rank, outputs in enumerate(found):
            assert len(outputs) == (program.mesh.coords(rank).get("pp", 0) == 0)  # of the first stage's ranks
            for logits in outputs:  # the vocabulary may be padded
                differs = (logits[:, : wanted.shape[1]] - wanted).abs().max() / wanted.abs().max()
                wrong = max(wrong, float(differs))
    assert wrong < 1e-5


def share_caches(interpreters: list[Interpreter]) -> None:
    """Of the buckets of one program: what one writes into a KV cache the others read."""
    first, *others = interpreters
    for other in others:
        for ours, theirs in zip(other.fixed, first.fixed, strict=True):
            for state, same in zip(other.graph.states, first.graph.states, strict=True):
                if id(same) in theirs:  # the rank's stage has it
                    ours[id(state)] = theirs[id(same)]


def _is_shared_out(program: Build, sizes: dict[str, int]) -> None:
    """The ranks do different things: over every axis whose ranks divide anything weights are cut or tokens
    sharded, caches lie with their sequences, and every stage computes something with weights of its own."""
    cut = {axis for weight in program.graph.weights for axis in axes_of(weight.recipe)}
    dims = {dim for value in program.graph.values() for dim in value.shape if isinstance(dim, Sym)}
    over = {axis for dim in dims for axis in dim.over}
    assert over or set(sizes) == {"pp"}
    assert {axis for axis, ranks in sizes.items() if axis != "pp" and ranks not in (5, 7)} <= cut | over
    stages = set(range(sizes.get("pp", 0)))
    assert {stage_of(value) for op in program.graph.ops for value in op.outputs} - {None} == stages
    assert {stage_of(weight) for weight in program.graph.weights} <= (stages or {None})
    for axis in {"dp", "cp"} & set(sizes):
        index = program.mesh.names.index(axis)
        assert {state.placement[index] for state in program.graph.states} == {Owned()}
