"""expand: multi-head latent attention, captured as the paper writes it, runs on the cached latents with kv_b
absorbed. tests/models holds both forms to transformers."""

from __future__ import annotations

from pathlib import Path

import golden
import pytest
from test_capture import CONFIG, write

from tscompile import models
from tscompile.build import Build
from tscompile.errors import CompileError
from tscompile.ir import Op
from tscompile.passes import (
    canonicalize,
    capture,
    collectives,
    expand,
    fuse,
    localize,
    precision,
    propagate,
    reshard,
)
from tscompile.verify import verify

LATENT = {
    **CONFIG,
    "architectures": ["DeepseekV3ForCausalLM"],
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
}
DEEPSEEK = models.MODELS / "deepseek_v3.py"


def captured(folder: Path, config: dict[str, object] = LATENT) -> Build:
    build = write(folder, config, DEEPSEEK)
    capture.run(build)
    return build


def test_golden(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    build = captured(tmp_path)
    assert [op.kind for op in build.graph.ops].count("mla_attention") == 1
    expand.run(build)
    verify(build.graph)
    golden.check("expand", build.graph, request)
    (receipt,) = build.receipts
    assert (receipt.pattern, receipt.where, receipt.matched) == (
        "expand_mla_attention",
        "layers.0.self_attn.attention.out",
        True,
    )
    assert receipt.source.startswith("models/deepseek_v3.py:")


def test_other_graphs_stay_as_they_are(request: pytest.FixtureRequest) -> None:
    golden.check("capture", golden.after("capture", expand.run).graph, request)


def test_what_is_rounded_where(tmp_path: Path) -> None:
    """bf16: the query's head before each product, the row before it is cached, each head's sum of latents."""
    build = captured(tmp_path)
    expand.run(build)
    precision.run(build)
    verify(build.graph)
    makers = {id(v): op for op in build.graph.ops for v in op.outputs}

    def rounded(op: Op) -> list[str]:
        """The kinds of op whose outputs it reads rounded."""
        casts = [makers[id(v)] for v in op.inputs if id(v) in makers and makers[id(v)].kind == "cast"]
        return [makers[id(cast.inputs[0])].kind for cast in casts]

    attention = [op for op in build.graph.ops if "head" in op.kind or "latent" in op.kind]
    assert [(op.kind, rounded(op)) for op in attention] == [
        ("latent_write", ["concat"]),
        ("head_linear", ["split"]),
        ("latent_attention", ["concat"]),
        ("head_linear", ["latent_attention"]),
    ]


def test_golden_of_groups(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(propagate, "prices_of", lambda _: golden.prices(base_s=1e-3, bytes_per_s=1e9))
    build = captured(tmp_path)
    for step in (expand, precision, canonicalize, propagate, reshard, collectives, localize, fuse):
        step.run(build)
        verify(build.graph)
    golden.check("fuse-latent", build.graph, request)


def test_refuses_a_second_call_and_wrong_shapes(tmp_path: Path) -> None:
    source = DEEPSEEK.read_text()
    for before, after, message in (
        (
            "q_rope, kv_b = self.rotary(q_rope)",
            "q_rope, kv_b = latent",
            r"LatentAttention: q_rope is \[T, 16\], wanted \[T, 4, 4\]",
        ),
        ("self.kv_b_proj.weight\n", "self.kv_b_proj.weight * 2\n", "which is computed: wanted a parameter"),
    ):
        assert before in source
        file = tmp_path / "changed.py"
        file.write_text(source.replace(before, after))
        with pytest.raises(CompileError, match=message):
            capture.run(write(tmp_path, LATENT, file))
