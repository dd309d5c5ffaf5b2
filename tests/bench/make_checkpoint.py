"""Writes a checkpoint of a published model's shape with random weights: config.json, bf16 safetensors in
shards, a tokenizer.

    python tests/bench/make_checkpoint.py qwen3-0.6b build/bench/qwen3-0.6b

The vocabulary is made up, but has the size, the token lengths and the pre-tokenizer of the real one, so that
loading it costs as much. No token is special but the last: random weights would emit them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
BOTH = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False}
SHAPES: dict[str, dict[str, Any]] = {"qwen3-0.6b": QWEN3 | BOTH, "llama-3.2-1b": LLAMA | BOTH}

SHARD_BYTES = 1 << 29
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, as transformers has them."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
        if config["model_type"] == "qwen3":
            yield f"{prefix}self_attn.q_norm.weight", (head_dim,)
            yield f"{prefix}self_attn.k_norm.weight", (head_dim,)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, q)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        for name in ("gate", "up"):
            yield f"{prefix}mlp.{name}_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)


def shards(config: dict[str, Any]) -> list[list[tuple[str, tuple[int, ...]]]]:
    result: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in tensors(config):
        if result[-1] and size + 2 * math.prod(shape) > SHARD_BYTES:
            result.append([])
            size = 0
        result[-1].append((name, shape))
        size += 2 * math.prod(shape)
    return result


def random_weights(seed: int) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """What write_shard makes a tensor with: ones for norms, else uniform of standard deviation 0.02, which is
    cheaper to make than normal."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(_: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.035, 0.035, generator=generator)

    return tensor


def write_shard(
    path: Path,
    shard: list[tuple[str, tuple[int, ...]]],
    make: Callable[[str, tuple[int, ...]], torch.Tensor],
) -> None:
    """One tensor in memory at a time, each of bf16 and made by `make`."""
    header, at = {}, 0
    for name, shape in shard:
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (at, at + size)}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shard:
            file.write(make(name, shape).contiguous().view(torch.uint8).numpy().data)


def vocabulary(size: int, seed: int = 1) -> dict[str, Any]:
    """tokenizer.json of byte-level BPE: the 256 bytes, then random merges that look like words in length.
    The last id is the one special token."""
    rng = random.Random(seed)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    tokens = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    letters = [*"etaoinshrdlucmfwypvbgkjqxz_", "\u0120", *"ETAOINSHRD"]
    known, merges = set(tokens), []
    growing = list(letters)
    while len(tokens) < size - 1:
        left, right = rng.choice(growing), rng.choice(growing if rng.random() < 0.2 else letters)
        if len(left + right) > 12 or left + right in known or "\u0120" in right:
            continue
        merges.append([left, right])
        tokens.append(left + right)
        growing.append(left + right)
        known.add(left + right)
    special = {"id": size - 1, "content": "<|endoftext|>", "special": True}
    special |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def write(name: str, folder: Path) -> None:
    """The checkpoint `name` in `folder`, complete or not at all. Nothing is done if it is there."""
    if folder.exists():
        return
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config = SHAPES[name]
    ends = {"eos_token_id": config["vocab_size"] - 1, "bos_token_id": None}
    (temporary / "config.json").write_text(json.dumps({**config, **ends, "dtype": "bfloat16"}, indent=2))
    (temporary / "tokenizer.json").write_text(
        json.dumps(vocabulary(config["vocab_size"]), ensure_ascii=False)
    )
    parts = shards(config)
    make = random_weights(1)
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(parts, 1):
        file = f"model-{index:05d}-of-{len(parts):05d}.safetensors"
        print(f"{name}: {file}", file=sys.stderr, flush=True)
        write_shard(temporary / file, shard, make)
        weight_map |= dict.fromkeys((tensor for tensor, _ in shard), file)
    index_json = {"metadata": {}, "weight_map": weight_map}
    (temporary / "model.safetensors.index.json").write_text(json.dumps(index_json))
    temporary.rename(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write(arguments.name, arguments.folder)
