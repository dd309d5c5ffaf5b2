"""How the modules of a model file become ops; tscompile/lower_functions.py does functions and methods. Each
lowering takes (builder, the module, the call's own arguments) and returns values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from tscompile.errors import CompileError
from tscompile.ir import Attr, Shape, Sym, Value, Weight
from tscompile.lower_functions import embedding, gelu, reshape, rms_norm
from tscompile.nn import Experts, LatentAttention, PagedAttention, RotaryEmbedding, Routing
from tscompile.ops.base import text_of
from tscompile.recipe import Arange, Checkpoint, Origin, RopeTable, Slice, Stack

if TYPE_CHECKING:
    from tscompile.capture import Builder


def linear_module(b: Builder, module: nn.Linear, x: Value) -> Value:
    out = b.emit("linear", [x, b.parameter(module, "weight")], name="out")[0]
    return out if module.bias is None else b.emit("add", [out, b.parameter(module, "bias")], name="biased")[0]


def embedding_module(b: Builder, module: nn.Embedding, ids: Value) -> Value:
    return embedding(b, ids, b.parameter(module, "weight"), padding_idx=None, max_norm=module.max_norm)


def rms_norm_module(b: Builder, module: nn.RMSNorm, x: Value) -> Value:
    weight = b.parameter(module, "weight") if module.weight is not None else None
    return rms_norm(b, x, module.normalized_shape, weight, module.eps)


def rotary_module(b: Builder, module: RotaryEmbedding, x: Value) -> Value:
    recipe = RopeTable(module.max_context, module.inv_freq, module.scaling)
    table = b.weight("rope_table", (module.max_context, 2 * len(module.inv_freq)), recipe)
    attrs: dict[str, Attr] = {"interleaved": module.interleaved}
    return b.emit("rope", [x, table, b.batch_array("positions")], attrs, name="rotated")[0]


def attention_module(b: Builder, module: PagedAttention, q: Value, k: Value, v: Value) -> Value:
    kv = (Sym("T"), module.num_kv_heads, module.head_dim)
    _check_attention(b, module, q=(q, (Sym("T"), module.num_heads, module.head_dim)), k=(k, kv), v=(v, kv))
    written = _written(b, "kv_write", (module.num_kv_heads, module.head_dim), [k, v])
    arrays = [b.batch_array(name) for name in ("positions", "query_start", "context_len", "page_table")]
    attrs: dict[str, Attr] = {"page_size": b.page_size, "scale": float(module.scale), "window": module.window}
    return b.emit("attention", [q, written, *arrays], attrs, name="out")[0]


def routing_module(b: Builder, module: Routing, logits: Value, bias: Value | None = None) -> list[Value]:
    attrs: dict[str, Attr] = {
        "k": module.k,
        "scores": module.scores,
        "normalize": module.normalize,
        "scale": float(module.scale),
        "groups": module.num_groups,
        "kept": module.num_kept_groups,
    }
    return b.emit("route", [logits] if bias is None else [logits, bias], attrs, name="ids")


def experts_module(b: Builder, module: Experts, x: Value, ids: Value, weights: Value) -> Value:
    gate, up, down = (expert_weight(b, module, name) for name in ("gate_proj", "up_proj", "down_proj"))
    num_experts, num_chosen = module.num_experts, ids.shape[-1]
    if not isinstance(num_chosen, int) or weights.shape != ids.shape:
        raise CompileError(
            f"Experts: ids are {text_of(ids.shape)} and weights {text_of(weights.shape)}, wanted [T, k] both"
        )
    numbers = b.weight("expert_numbers", (num_experts,), Arange(num_experts))
    order, counts = b.emit("sort_routes", [ids, numbers], name="order")
    rows = b.emit("dispatch", [x, order], {"k": num_chosen}, name="rows")[0]
    gated = b.emit("silu", b.emit("expert_linear", [rows, counts, gate], name="gate"), name="gated")[0]
    inner = b.emit("mul", [gated, *b.emit("expert_linear", [rows, counts, up], name="up")], name="inner")[0]
    out = b.emit("expert_linear", [inner, counts, down], name="down")[0]
    return b.emit("combine", [out, order, weights], name="out")[0]


def expert_weight(b: Builder, module: Experts, name: str) -> Weight:
    """[E, N, K], from each expert's tensor, or from one that holds them all."""
    parameter = module._parameters[name]
    assert parameter is not None
    full = b.parameter_names[id(parameter)]
    path = full.removesuffix(name)
    count, rows, depth = parameter.shape
    apart = Stack(tuple(Checkpoint(f"{path}{expert}.{name}.weight") for expert in range(count)))
    together = Origin(Checkpoint(full), (count, rows, depth))
    if name != "down_proj":
        start = 0 if name == "gate_proj" else rows
        both = Slice(Checkpoint(f"{path}gate_up_proj"), 1, start, start + rows)
        together = Origin(both, (count, 2 * rows, depth))
    return b.weight_from(full, parameter.shape, (Origin(apart, (rows, depth)), together))


def latent_attention_module(
    b: Builder,
    module: LatentAttention,
    q_nope: Value,
    q_rope: Value,
    *,
    latent: Value,
    k_rope: Value,
    kv_b: Value,
) -> Value:
    heads, rank, rope = module.num_heads, module.kv_lora_rank, module.qk_rope_head_dim
    _check_attention(
        b,
        module,
        q_nope=(q_nope, (Sym("T"), heads, module.qk_nope_head_dim)),
        q_rope=(q_rope, (Sym("T"), heads, rope)),
        latent=(latent, (Sym("T"), rank)),
        k_rope=(k_rope, (Sym("T"), 1, rope)),
        kv_b=(kv_b, (heads * (module.qk_nope_head_dim + module.v_head_dim), rank)),
    )
    if not isinstance(kv_b, Weight):
        raise CompileError(f"LatentAttention: kv_b is {kv_b!r}, which is computed: wanted a parameter")
    row = b.emit("concat", [latent, reshape(b, k_rope, [-1, rope])], name="row")[0]
    written = _written(b, "latent_write", (rank + rope,), [row])
    arrays = [b.batch_array(name) for name in ("positions", "query_start", "context_len", "page_table")]
    attrs: dict[str, Attr] = {"page_size": b.page_size, "scale": float(module.scale)}
    return b.emit("mla_attention", [q_nope, q_rope, written, kv_b, *arrays], attrs, name="out")[0]


def _check_attention(b: Builder, module: nn.Module, **values: tuple[Value, Shape]) -> None:
    """Each argument has the shape beside it, and the module was not called before."""
    what = type(module).__name__
    if b.path[-1] in b.states:
        raise CompileError(f"this {what} is called twice: it owns one layer's cache, so make one a call")
    for name, (value, wanted) in values.items():
        if value.shape != wanted:
            raise CompileError(f"{what}: {name} is {text_of(value.shape)}, wanted {text_of(wanted)}")


def _written(b: Builder, kind: str, shape: tuple[int, ...], values: list[Value]) -> Value:
    """The running module's KV state, `values` written to it."""
    state = b.state(shape)
    written = b.emit(kind, [state, *values, b.batch_array("slots")], {"page_size": b.page_size}, name="kv")[0]
    b.states[b.path[-1]] = written
    return written


def activation_module(kind: str) -> Callable[..., Value]:
    def lower(b: Builder, module: nn.Module, x: Value) -> Value:
        return b.emit(kind, [x])[0]

    return lower


def gelu_module(b: Builder, module: nn.GELU, x: Value) -> Value:
    return gelu(b, x, module.approximate)


MODULES: dict[type, Callable[..., Any]] = {
    nn.Linear: linear_module,
    nn.Embedding: embedding_module,
    nn.RMSNorm: rms_norm_module,
    nn.SiLU: activation_module("silu"),
    nn.ReLU: activation_module("relu"),
    nn.Sigmoid: activation_module("sigmoid"),
    nn.GELU: gelu_module,
    nn.Identity: lambda b, module, x: x,
    RotaryEmbedding: rotary_module,
    PagedAttention: attention_module,
    Routing: routing_module,
    Experts: experts_module,
    LatentAttention: latent_attention_module,
}
