"""capture: a model file and a checkpoint -> ops as the author wrote them, with source lines, boundaries and
recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from safetensors.torch import save_file

from tscompile import models
from tscompile.build import Build, Options
from tscompile.capture import Builder, capture
from tscompile.checkpoint import Checkpoint
from tscompile.config import Config
from tscompile.errors import CompileError
from tscompile.mesh import Mesh
from tscompile.passes import capture as capture_pass

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "eos_token_id": [3, 5],
    "bos_token_id": None,
}
QWEN3 = models.MODELS / "qwen3.py"


def write(folder: Path, config: dict[str, Any] = CONFIG, model: Path = QWEN3, **changes: Any) -> Build:
    """A checkpoint for `config`, with tensors changed by name (None: left out), and a build that has opened
    it."""
    file = models.load(model)
    module = file.make(Config(config))
    tensors = {file.checkpoint_name(name): torch.zeros(p.shape) for name, p in module.named_parameters()}
    tensors.update({name: tensor for name, tensor in changes.items() if tensor is not None})
    save_file(
        {name: tensors[name] for name in tensors if changes.get(name, 0) is not None},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config))
    return Build(Options(model, folder, tp=2), Checkpoint(folder), Mesh((("tp", 2),)))


def test_golden(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    build = write(tmp_path)
    capture_pass.run(build)
    golden.check("capture", build.graph, request)
    assert build.model is not None
    assert (build.model.name, build.model.architecture) == ("qwen3", "Qwen3ForCausalLM")
    assert (build.model.vocab_size, build.model.max_context) == (48, 64)
    assert (build.model.eos_token_ids, build.model.bos_token_id) == ((3, 5), None)


def test_max_context_bounds_the_rope_table(tmp_path: Path) -> None:
    build = write(tmp_path)
    build.options = Options(QWEN3, tmp_path, max_context=16)
    capture_pass.run(build)
    assert next(w for w in build.graph.weights if w.name == "rope_table").shape == (16, 8)
    assert build.model is not None
    assert build.model.max_context == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.norm.weight": None},
            "the checkpoint lacks model.norm.weight [32]. Is models/qwen3.py the right model file?",
        ),
        (
            {"model.extra": torch.zeros(2, 3)},
            "the checkpoint has model.extra F32[2, 3], which the model does not use. "
            "Is models/qwen3.py the right model file?",
        ),
        (
            {"model.layers.0.mlp.up_proj.weight": torch.zeros(56, 32)},
            "model.layers.0.mlp.up_proj.weight is [56, 32] in model.safetensors, but config.json makes it "
            "[40, 32] (intermediate_size=40)",
        ),
        (
            {"model.layers.0.mlp.up_proj.weight": torch.zeros(40, 32, dtype=torch.int8)},
            "model.layers.0.mlp.up_proj.weight I8[40, 32] in model.safetensors: weights of F32, F16, BF16, "
            "F64 can be read",
        ),
    ],
)
def test_checkpoint_and_model_disagree(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CompileError) as error:
        capture_pass.run(write(tmp_path, **changes))
    assert str(error.value) == message


def test_a_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    build = write(tmp_path, **{"lm_head.weight": torch.zeros(48, 32)})
    capture_pass.run(build)
    assert not any("lm_head" in w.name for w in build.graph.weights)


BODY = """import torch
from torch import nn
import torch.nn.functional as F
from tscompile.nn import Config, PagedAttention, RotaryEmbedding

class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10)
        self.attention = PagedAttention(2, 1, 4)
        INIT
    def forward(self, token_ids):
        x = self.embed(token_ids)
        FORWARD
        return self.head(x)
"""


@pytest.mark.parametrize(
    ("init", "forward", "message"),
    [
        (
            "",
            "x = torch.softmax(x, -1)",
            "mine.py:15: the function softmax is not supported. Supported functions and methods: ",
        ),
        ("", "x = x.cumsum(0)", "mine.py:15: the method cumsum is not supported. Supported"),
        (
            "self.n = nn.LayerNorm(8)",
            "x = self.n(x)",
            "mine.py:15: the module LayerNorm is not supported. Supported",
        ),
        ("", "if x.sum() > 0: x = x + 1", "mine.py:15: the method sum is not supported"),
        ("", "if x > 0: x = x + 1", "mine.py:15: the function gt is not supported"),
        (
            "",
            "if x: x = x + 1",
            "mine.py:15: control flow on a traced value: its numbers are known only when a step runs",
        ),
        (
            "",
            "x = x.view(x.shape[0] * 2, 4)",
            "mine.py:15: arithmetic on the symbolic dim T: its size is known only",
        ),
        ("", "x = x.view(-1, 3)", "mine.py:15: [T, 8] does not reshape to"),
        ("", "x = x + x.view(-1, 2, 4)", "mine.py:15: [T, 8] and [T, 2, 4] do not fit: wanted equal shapes"),
        (
            "",
            "x = F.linear(x, self.head.weight[:, :3])",
            "mine.py:15: linear of x [T, 8] with weight [10, 3]",
        ),
        ("", "x = F.gelu(x)", 'mine.py:15: gelu by erf is not supported: gelu(x, approximate="tanh") is'),
        (
            "",
            "x = x.split(3, dim=0)[0]",
            "mine.py:15: split along dim 0 of [T, 8] is not supported: only along the last",
        ),
        ("", "x = x[0]", "mine.py:15: indexing [T, 8] like this is not supported: x[..., start:stop] is"),
        ("", "x = x.view('a', 8)", "mine.py:15: reshape to ['a', 8]: wanted ints, or dims of x.shape"),
        ("", "x = x.view(-1, -1)", "mine.py:15: reshape to [-1, -1]: at most one -1"),
        (
            "",
            "x = x.view(8, -1)",
            "mine.py:15: [T, 8] does not reshape to [8, -1]: T must stay a dim of its own",
        ),
        ("", "x = x.chunk(0, -1)[0]", "mine.py:15: the method chunk: these arguments are not supported: "),
        ("", "x = x.split([], -1)[0]", "mine.py:15: split of [T, 8] into []: wanted positive sizes"),
        ("", "x = x.split('a', -1)", "mine.py:15: the method split: these arguments are not supported"),
        (
            "",
            "x = x.relu(1, 2, 3)",
            "mine.py:15: the method relu: these arguments are not supported: too many",
        ),
        ("", "x = F.rms_norm(x, 8, x, 1e-5)", "mine.py:15: the function rms_norm: these arguments are not"),
        ("", "x = torch.cat(x, -1)", "mine.py:15: the function cat: these arguments are not supported"),
        ("", "x = 1 / x", "mine.py:15: division is supported by a number other than 0 only"),
        (
            "",
            "for row in x: pass",
            "mine.py:15: iterating over a value of [T, 8]: use split, chunk or unflatten",
        ),
        ("", "x = self.attention(x, x, x)", "mine.py:15: PagedAttention: q is [T, 8], wanted [T, 2, 4]"),
        (
            "",
            "x = x.no_such_thing",
            "mine.py:16: the attribute no_such_thing is not supported: shape, ndim and dtype are",
        ),
        ("", "x = undefined", "mine.py:15: the model file raised NameError: name 'undefined' is not defined"),
        ("raise ValueError('no')", "", "mine.py:12: the model file raised ValueError: no"),
        (
            "config.integer('depth')",
            "",
            "mine.py:12: config.json: depth is missing, wanted an integer from 1 to",
        ),
        ("", "return (x, x)", "mine.py:13: Model.forward returns tuple, wanted the logits [T, vocab_size]"),
        (
            "",
            "return x.view(-1, 2, 4)",
            "mine.py:13: Model.forward returns [T, 2, 4], wanted [T, vocab_size]",
        ),
        ("", "x = x.to(torch.int32)", "mine.py:15: to(torch.int32) is not supported"),
        ("", "x = self.embed(x)", "mine.py:15: embedding takes integers as its ids, not %embed.out of f32"),
        ("", "x = F.silu(token_ids)", "mine.py:15: silu takes floats as its x, not %token_ids of i32"),
    ],
)
def test_what_does_not_trace(init: str, forward: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(BODY.replace("INIT", init).replace("FORWARD", forward))

    def trace() -> None:
        model = models.load(path).make(Config({}))
        capture(model, Builder("mine", Mesh(), path, 64))

    with pytest.raises(CompileError) as error:
        trace()
    assert str(error.value).startswith(message), str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "mine.py:1: the model file does not parse: invalid syntax"),
        (
            "import nothing_of_that_name\n",
            "mine.py:1: the model file raised ModuleNotFoundError: No module named",
        ),
        ("exit(3)\n", "mine.py:1: the model file raised SystemExit: 3"),
        ("x = 1\n", "mine.py defines no class Model: wanted a torch.nn.Module that takes a Config"),
    ],
)
def test_files_that_are_no_model(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(CompileError) as error:
        models.load(path)
    assert str(error.value).startswith(message)
