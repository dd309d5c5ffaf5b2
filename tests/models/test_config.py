"""config.json: both forms of transformers, rope scalings as transformers computes them, and errors that name
key and wish."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tscompile.config import Config
from tscompile.errors import CompileError
from tscompile.recipe import RopeTable
from tscompile.weights import rope_table

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "large theta": {"rope_type": "default", "rope_theta": 5e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn, all": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn, attention_factor": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.3,
    },
}


def config_of(rope: dict[str, Any], head_dim: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=int(4 * rope.get("original_max_position_embeddings", 1024)),
        rope_parameters=dict(rope),
    )


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_as_transformers(name: str, head_dim: int) -> None:
    rope, config = ROPES[name], config_of(ROPES[name], head_dim)
    init = ROPE_INIT_FUNCTIONS.get(rope["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
    expected, expected_scaling = init(config, device=torch.device("cpu"))
    found, scaling = Config(config.to_dict()).rope(head_dim)
    assert scaling == pytest.approx(expected_scaling, rel=1e-12)
    # torch's vectorised pow may be one unit in the last place off the rounded double
    assert torch.allclose(torch.tensor(found), expected, rtol=2.5e-7, atol=0)


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn"])
def test_version_4_says_the_same(name: str) -> None:
    rope = ROPES[name]
    outer = {"max_position_embeddings": 131072}
    new = Config({**outer, "rope_parameters": rope}).rope(64)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    old = Config({**outer, "rope_theta": rope["rope_theta"], "rope_scaling": scaling})
    assert old.rope(64) == new
    scaling["type"] = scaling.pop("rope_type")
    assert old.rope(64) == new


def test_no_scaling_at_all() -> None:
    assert Config({}).rope(64) == Config({"rope_scaling": None, "rope_theta": 10000}).rope(64)
    assert Config({"rope_theta": 5e5}).rope(64)[0][1] == pytest.approx(5e5 ** (-2 / 64), rel=1e-6)


def test_table_is_cos_and_sin_of_the_f32_angles() -> None:
    inv_freq, _ = Config({"rope_theta": 1e6}).rope(16)
    table = rope_table(RopeTable(5000, inv_freq, 1.5))
    assert table.shape == (5000, 16)
    angle = float(torch.tensor(4321.0) * torch.tensor(inv_freq[1]))
    f32 = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64).float() * 1.5
    assert torch.equal(table[4321, [1, 9]], f32)
    assert torch.equal(table[0], torch.tensor([1.5] * 8 + [0.0] * 8))


@pytest.mark.parametrize(
    ("data", "ask", "message"),
    [
        (
            {},
            lambda c: c.integer("hidden_size"),
            "config.json: hidden_size is missing, wanted an integer from 1 to 2147483647",
        ),
        ({"n": "12"}, lambda c: c.integer("n"), "config.json: n is '12', wanted an integer from 1"),
        ({"n": 0}, lambda c: c.integer("n"), "config.json: n is 0, wanted an integer from 1"),
        ({"n": 2**31}, lambda c: c.integer("n"), "config.json: n is 2147483648, wanted an integer from 1"),
        ({"n": True}, lambda c: c.integer("n"), "config.json: n is True, wanted an integer"),
        ({"n": 1.5}, lambda c: c.integer("n"), "config.json: n is 1.5, wanted an integer"),
        ({"e": 0}, lambda c: c.number("e"), "config.json: e is 0, wanted a positive number"),
        ({"e": "x"}, lambda c: c.number("e"), "config.json: e is 'x', wanted a positive number"),
        ({"e": float("inf")}, lambda c: c.number("e"), "config.json: e is inf, wanted a positive number"),
        ({"f": 1}, lambda c: c.flag("f"), "config.json: f is 1, wanted true or false"),
        (
            {"act": "gelu"},
            lambda c: c.choice("act", ("silu", "relu")),
            "config.json: act is 'gelu', wanted one of silu, relu",
        ),
        (
            {},
            lambda c: c.head_dim(100, 3),
            "config.json: hidden_size 100 is no multiple of num_attention_heads 3, and head_dim",
        ),
        (
            {"num_key_value_heads": 3},
            lambda c: c.kv_heads(4),
            "config.json: num_key_value_heads 3 does not divide num_attention_heads 4",
        ),
        (
            {"layer_types": ["full_attention"]},
            lambda c: c.layer_windows(2, 8, 0),
            "config.json: layer_types is ['full_attention'], wanted 2 of",
        ),
        (
            {"layer_types": ["sliding_attention"]},
            lambda c: c.layer_windows(1, 0, 0),
            "config.json: layer_types is ['sliding_attention'], wanted no",
        ),
        ({"rope_scaling": 5}, lambda c: c.rope(64), "config.json: rope_scaling is 5, wanted an object"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            lambda c: c.rope(64),
            "config.json: rope_scaling: rope_type 'dynamic' is not known; known are default, linear, llama3,",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            lambda c: c.rope(64),
            "config.json: rope_scaling: factor is None, wanted a positive number",
        ),
        (
            {"rope_parameters": {"full_attention": {}}},
            lambda c: c.rope(64),
            "config.json: rope_parameters differ by layer type",
        ),
        ({"rope_theta": 1e300}, lambda c: c.rope(64), "the rope's rope_theta 1e+300 is too large"),
        (
            {},
            lambda c: c.rope(63),
            "config.json: rope_parameters: rope over 63 elements of a head: wanted an even number",
        ),
        (
            {"max_position_embeddings": 8},
            lambda c: c.max_context,
            "--max-context 9 is more than config.json allows: max_position",
        ),
        (
            {"quantization_config": {"bits": 4}},
            None,
            "config.json has a quantization_config ({'bits': 4}): quantised checkpoints",
        ),
    ],
)
def test_errors(data: dict[str, Any], ask: Any, message: str) -> None:
    with pytest.raises(CompileError) as error:
        ask(Config(data, max_context=9))
    assert str(error.value).startswith(message)


def test_windows() -> None:
    assert Config({"sliding_window": None}).window(4096) == 0
    assert Config({}).window(4096) == 4096
    assert Config({"sliding_window": 7}).window(4096) == 7
    assert Config({}).layer_windows(3, 8, 1) == [0, 8, 8]
    types = ["sliding_attention", "full_attention"]
    assert Config({"layer_types": types}).layer_windows(2, 8, 0) == [8, 0]
