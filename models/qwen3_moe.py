"""Qwen3, mixture of experts: GQA with RMSNorm over each head of q and k, RoPE, and routed SwiGLU experts in
all layers or some. Names and rules as in transformers' modeling_qwen3_moe."""

import torch.nn.functional as F
from torch import Tensor, nn

from tscompile.nn import Config, Experts, PagedAttention, Replicate, RotaryEmbedding, Routing, placements

ARCHITECTURES = ("Qwen3MoeForCausalLM",)

# A block adds to the residual stream, which every tensor-parallel rank holds whole.
WHOLE = {"tp": Replicate()}


def checkpoint_name(parameter: str) -> str:
    """The checkpoint's name of one of Model's parameters."""
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"


@placements(takes=WHOLE, gives=WHOLE)
class Attention(nn.Module):
    def __init__(self, config: Config, hidden_size: int, eps: float, window: int) -> None:
        super().__init__()
        num_heads = config.integer("num_attention_heads")
        num_kv_heads = config.kv_heads(num_heads)
        self.head_dim = config.head_dim(hidden_size, num_heads)
        bias = config.flag("attention_bias", False)
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps)
        self.rotary = RotaryEmbedding(config, self.head_dim)
        self.attention = PagedAttention(num_heads, num_kv_heads, self.head_dim, window=window)

    def forward(self, x: Tensor) -> Tensor:  # [T, hidden] -> [T, hidden]
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))  # [T, heads, head_dim]
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        out = self.attention(self.rotary(q), self.rotary(k), v)
        return self.o_proj(out.flatten(1))


@placements(takes=WHOLE, gives=WHOLE)
class MLP(nn.Module):
    def __init__(self, config: Config, hidden_size: int) -> None:
        super().__init__()
        intermediate_size = config.integer("intermediate_size")
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@placements(takes=WHOLE, gives=WHOLE)
class MoE(nn.Module):
    def __init__(self, config: Config, hidden_size: int) -> None:
        super().__init__()
        num_experts, num_chosen = config.num_experts("num_experts", "num_local_experts")
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.routing = Routing(num_chosen, normalize=config.flag("norm_topk_prob", False))
        self.experts = Experts(num_experts, hidden_size, config.integer("moe_intermediate_size"))

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.routing(self.gate(x))  # [T, num_chosen]
        return self.experts(x, ids, weights)


class Layer(nn.Module):
    def __init__(self, config: Config, hidden_size: int, window: int, sparse: bool) -> None:
        super().__init__()
        config.choice("hidden_act", ("silu",), default="silu")
        eps = config.number("rms_norm_eps", 1e-6)
        self.input_layernorm = nn.RMSNorm(hidden_size, eps)
        self.self_attn = Attention(config, hidden_size, eps, window)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps)
        self.mlp = MoE(config, hidden_size) if sparse else MLP(config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """token_ids [T] -> logits [T, vocab_size]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden_size = config.integer("hidden_size")
        vocab_size = config.integer("vocab_size")
        num_layers = config.integer("num_hidden_layers")
        window = config.window(default=4096) if config.flag("use_sliding_window", False) else 0
        dense = config.layers("mlp_only_layers", num_layers)
        step = config.integer("decoder_sparse_step", 1)
        sparse = [layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)]
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(Layer(config, hidden_size, window, s) for s in sparse)
        self.norm = nn.RMSNorm(hidden_size, config.number("rms_norm_eps", 1e-6))
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        if config.flag("tie_word_embeddings", False):
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed_tokens(token_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))
