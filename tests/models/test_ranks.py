"""Placed on N simulated ranks, a model gives on every rank what it gives on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import MOE, SPECS, Spec
from plans import prices as prices_with
from test_interpret import NUM_SLOTS, PAGE_SIZE, captured, saved

from tscompile import check
from tscompile.build import Build
from tscompile.errors import CompileError
from tscompile.interpret import Interpreter, Sequences
from tscompile.ir import Sym
from tscompile.ops import lookup
from tscompile.passes import propagate

WIDE = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 160}
CASES: dict[str, tuple[Spec, int]] = {
    **{
        f"{name} tp=2": (SPECS[name], 2)
        for name in ("llama-gqa-tied", "llama-biases", "mistral-window", "qwen3-tied")
    },
    "llama wide tp=4": (Spec("llama", {**WIDE, "vocab_size": 300}), 4),
    "qwen3 wide tp=8": (Spec("qwen3", {**WIDE, "head_dim": 32, "tie_word_embeddings": True}), 8),
    "qwen3, 2 KV heads, odd vocabulary, tp=8": (
        Spec(
            "qwen3",
            {"num_attention_heads": 8, "head_dim": 32, "vocab_size": 509, "attention_bias": True},
        ),
        8,
    ),
    "llama, 1 KV head, tied odd vocabulary, tp=4": (
        Spec(
            "llama",
            {
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "vocab_size": 509,
                "tie_word_embeddings": True,
            },
        ),
        4,
    ),
    "deepseek dense tp=2": (SPECS["deepseek-dense"], 2),
    "deepseek dense tp=4": (SPECS["deepseek-dense"], 4),
    "deepseek routed tp=2": (SPECS["deepseek-routed"], 2),
    "deepseek routed tp=4": (SPECS["deepseek-routed"], 4),
    "deepseek, 3 heads, tp=2": (SPECS["deepseek-no-q-rank-odd-sizes"], 2),
    "llama, sizes that do not divide, tp=4": (
        Spec("llama", {**WIDE, "vocab_size": 509, "intermediate_size": 90}),
        4,
    ),
    "qwen3-moe tp=2": (SPECS["qwen3-moe"], 2),
    "qwen3-moe, some layers dense, tp=4": (SPECS["qwen3-moe-some-layers-dense"], 4),
    "qwen3-moe, experts that do not divide, tp=4": (Spec("qwen3-moe", {**MOE, "num_experts": 6}), 4),
    "qwen3-moe, inner sizes that do not divide, tp=4": (
        Spec("qwen3-moe", {**MOE, "num_experts": 8, "moe_intermediate_size": 50}),
        4,
    ),
}

# What wires and latencies cost decides which collectives there are; every choice must be right.
PRICES = {
    "slow links": prices_with(1e-5, 5e9),
    "fast links, one token": prices_with(1e-8, 1e12, tokens=1),
    "fast links, tokens sharded": prices_with(1e-8, 1e12),
}


def rank_logits(build: Build, tokens: list[int], chunks: list[int]) -> torch.Tensor:
    """[ranks, chunks, vocab]."""
    interpreter = Interpreter(build.graph, build.checkpoint.read, NUM_SLOTS, build.mesh)
    sequences, rows, at = Sequences(PAGE_SIZE, NUM_SLOTS), [], 0
    for chunk in chunks:
        rows.append([rank[0][0] for rank in interpreter.run(sequences.batch({"a": tokens[at : at + chunk]}))])
        at += chunk
    return torch.stack([torch.stack(row) for row in rows], dim=1)


@pytest.mark.parametrize("prices", PRICES)
@pytest.mark.parametrize("case", CASES)
def test_every_rank_gives_what_one_gives(
    case: str, prices: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, ranks = CASES[case]
    saved(spec, tmp_path)
    tokens, chunks = torch.randint(300, (37,)).tolist(), [33, 1, 3]
    one = rank_logits(captured(tmp_path), tokens, chunks)
    monkeypatch.setattr(propagate, "prices_of", lambda _: PRICES[prices])
    placed = captured(tmp_path, tp=ranks)
    kinds = {op.kind for group in placed.graph.groups() for op in group.body}
    assert any(lookup(kind).across for kind in kinds)
    local = any(isinstance(d, Sym) and d.over for v in placed.graph.values() for d in v.shape)
    assert local == ("sharded" in prices)
    padded = rank_logits(placed, tokens, chunks)
    every = padded[..., : one.shape[-1]]
    assert every.shape[0] == ranks
    assert float((every - one).abs().max() / one.abs().max()) < 1e-5


def test_heads_that_cannot_be_shared_out(tmp_path: Path) -> None:
    saved(Spec("llama", {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4}), tmp_path)
    with pytest.raises(CompileError) as error:
        captured(tmp_path, tp=8)
    assert str(error.value) == (
        "models/llama.py:45: tp=8 does not divide the 4 KV heads of %layers.0.self_attn.attention.kv, nor "
        "can each lie on as many ranks as others do, with an equal part of the 12 query heads: tp can be 1, "
        "2, 4, 12"
    )


def test_what_is_repeated_and_padded_is_said(tmp_path: Path) -> None:
    saved(CASES["qwen3, 2 KV heads, odd vocabulary, tp=8"][0], tmp_path)
    build = captured(tmp_path, tp=8)
    assert [state.shape for state in build.graph.states] == [(1, 32)] * 2
    assert build.notes[:3] == [
        "tp=8: each of the 2 KV heads lies on 4 ranks, in 2 layers",
        "tp=8: @lm_head.weight padded with zeros from 509 to 512",
        "tp=8: @embed_tokens.weight padded with zeros from 509 to 512",
    ]


def test_what_stays_whole_is_said(tmp_path: Path) -> None:
    saved(CASES["llama, sizes that do not divide, tp=4"][0], tmp_path)
    assert any("every rank holds" in note for note in captured(tmp_path, tp=4).notes)


def test_verify_of_a_context_in_parts(tmp_path: Path) -> None:
    """The model on one rank has pages as large as all ranks' together."""
    saved(SPECS["qwen3-tied"], tmp_path)
    report, difference = check.verify_build(captured(tmp_path, tp=2, cp=2))
    assert (report["ranks"], report["verified"]) == (4, True)
    assert difference < 1e-5
