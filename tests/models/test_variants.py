"""Models that a user might write, each with something that a fusion pattern does not expect: they compile all
the same, and give what the module itself gives, run eagerly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plans
import pytest
import torch
from engine import Engine, Request
from safetensors.torch import save_file
from test_interpret import BEFORE_FUSE, captured, logits
from torch import nn

from tscompile import models, pipeline
from tscompile.build import Build
from tscompile.config import Config
from tscompile.nn import PagedAttention, RotaryEmbedding

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn
from tscompile.nn import Config, PagedAttention, RotaryEmbedding

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, self.head_dim = config.integer("hidden_size"), config.integer("head_dim")
        heads, kv_heads = config.integer("num_attention_heads"), config.integer("num_key_value_heads")
        self.q = nn.Linear(hidden, heads * self.head_dim, bias=BIAS)
        self.k = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(heads * self.head_dim, hidden, bias=False)
        self.rotary = RotaryEmbedding(config, ROTARY)
        self.attention = PagedAttention(heads, kv_heads, self.head_dim)
        self.scale = nn.Parameter(torch.empty(hidden))
        self.norm = nn.RMSNorm(NORM, 1e-5)

    def heads(self, x):
        return x.view(*x.shape[:-1], -1, self.head_dim)

    def forward(self, x):
        ATTENTION

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = config.integer("hidden_size")
        self.gate_up = nn.Linear(hidden, 2 * 40, bias=True)
        self.up = nn.Linear(hidden, 40, bias=False)
        self.down = nn.Linear(40, hidden, bias=False)

    def forward(self, x):
        MLP

class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.integer("hidden_size"), 1e-5)
        self.norm2 = nn.RMSNorm(config.integer("hidden_size"), 1e-5)
        self.attention, self.mlp = Attention(config), MLP(config)

    def forward(self, x):
        LAYER

class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, vocab = config.integer("hidden_size"), config.integer("vocab_size")
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.integer("num_hidden_layers")))
        self.norm = nn.RMSNorm(hidden, 1e-5)
        self.head = nn.Linear(hidden, vocab, bias=True)

    def forward(self, token_ids):
        x = self.embed(token_ids)
        for layer in self.layers:
            x = layer(x)
        HEAD
"""
PLAIN = {
    "BIAS": "False",
    "ROTARY": "16",
    "NORM": "16",
    "ATTENTION": """q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        return self.o(self.attention(self.rotary(q), self.rotary(k), v).flatten(1))""",
    "MLP": "return self.down(F.relu(self.up(x)))",
    "LAYER": """x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm2(x))""",
    "HEAD": "return self.head(self.norm(x))",
}
# name -> what differs from PLAIN, and the patterns that must match and must not
VARIANTS: dict[str, tuple[dict[str, str], set[str], set[str]]] = {
    "plain": ({}, {"qkv", "residual_rms_norm", "gather_early"}, set()),
    "parallel attention and MLP, one norm": (
        {"LAYER": "h = self.norm(x)\n        return x + self.attention(h) + self.mlp(h)"},
        {"qkv", "residual_rms_norm"},
        set(),
    ),
    "no rope, tanh gelu without gate": (
        {
            "ATTENTION": PLAIN["ATTENTION"].replace("self.rotary", ""),
            "MLP": 'return self.down(F.gelu(self.up(x), approximate="tanh"))',
        },
        {"qkv"},
        set(),
    ),
    "rope over half of a head": ({"ROTARY": "8"}, {"qkv"}, set()),
    "bias on q alone": ({"BIAS": "True"}, set(), {"qkv"}),
    "norm over the whole row of q": (
        {"NORM": "64", "ATTENTION": PLAIN["ATTENTION"].replace("self.q(x)", "self.norm(self.q(x))")},
        set(),
        {"qkv"},
    ),
    "norm after rope": (
        {"ATTENTION": PLAIN["ATTENTION"].replace("self.rotary(q)", "self.norm(self.rotary(q))")},
        set(),
        {"qkv"},
    ),
    "one weight for k and v": (
        {"ATTENTION": PLAIN["ATTENTION"].replace("self.v(x)", "self.k(x)")},
        {"qkv"},
        set(),
    ),
    "k is v": (
        {
            "ATTENTION": """q, k = self.heads(self.q(x)), self.heads(self.k(x))
        return self.o(self.attention(q, k, k).flatten(1))"""
        },
        set(),
        {"qkv"},
    ),
    "gate and up merged in the checkpoint": (
        {"MLP": "gate, up = self.gate_up(x).chunk(2, -1)\n        return self.down(up * F.silu(gate))"},
        {"qkv", "gate_up_swiglu", "split_weights"},
        set(),
    ),
    "gate and up of a scaled input": (
        {
            "MLP": """gate, up = (self.gate_up(x) * 0.5).split(40, dim=-1)
        return self.down(up * F.silu(gate))"""
        },
        {"qkv"},
        {"gate_up_swiglu", "split_weights"},
    ),
    "a slice, a cat and scalars": (
        {
            "MLP": """y = self.gate_up(x)
        y = torch.cat([y[..., 40:], y[..., :40] - 1], -1)
        return self.down(y[:, 20:60] / 4 * torch.sigmoid(-self.up(x)))"""
        },
        {"qkv"},
        set(),
    ),
    "weights in arithmetic": (
        {"LAYER": "return x * (1 + self.attention.scale) + self.attention(self.norm(x)) + 2 * self.mlp(x)"},
        {"qkv"},
        set(),
    ),
    "norms after the blocks": (
        {"LAYER": "x = x + self.norm(self.attention(x))\n        return x + self.norm2(self.mlp(x))"},
        {"qkv"},
        set(),
    ),
    "logits scaled": ({"HEAD": "return self.head(self.norm(x)) * 0.3"}, {"gather_early"}, set()),
    "residual read by both": (
        {"LAYER": "x = x + self.attention(self.norm(x))\n        return x + self.mlp(self.norm2(x)) + x"},
        {"residual_rms_norm"},
        set(),
    ),
}
CONFIG = {
    "architectures": ["Mine"],
    "vocab_size": 61,
    "hidden_size": 48,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}


def write(changes: dict[str, str], folder: Path) -> tuple[Path, nn.Module]:
    """A model file and a checkpoint for it, in `folder`; and the module with the same weights."""
    source = HEAD
    for key, text in {**PLAIN, **changes}.items():
        source = source.replace(f"        {key}\n", f"        {text}\n").replace(f"={key})", f"={text})")
        source = source.replace(f", {key})", f", {text})").replace(f"({key},", f"({text},")
    path = folder / "mine.py"
    path.write_text(source)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    module = models.load(path).model(Config(CONFIG))
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    save_file({name: p.detach() for name, p in module.named_parameters()}, folder / "model.safetensors")
    return path, module


def rotate(self: RotaryEmbedding, x: torch.Tensor) -> torch.Tensor:
    """RotaryEmbedding for one sequence from position 0, by complex numbers."""
    half = len(self.inv_freq)
    angles = torch.outer(torch.arange(x.shape[0]).float(), torch.tensor(self.inv_freq))[:, None]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones(()), angles)
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], -1)


def attend(self: PagedAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PagedAttention for one whole sequence."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
    )
    return out.transpose(0, 1)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RotaryEmbedding, "forward", rotate)
    monkeypatch.setattr(PagedAttention, "forward", attend)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_to_what_the_module_gives(name: str, tmp_path: Path) -> None:
    changes, must_match, must_not = VARIANTS[name]
    path, module = write(changes, tmp_path)
    tokens = torch.randint(61, (40,)).tolist()
    chunks = [30, 1, 9]
    with torch.no_grad():
        expected = module(torch.tensor(tokens))[torch.tensor(chunks).cumsum(0) - 1]
    for passes in (BEFORE_FUSE, pipeline.BEFORE_SELECT):
        build = captured(tmp_path, passes, model=path)
        found = logits(build, tokens, chunks)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4, passes[-1]
    matched = {r.pattern for r in build.receipts if r.matched}
    refused = {r.pattern for r in build.receipts if not r.matched}
    assert must_match <= matched
    assert must_not <= refused
    assert not must_not & matched
    assert all(r.reason for r in build.receipts if not r.matched)
    bf16 = logits(captured(tmp_path, model=path, dtype="bf16"), tokens, chunks)
    assert float((bf16 - expected).abs().max() / expected.abs().max()) < 5e-2


def kinds(build: Build) -> list[str]:
    return [group.group for group in build.graph.groups()]


def test_groups_of_the_parallel_variant(tmp_path: Path) -> None:
    """One norm for both branches, so two adds at the end of a layer: the last joins the next norm, the other
    stands alone."""
    path, _ = write(VARIANTS["parallel attention and MLP, one norm"][0], tmp_path)
    layer = [
        "linear",
        "qkv_write",
        "attention",
        "linear",
        "elementwise",
        "linear",
        "elementwise",
        "linear",
        "rms_norm",
    ]
    found: Any = kinds(captured(tmp_path, model=path))
    assert sorted(found) == sorted(["embed", "rms_norm", *layer, *layer, "linear"])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", VARIANTS)
def test_the_engine_gives_what_the_module_gives(name: str, tmp_path: Path) -> None:
    """The plan of each variant, run by the real kernels: log probabilities after prompts of some lengths."""
    path, module = write(VARIANTS[name][0], tmp_path)
    plan = plans.build(tmp_path, tmp_path / "plan.tsp", "f32", model=path)
    prompts = [torch.randint(61, (length,)).tolist() for length in (1, 33, 90)]
    asked = [Request(prompt, max_tokens=4, ignore_eos=True, num_logprobs=61) for prompt in prompts]
    with Engine(plan) as engine:
        answers = engine.generate(asked)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = module(torch.tensor(prompt + answer.tokens[:-1]))[len(prompt) - 1 :]
        expected = torch.log_softmax(logits.double(), -1)
        found = torch.zeros_like(expected)
        for row, (tokens, values) in enumerate(answer.top):
            found[row, tokens] = torch.tensor(values, dtype=torch.float64)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
