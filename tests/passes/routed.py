"""Layers of routed experts as capture and precision would leave them, without attention between."""

from __future__ import annotations

from tscompile.ir import Graph
from tscompile.parser import parse


def routed(
    mesh: str, k: int, *, layers: int = 2, experts: int = 128, hidden: int = 2048, inner: int = 768
) -> Graph:
    """The sizes of Qwen3-30B-A3B's experts, each without its gate. k: experts of a token."""
    h, e, n = hidden, experts, inner
    lines = [
        "input %token_ids: i32[T]",
        "input %logit_rows: i32[L]",
        f'weight @embed: bf16[4096, {h}] = checkpoint("embed")',
    ]
    ops = [f'%x.0: f32[T, {h}] = embedding(%token_ids, @embed; vocab_axis="")']
    for i in range(layers):
        lines += [
            f'weight @gate.{i}: bf16[{e}, {h}] = checkpoint("gate.{i}")',
            f"weight @numbers.{i}: f32[{e}] = arange(; count={e})",
            f'weight @up.{i}: bf16[{e}, {n}, {h}] = checkpoint("up.{i}")',
            f'weight @down.{i}: bf16[{e}, {h}, {n}] = checkpoint("down.{i}")',
        ]
        ops += [
            f'%c.{i}: bf16[T, {h}] = cast(%x.{i}; to="bf16")',
            f"%s.{i}: f32[T, {e}] = linear(%c.{i}, @gate.{i})",
            f"%ids.{i}: i32[T, {k}], %weights.{i}: f32[T, {k}] = route(%s.{i}; groups=1, k={k}, kept=1, "
            'normalize=true, scale=1.0, scores="softmax")',
            f"%order.{i}: i32[R*{k}], %counts.{i}: i32[{e}] = sort_routes(%ids.{i}, @numbers.{i})",
            f"%rows.{i}: bf16[R*{k}, {h}] = dispatch(%c.{i}, %order.{i}; k={k})",
            f"%u.{i}: f32[R*{k}, {n}] = expert_linear(%rows.{i}, %counts.{i}, @up.{i})",
            f"%v.{i}: f32[R*{k}, {n}] = silu(%u.{i})",
            f'%w.{i}: bf16[R*{k}, {n}] = cast(%v.{i}; to="bf16")',
            f"%d.{i}: f32[R*{k}, {h}] = expert_linear(%w.{i}, %counts.{i}, @down.{i})",
            f"%y.{i}: f32[T, {h}] = combine(%d.{i}, %order.{i}, %weights.{i})",
            f"%x.{i + 1}: f32[T, {h}] = add(%x.{i}, %y.{i})",
        ]
    ops += [f"%out: f32[L, {h}] = gather_rows(%x.{layers}, %logit_rows)", "output %out"]
    text = "\n".join([*lines, *ops]).replace("R*1,", "R,").replace("R*1]", "R]")
    return parse(f"graph routed {mesh} {{\n{text}\n}}")
