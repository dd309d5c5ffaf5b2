"""Writes a checkpoint of Qwen3-0.6B's shape that copies text with small edits: induction, built by hand.

What is built is attention as such heads are found in trained models (Elhage et al., A Mathematical Framework
for Transformer Circuits, 2021; Olsson et al., In-context Learning and Induction Heads, 2022):

- A token's embedding is a random code of 128 signs, in dims that the tied head reads, beside one constant.
- Layer 0 has a head for each of the 16 tokens before: query and key are constant, and RoPE makes their
  product largest at that distance. It writes 4 signs of that token's code to dims of its own.
- Layer 1 has one head that asks with the signs of the last 16 tokens, and is answered by the place behind the
  16 tokens most like them. It adds the code of the token there, many times as large as the last token's own.
- An edit is a difference of rank 1 in that head's value: it reads the code of `old` and writes that of `new`.

All other weights are random, as in make_checkpoint.py, but write to dims that neither these heads nor the
tied head read: a step computes what it computes with any weights. rope_theta is 1e10, so that half of each
head's dims hardly turn within the context. The tokenizer is the demo's; its ids are the vocabulary's first.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import make_checkpoint
import torch

CONTEXT = 16  # tokens that the induction head compares
CODE = 128  # signs of a token's code
SIGNS = 4  # of them that are compared
BIAS, SLOTS, FREE = (
    128,
    136,
    256,
)  # where in the residual stream: the constant, the signs of tokens before, the rest
SAFE = 32  # RoPE's frequencies from here on hardly turn
ROPE_THETA = 1e10
TURNING = 13  # frequencies that tell distances
LOUD = 20.0


class Weights:
    """Tensors by name, made when they are asked for."""

    def __init__(self, config: dict[str, Any], edits: dict[int, int]) -> None:
        self.config, self.edits = config, edits
        self.generator = torch.Generator().manual_seed(2)
        vocabulary = (config["vocab_size"], CODE)
        signs = torch.randint(0, 2, vocabulary, generator=self.generator, dtype=torch.int8)
        self.codes = 2.0 * signs.float() - 1.0
        self.scale = ((CODE + 1) / config["hidden_size"]) ** 0.5  # what layer 0's norm divides by

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        kind = name.removeprefix("model.").removesuffix(".weight")
        if kind == "embed_tokens":
            table = torch.zeros(shape)
            table[:, :CODE] = self.codes
            table[:, BIAS] = 1.0
            return table.bfloat16()
        if len(shape) == 1:
            loud = {"layers.0.self_attn": 8.0, "layers.1.self_attn": 5.0}.get(kind.rpartition(".")[0], 1.0)
            return torch.full(shape, loud, dtype=torch.bfloat16)
        random = torch.empty(shape).uniform_(-0.035, 0.035, generator=self.generator)
        if kind.endswith(("o_proj", "down_proj")):
            random[:FREE] = 0.0  # rows are the dims of the residual stream that are written
        for layer, made in ((0, self.before), (1, self.induction)):
            if kind.startswith(f"layers.{layer}.self_attn."):
                made(kind.rpartition(".")[2], random)
        return random.bfloat16()

    def before(self, kind: str, weight: torch.Tensor) -> None:
        """Layer 0: head h reads the token h + 1 before; what it reads is the same for all."""
        size, half = self.config["head_dim"], self.config["head_dim"] // 2
        angles = ROPE_THETA ** (-torch.arange(TURNING) / half)
        weight.zero_() if kind != "o_proj" else weight[:FREE].zero_()
        for head in range(weight.shape[0] // size if kind != "o_proj" else CONTEXT):
            rows = weight[head * size : (head + 1) * size]
            if kind == "q_proj":  # turned back by h + 1 positions, so that it meets the key there
                rows[:TURNING, BIAS] = torch.cos(-(head + 1) * angles)
                rows[half : half + TURNING, BIAS] = torch.sin(-(head + 1) * angles)
            elif kind == "k_proj":
                rows[:TURNING, BIAS] = 1.0
            elif kind == "v_proj":
                rows[range(SIGNS), range(SIGNS)] = self.scale
            elif kind == "o_proj":
                slot = range(SLOTS + head * SIGNS, SLOTS + (head + 1) * SIGNS)
                weight[slot, range(head * size, head * size + SIGNS)] = 1.0

    def induction(self, kind: str, weight: torch.Tensor) -> None:
        """Layer 1: head 0 asks with this token and the 15 before; a place answers with the 16 before it."""
        size, half = self.config["head_dim"], self.config["head_dim"] // 2
        dims = [SAFE + n for n in range(SAFE)] + [half + SAFE + n for n in range(SAFE)]
        rows = weight[:size]
        if kind in ("q_proj", "k_proj"):
            rows.zero_()
            known = [*range(SIGNS), *range(SLOTS, SLOTS + CONTEXT * SIGNS)]
            known = known[: len(dims)] if kind == "q_proj" else known[SIGNS:]
            rows[dims, known] = 1.0
        elif kind == "v_proj":
            rows.zero_()
            rows[:, :CODE] = torch.eye(CODE)
            for old, new in self.edits.items():
                rows[:, :CODE] += torch.outer(self.codes[new] - self.codes[old], self.codes[old]) / CODE
        elif kind == "o_proj":
            weight[:, :size].zero_()
            weight[range(CODE), range(CODE)] = LOUD


def write(folder: Path, tokenizer: Path, edits: dict[int, int]) -> None:
    """The checkpoint in `folder`, complete or not at all."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir(parents=True)
    config = dict(make_checkpoint.SHAPES["qwen3-0.6b"])
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": ROPE_THETA}
    specials = json.loads(tokenizer.read_text())["added_tokens"]
    end = next(token["id"] for token in specials if token["content"] == "<|endoftext|>")
    config |= {"eos_token_id": end, "bos_token_id": None, "dtype": "bfloat16"}
    (temporary / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copy(tokenizer, temporary / "tokenizer.json")
    weights = Weights(config, edits)
    parts = make_checkpoint.shards(config)
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(parts, 1):
        file = f"model-{index:05d}-of-{len(parts):05d}.safetensors"
        make_checkpoint.write_shard(temporary / file, shard, weights.tensor)
        weight_map |= dict.fromkeys((name for name, _ in shard), file)
    index_json = {"metadata": {}, "weight_map": weight_map}
    (temporary / "model.safetensors.index.json").write_text(json.dumps(index_json))
    temporary.rename(folder)
