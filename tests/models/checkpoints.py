"""Makers of small random Hugging Face checkpoints: config.json, safetensors, a tokenizer of their own and a
chat template."""

from __future__ import annotations

import inspect
import json
import textwrap
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FAMILIES = {
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Spec:
    """A family and what its config says beside BASE."""

    family: str
    config: dict[str, Any] = field(default_factory=dict)


BASE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
MOE = {"head_dim": 32, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 48}
ROUTED = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
}

# Each leaves the beaten path somewhere: head counts, ties, biases, rope scalings, odd sizes, windows.
SPECS: dict[str, Spec] = {
    "deepseek-dense": Spec("deepseek_v3", LATENT),
    "deepseek-routed": Spec("deepseek_v3", {**LATENT, **ROUTED}),
    "deepseek-no-q-rank-odd-sizes": Spec(
        "deepseek_v3",
        {
            **LATENT,
            **ROUTED,
            "vocab_size": 509,
            "hidden_size": 72,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "q_lora_rank": None,
            "kv_lora_rank": 40,
            "qk_nope_head_dim": 20,
            "qk_rope_head_dim": 12,
            "v_head_dim": 24,
            "first_k_dense_replace": 0,
            "moe_intermediate_size": 20,
            "n_shared_experts": 3,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "rope_interleave": False,
            "attention_bias": True,
        },
    ),
    "deepseek-yarn-one-group": Spec(
        "deepseek_v3",
        {
            **LATENT,
            **ROUTED,
            "num_hidden_layers": 3,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 0.8,
            },
        },
    ),
    "llama-mha": Spec("llama", {"num_key_value_heads": 4}),
    "llama-gqa-tied": Spec("llama", {"num_attention_heads": 8, "head_dim": 16, "tie_word_embeddings": True}),
    "llama-mqa-odd-sizes": Spec(
        "llama",
        {
            "vocab_size": 509,
            "hidden_size": 72,
            "intermediate_size": 100,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 24,
        },
    ),
    "llama-biases": Spec("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": Spec("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-linear-rope": Spec(
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
    ),
    "mistral-window": Spec("mistral", {"sliding_window": 40, "head_dim": 32}),
    "mistral-no-window": Spec("mistral", {"sliding_window": None, "vocab_size": 515}),
    "qwen3-tied": Spec("qwen3", {"head_dim": 64, "hidden_size": 96, "tie_word_embeddings": True}),
    "qwen3-bias-odd-vocab": Spec("qwen3", {"head_dim": 32, "attention_bias": True, "vocab_size": 601}),
    "qwen3-gqa-8": Spec(
        "qwen3", {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 1, "num_hidden_layers": 3}
    ),
    "qwen3-yarn": Spec(
        "qwen3",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "qwen3-some-layers-windowed": Spec(
        "qwen3",
        {
            "head_dim": 32,
            "use_sliding_window": True,
            "sliding_window": 48,
            "num_hidden_layers": 3,
            "max_window_layers": 1,
        },
    ),
    "qwen3-moe": Spec("qwen3-moe", {**MOE, "norm_topk_prob": True}),
    "qwen3-moe-top1-odd-sizes": Spec(
        "qwen3-moe",
        {
            **MOE,
            "hidden_size": 72,
            "moe_intermediate_size": 20,
            "num_experts": 7,
            "num_experts_per_tok": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-moe-some-layers-dense": Spec(
        "qwen3-moe",
        {
            **MOE,
            "num_experts": 12,
            "num_experts_per_tok": 5,
            "num_hidden_layers": 5,
            "mlp_only_layers": [3],
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 48,
        },
    ),
    "qwen3-moe-every-expert": Spec(
        "qwen3-moe", {**MOE, "num_experts": 3, "num_experts_per_tok": 3, "moe_intermediate_size": 100}
    ),
}


def make(spec: Spec, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 1) -> Path:
    """Writes the checkpoint with weights of `dtype` into `folder`. The same seed gives the same files."""
    model = reference(spec, seed).to(dtype)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def reference(spec: Spec, seed: int = 1) -> Any:
    """transformers' model in float32, with random weights everywhere: norms and biases too. They keep the
    variance of what passes through, so that logits differ enough for greedy choices to be clear."""
    config_type, model_type = FAMILIES[spec.family]
    config = config_type(**{**BASE, **spec.config}, dtype="float32", attn_implementation="eager")
    config._experts_implementation = "eager"  # the grouped matmul refuses odd sizes
    torch.manual_seed(seed)
    model = model_type(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            else:
                # the embedding at 1, the rest at 1 / sqrt(fan in), a little more for the head's logits to
                # spread
                scale = 1.0 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5
                if name.endswith("mlp.gate.weight"):  # nor do choices of experts hang on the last bits
                    scale *= 4
                parameter.copy_(noise * (scale if not config.tie_word_embeddings else min(scale, 0.3)))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


@cache
def trained() -> Tokenizer:
    """Byte-level BPE of 384 tokens, trained on a file of Python's standard library, with Qwen's way to
    split."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[AddedToken(text, special=True) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([inspect.getsource(textwrap), inspect.getsource(json)], trainer)
    return trained


def tokenizer() -> Any:
    """The trained tokenizer as transformers saves it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=trained(), eos_token=SPECIALS[0], chat_template=CHAT_TEMPLATE
    )
