"""DeepSeek-V3, and Kimi K2, which is the same: multi-head latent attention, and after the first layers routed
experts beside shared ones, the router limited to the best groups. Names and rules as in transformers'
modeling_deepseek_v3."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tscompile.nn import Config, Experts, LatentAttention, Replicate, RotaryEmbedding, Routing, placements

ARCHITECTURES = ("DeepseekV3ForCausalLM", "KimiK2ForCausalLM")

# Layers for multi-token prediction lie behind those that config.json counts, as transformers ignores them.
IGNORED = ("model.layers.61.*", "model.layers.*.self_attn.rotary_emb.inv_freq")

# A block adds to the residual stream, which every tensor-parallel rank holds whole.
WHOLE = {"tp": Replicate()}


def checkpoint_name(parameter: str) -> str:
    """The checkpoint's name of one of Model's parameters."""
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"


@placements(takes=WHOLE, gives=WHOLE)
class Attention(nn.Module):
    def __init__(self, config: Config, hidden_size: int) -> None:
        super().__init__()
        num_heads = config.integer("num_attention_heads")
        self.rank = config.integer("kv_lora_rank")
        self.nope = config.integer("qk_nope_head_dim")
        self.rope = config.integer("qk_rope_head_dim")
        v_head_dim = config.integer("v_head_dim")
        self.head_dim = self.nope + self.rope
        bias = config.flag("attention_bias", False)
        self.low_rank = config.data.get("q_lora_rank") is not None
        if self.low_rank:
            q_rank = config.integer("q_lora_rank")
            self.q_a_proj = nn.Linear(hidden_size, q_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(q_rank, 1e-6)  # whatever rms_norm_eps says
            self.q_b_proj = nn.Linear(q_rank, num_heads * self.head_dim, bias=False)
        else:
            self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, self.rank + self.rope, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(self.rank, 1e-6)
        self.kv_b_proj = nn.Linear(self.rank, num_heads * (self.nope + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=bias)
        self.rotary = RotaryEmbedding(config, self.rope, config.flag("rope_interleave", True))
        self.attention = LatentAttention(
            num_heads, self.rank, self.nope, self.rope, v_head_dim, scale=config.latent_scale(self.head_dim)
        )

    def forward(self, x: Tensor) -> Tensor:  # [T, hidden] -> [T, hidden]
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.low_rank else self.q_proj(x)
        q_nope, q_rope = q.unflatten(-1, (-1, self.head_dim)).split([self.nope, self.rope], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], -1)
        k_rope = self.rotary(k_rope.unflatten(-1, (1, self.rope)))  # one for all heads
        latent = self.kv_a_layernorm(latent)
        q_rope, kv_b = self.rotary(q_rope), self.kv_b_proj.weight
        return self.o_proj(self.attention(q_nope, q_rope, latent=latent, k_rope=k_rope, kv_b=kv_b).flatten(1))


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """The router. Its bias chooses experts, and does not weigh them."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.empty(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@placements(takes=WHOLE, gives=WHOLE)
class MLP(SwiGLU):
    pass


@placements(takes=WHOLE, gives=WHOLE)
class MoE(nn.Module):
    def __init__(self, config: Config, hidden_size: int) -> None:
        super().__init__()
        num_experts, num_chosen = config.num_experts("n_routed_experts")
        intermediate_size = config.integer("moe_intermediate_size")
        config.choice("scoring_func", ("sigmoid",), default="sigmoid")
        config.choice("topk_method", ("noaux_tc",), default="noaux_tc")
        self.gate = Gate(hidden_size, num_experts)
        self.routing = Routing(
            num_chosen,
            scores="sigmoid",
            normalize=config.flag("norm_topk_prob", True),
            scale=config.number("routed_scaling_factor", 2.5),
            num_groups=config.integer("n_group", 8),
            num_kept_groups=config.integer("topk_group", 4),
        )
        self.experts = Experts(num_experts, hidden_size, intermediate_size)
        num_shared = config.integer("n_shared_experts", 1)
        self.shared_experts = SwiGLU(hidden_size, num_shared * intermediate_size)  # summed with the routed

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.routing(self.gate(x), self.gate.e_score_correction_bias)  # [T, num_chosen]
        return self.experts(x, ids, weights) + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, config: Config, hidden_size: int, routed: bool) -> None:
        super().__init__()
        config.choice("hidden_act", ("silu",), default="silu")
        eps = config.number("rms_norm_eps", 1e-6)
        self.input_layernorm = nn.RMSNorm(hidden_size, eps)
        self.self_attn = Attention(config, hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps)
        dense_size = config.integer("intermediate_size")
        self.mlp = MoE(config, hidden_size) if routed else MLP(hidden_size, dense_size)

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
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        num_dense = config.integer("first_k_dense_replace", 3, minimum=0)
        self.layers = nn.ModuleList(Layer(config, hidden_size, i >= num_dense) for i in range(num_layers))
        self.norm = nn.RMSNorm(hidden_size, config.number("rms_norm_eps", 1e-6))
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        if config.flag("tie_word_embeddings", False):
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed_tokens(token_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))
