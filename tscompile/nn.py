"""What a model file imports, beside torch. docs/writing-a-model.md shows how.

from tscompile.nn import Config, PagedAttention, RotaryEmbedding, placements, Replicate, Shard, Partial
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from tscompile.config import Config
from tscompile.errors import CompileError
from tscompile.mesh import AXES, by_stage
from tscompile.placement import Partial, Placement, Replicate, Shard

__all__ = [
    "Config",
    "Experts",
    "LatentAttention",
    "PagedAttention",
    "Partial",
    "Replicate",
    "RotaryEmbedding",
    "Routing",
    "Shard",
    "placements",
]

Module = TypeVar("Module", bound=type[nn.Module])


class RotaryEmbedding(nn.Module):
    """Rotary position embeddings, by a table made at build. The first rotary_dim elements of each head are
    rotated, element i paired with i + rotary_dim / 2. One instance may serve all layers; equal ones share
    their table."""

    def __init__(self, config: Config, rotary_dim: int, interleaved: bool = False) -> None:
        """Reads rope_parameters, or rope_theta and rope_scaling, of config.json. interleaved: neighbours are
        paired, 2i with 2i + 1, and the pair, rotated, is given at i and i + rotary_dim / 2, as transformers
        does."""
        super().__init__()
        self.interleaved = interleaved
        self.inv_freq, self.scaling = config.rope(rotary_dim)
        self.max_context = config.max_context

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, heads, head_dim] -> the same shape, rotated by each token's position."""
        raise CompileError("RotaryEmbedding runs only inside a model that tscompile captures")


class PagedAttention(nn.Module):
    """Causal attention. Each instance owns one layer's paged KV cache; make one a layer, in order."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, scale: float = 0.0, window: int = 0
    ) -> None:
        """num_kv_heads divides num_heads. scale: of q.k, 0 for head_dim ** -0.5. window: how many tokens back
        a token sees, itself included; 0 for all."""
        super().__init__()
        if num_heads % num_kv_heads:
            raise CompileError(
                f"PagedAttention: num_kv_heads {num_kv_heads} does not divide num_heads {num_heads}"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = scale or head_dim**-0.5
        self.window = window

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, num_heads, head_dim], k and v [T, num_kv_heads, head_dim], written to the cache -> [T,
        num_heads, head_dim]."""
        raise CompileError("PagedAttention runs only inside a model that tscompile captures")


class Routing(nn.Module):
    """Chooses the k experts of each token by their scores, best first, ties to the lower number."""

    def __init__(
        self,
        k: int,
        *,
        scores: str = "softmax",
        normalize: bool = False,
        scale: float = 1.0,
        num_groups: int = 1,
        num_kept_groups: int = 1,
    ) -> None:
        """scores: "softmax" or "sigmoid" of the router's logits. normalize: the k weights are divided by
        their sum. scale: and multiplied by this. num_groups: the experts are as many equal groups, and only
        the num_kept_groups whose two best sum highest take part."""
        super().__init__()
        self.k, self.scores, self.normalize, self.scale = k, scores, normalize, scale
        self.num_groups, self.num_kept_groups = num_groups, num_kept_groups

    def forward(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [T, num_experts] -> ids [T, k], weights [T, k]. bias [num_experts] is added to the scores
        that choose, not to those that weigh."""
        raise CompileError("Routing runs only inside a model that tscompile captures")


class Experts(nn.Module):
    """SwiGLU MLPs, of which each token takes those that it is routed to: the sum over its experts of weight *
    down(silu(gate(x)) * up(x)).

    The checkpoint has each expert's tensors apart, `experts.0.gate_proj.weight [intermediate_size,
    hidden_size]`, or all of them stacked, `experts.gate_up_proj [num_experts, 2 * intermediate_size,
    hidden_size]` (gate above up) and `experts.down_proj`; a model file's checkpoint_name is given either."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, hidden_size], and of each token the ids and weights [T, k] of its experts, as Routing gives
        them -> [T, hidden_size]."""
        raise CompileError("Experts runs only inside a model that tscompile captures")


class LatentAttention(nn.Module):
    """Causal multi-head latent attention (DeepSeek-V2). Each instance owns one layer's paged cache of
    latents; make one a layer, in order. kv_b decompresses a latent into each head's k_nope and v; the
    compiler absorbs it, so that attention runs on the latents as they are cached."""

    def __init__(
        self,
        num_heads: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        *,
        scale: float = 0.0,
    ) -> None:
        """scale: of q.k, 0 for (qk_nope_head_dim + qk_rope_head_dim) ** -0.5."""
        super().__init__()
        self.num_heads, self.kv_lora_rank, self.v_head_dim = num_heads, kv_lora_rank, v_head_dim
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.scale = scale or (qk_nope_head_dim + qk_rope_head_dim) ** -0.5

    def forward(
        self, q_nope: Tensor, q_rope: Tensor, *, latent: Tensor, k_rope: Tensor, kv_b: Tensor
    ) -> Tensor:
        """q_nope [T, num_heads, qk_nope_head_dim] and q_rope [T, num_heads, qk_rope_head_dim]; latent [T,
        kv_lora_rank] and k_rope [T, 1, qk_rope_head_dim], written to the cache; kv_b, a parameter [num_heads
        * (qk_nope_head_dim + v_head_dim), kv_lora_rank] -> [T, num_heads, v_head_dim]."""
        raise CompileError("LatentAttention runs only inside a model that tscompile captures")


@dataclass(frozen=True)
class Boundary:
    """What a module takes and gives on each axis. An axis that is not named: Replicate."""

    takes: Mapping[str, Placement]
    gives: Mapping[str, Placement]


def placements(
    takes: Mapping[str, Placement] | None = None, gives: Mapping[str, Placement] | None = None
) -> Callable[[Module], Module]:
    """Class decorator: the placement of the module's first input and of its output, by mesh axis, e.g.
    @placements(takes={"tp": Replicate()}, gives={"tp": Replicate()}). What happens inside, the compiler
    infers; which rank has which tokens too, where an axis says Replicate or is not named. CompileError for
    what is no placement or axis."""
    for said in (takes or {}, gives or {}):
        for axis, placement in said.items():
            if axis not in AXES:
                raise CompileError(f"placements: {axis!r} is no mesh axis; known are {', '.join(AXES)}")
            if by_stage(axis):
                raise CompileError(
                    f"placements: {axis} is an axis of stages, and which stage runs a module is the "
                    "compiler's to choose: leave it out"
                )
            if not isinstance(placement, (Replicate, Shard, Partial)):
                raise CompileError(
                    f"placements: {axis} is {placement!r}, wanted Replicate(), Shard(dim) or Partial()"
                )
            if isinstance(placement, Shard) and placement.dim < 0:
                raise CompileError(f"placements: {axis} is {placement}, wanted a dim counted from 0")

    def mark(module: Module) -> Module:
        module.tscompile_boundary = Boundary(takes or {}, gives or {})  # type: ignore[attr-defined]
        return module

    return mark
