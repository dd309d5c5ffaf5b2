"""A transformer's graph as capture and precision would leave it: any number of layers, no model file."""

from __future__ import annotations

from tscompile.ir import Graph
from tscompile.parser import parse

BATCH = {
    "token_ids": "T",
    "positions": "T",
    "slots": "T",
    "query_start": "S+1",
    "context_len": "S",
    "page_table": "S, P",
    "logit_rows": "L",
}
# One layer: I its number; H, A (heads), K (KV heads), D (of a head), F sizes; x comes in, x of I+1 leaves.
WEIGHTS = "q=A*D,H k=K*D,H v=K*D,H o=H,A*D g=F,H u=F,H d=H,F"
LAYER = """
  %a.I: f32[T, H] = rms_norm(%x.I, @n.I; eps=1e-6)
  %b.I: f32[T, H] = boundary(%a.I; module="layer.I", placements="tp:R")
  %c.I: bf16[T, H] = cast(%b.I; to="bf16")
  %q.I: f32[T, A*D] = linear(%c.I, @q.I)
  %qr.I: f32[T, A, D] = reshape(%q.I; shape=[-1, A, D])
  %qt.I: f32[T, A, D] = rope(%qr.I, @rope, %positions; interleaved=false)
  %qb.I: bf16[T, A, D] = cast(%qt.I; to="bf16")
  %k.I: f32[T, K*D] = linear(%c.I, @k.I)
  %kr.I: f32[T, K, D] = reshape(%k.I; shape=[-1, K, D])
  %kt.I: f32[T, K, D] = rope(%kr.I, @rope, %positions; interleaved=false)
  %kb.I: bf16[T, K, D] = cast(%kt.I; to="bf16")
  %v.I: f32[T, K*D] = linear(%c.I, @v.I)
  %vr.I: f32[T, K, D] = reshape(%v.I; shape=[-1, K, D])
  %vb.I: bf16[T, K, D] = cast(%vr.I; to="bf16")
  %s.I: state bf16[K, D] = kv_write(%kv.I, %kb.I, %vb.I, %slots; page_size=64)
  %t.I: f32[T, A, D] = attention(%qb.I, %s.I, %positions, %query_start, %context_len, %page_table; ATTENTION)
  %tr.I: f32[T, A*D] = reshape(%t.I; shape=[-1, A*D])
  %tb.I: bf16[T, A*D] = cast(%tr.I; to="bf16")
  %o.I: f32[T, H] = linear(%tb.I, @o.I)
  %p.I: f32[T, H] = boundary(%o.I; module="layer.I", placements="tp:R")
  %y.I: f32[T, H] = add(%x.I, %p.I)
  %m.I: f32[T, H] = rms_norm(%y.I, @m.I; eps=1e-6)
  %e.I: f32[T, H] = boundary(%m.I; module="layer.I", placements="tp:R")
  %f.I: bf16[T, H] = cast(%e.I; to="bf16")
  %g.I: f32[T, F] = linear(%f.I, @g.I)
  %h.I: f32[T, F] = silu(%g.I)
  %u.I: f32[T, F] = linear(%f.I, @u.I)
  %w.I: f32[T, F] = mul(%h.I, %u.I)
  %z.I: bf16[T, F] = cast(%w.I; to="bf16")
  %d.I: f32[T, H] = linear(%z.I, @d.I)
  %r.I: f32[T, H] = boundary(%d.I; module="layer.I", placements="tp:R")
  %x.NEXT: f32[T, H] = add(%y.I, %r.I)"""


def layered(  # the sizes of Qwen3-8B, but for its heads' norms
    layers: int, mesh: str, *, hidden: int = 4096, heads: int = 32, kv_heads: int = 8, head_dim: int = 128
) -> Graph:
    """hidden x 3 between the MLP's projections, a vocabulary of 32,768."""
    sizes = {"A*D": heads * head_dim, "K*D": kv_heads * head_dim, "A": heads, "K": kv_heads, "D": head_dim}
    sizes |= {"H": hidden, "F": 3 * hidden}
    attention = "page_size=64, scale=0.1, window=0"

    def filled(text: str, layer: int = 0) -> str:
        for key, value in (("ATTENTION", attention), ("NEXT", layer + 1), (".I", f".{layer}")):
            text = text.replace(key, str(value))
        for key, value in sizes.items():
            text = text.replace(f"[{key}", f"[{value}").replace(f", {key}", f", {value}")
        return text

    lines = [f"input %{name}: i32[{shape}]" for name, shape in BATCH.items()]
    lines += [filled(f"input %kv.{i}: state bf16[K, D]") for i in range(layers)]
    tables = {"embed": "bf16[32768, H]", "head": "bf16[32768, H]", "norm": "f32[H]", "rope": "f32[4096, D]"}
    lines += [filled(f'weight @{name}: {shape} = checkpoint("{name}")') for name, shape in tables.items()]
    for i in range(layers):
        for name, shape in (pair.split("=") for pair in WEIGHTS.split()):
            rows, columns = shape.split(",")
            lines.append(filled(f'weight @{name}.I: bf16[{rows}, {columns}] = checkpoint("{name}.I")', i))
        lines += [filled(f'weight @{name}.I: f32[H] = checkpoint("{name}.I")', i) for name in "nm"]
    lines.append(filled('%x.0: f32[T, H] = embedding(%token_ids, @embed; vocab_axis="")'))
    lines += [filled(LAYER, i) for i in range(layers)]
    lines.append(
        filled(
            f"""%last: f32[T, H] = rms_norm(%x.{layers}, @norm; eps=1e-6)
            %last.bf16: bf16[T, H] = cast(%last; to="bf16")
            %all: f32[T, 32768] = linear(%last.bf16, @head)
            %logits: f32[L, 32768] = gather_rows(%all, %logit_rows)
            output %logits"""
        )
    )
    return parse(f"graph layered {mesh} {{\n" + "\n".join(lines) + "\n}")
