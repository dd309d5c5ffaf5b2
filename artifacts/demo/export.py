"""Writes the demo model as a Hugging Face checkpoint, checks that transformers reads it alike; samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from data import END_OF_TEXT, IM_END, SYSTEM_PROMPT, TOOL_TOKENS, chatml
from model import Model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

MAX_BYTES = 14_000_000
PROMPTS = (
    "def read_lines(path):\n",
    "class Stack:\n",
    "import os\n",
    'def is_valid_name(name):\n    """Return True if the name is',
    "    for i in range(",
)
CHAT_PROMPTS = (
    "Write a function that returns the number of items in the queue.",
    'Complete this function:\n```python\ndef get_size(self):\n    """Return the size of the file."""\n```',
    "Write a Python function called `parse_header`.",
)


def export(model: Model, tokenizer: Tokenizer, out: Path) -> None:
    """Writes config, generation config, bf16 weights and tokenizer into `out`, then verifies them."""
    stops = [tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)]
    ids = {"eos_token_id": stops[0], "bos_token_id": stops[1], "pad_token_id": stops[1]}
    theirs = Qwen3ForCausalLM(Qwen3Config(**model.config.fields(), **ids)).to(torch.bfloat16)
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    if missing != ["lm_head.weight"] or unexpected:  # tied to the embedding
        raise SystemExit(
            f"parameter names differ from Qwen3ForCausalLM's: missing {missing}, unexpected {unexpected}"
        )
    theirs.generation_config = GenerationConfig(**(ids | {"eos_token_id": stops}))
    theirs.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config(model, tokenizer), indent=2) + "\n"
    )
    verify(model, tokenizer, out)


def tokenizer_config(model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json with the keys that Qwen3's has; the chat template lies in a file beside it."""
    added = {
        str(i): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for i, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "extra_special_tokens": {},
        "model_max_length": model.config.max_position_embeddings,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


@torch.no_grad()
def verify(model: Model, tokenizer: Tokenizer, out: Path) -> None:
    """Logits, token ids and template of the files in `out` are those of training; the size is in bounds."""
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    rounded = Model(model.config)
    rounded.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in model.state_dict().items()})
    ids = torch.randint(0, model.config.vocab_size, (2, 96), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rounded(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)

    loaded = AutoTokenizer.from_pretrained(out)
    texts = [
        Path(__file__).read_text(),
        "e\u0301 \u4f60\u597d\r\n\t\t 1234  x " + "".join(TOOL_TOKENS) + IM_END,
        "",
    ]
    for text in texts:
        ours = tokenizer.encode(text).ids
        if ours != loaded(text)["input_ids"]:
            raise SystemExit(f"transformers encodes otherwise than the trained tokenizer: {text[:60]!r}")
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "def f():"},
    ]
    if loaded.apply_chat_template(messages, tokenize=False) != chatml("Hello", "def f():", SYSTEM_PROMPT):
        raise SystemExit("chat_template.jinja renders otherwise than the dialogues of training")

    size = sum(f.stat().st_size for f in out.iterdir() if f.is_file())
    if size > MAX_BYTES:
        raise SystemExit(f"the checkpoint has {size} bytes, {MAX_BYTES} are allowed; make the model smaller")


def samples(out: Path, max_new_tokens: int = 96) -> list[dict[str, str]]:
    """Greedy completions, by transformers, of the prompts above; special tokens are shown."""
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    dialogues = [[{"role": "user", "content": p}] for p in CHAT_PROMPTS]
    prompts = [
        *PROMPTS,
        *(tokenizer.apply_chat_template(d, tokenize=False, add_generation_prompt=True) for d in dialogues),
    ]
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
        found.append({"prompt": prompt, "completion": tokenizer.decode(ids[inputs["input_ids"].shape[1] :])})
    return found
