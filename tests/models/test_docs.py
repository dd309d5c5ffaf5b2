"""The model of docs/writing-a-model.md compiles as the page says, outside the repository, and gives what
torch gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_interpret import captured, logits
from test_variants import CONFIG, attend, kinds, rotate
from torch import nn

from tscompile import models
from tscompile.config import Config
from tscompile.lower import MODULES
from tscompile.nn import PagedAttention, RotaryEmbedding

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "writing-a-model.md").read_text()


def test_the_pages_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "parallel.py"
    path.write_text(source)
    config = {**CONFIG, "intermediate_size": 72, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = models.load(path)
    module = file.model(Config(config))
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    tensors = {file.checkpoint_name(name): p.detach() for name, p in module.named_parameters()}
    assert "transformer.h.0.norm.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors")

    build = captured(tmp_path, model=path)
    tokens, chunks = torch.randint(61, (30,)).tolist(), [20, 1, 9]
    monkeypatch.setattr(RotaryEmbedding, "forward", rotate)
    monkeypatch.setattr(PagedAttention, "forward", attend)
    with torch.no_grad():
        expected = module(torch.tensor(tokens))[torch.tensor(chunks).cumsum(0) - 1]
    found = logits(build, tokens, chunks)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    assert kinds(build).count("qkv_write") == 2
    assert sum(r.pattern == "gate_up_swiglu" and r.matched for r in build.receipts) == 2


def test_the_page_lists_every_module() -> None:
    missing = [m.__name__ for m in MODULES if m.__name__ not in PAGE]
    assert not missing
