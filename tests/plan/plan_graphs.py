"""A fused graph of one layer, small enough to read, and a build around it."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from tscompile.build import Bucket, Build, ModelInfo, Options, TargetBuild
from tscompile.checkpoint import Checkpoint
from tscompile.mesh import Mesh
from tscompile.parser import parse

TEXT = """graph small mesh(tp=1) {
  input %token_ids: i32[T]
  input %positions: i32[T]
  input %slots: i32[T]
  input %query_start: i32[S+1]
  input %context_len: i32[S]
  input %page_table: i32[S, P]
  input %logit_rows: i32[L]
  input %kv.0: state bf16[2, 16]
  weight @embed: bf16[50, 32] = checkpoint("embed")
  weight @norm: f32[32] = checkpoint("norm")
  weight @qkv: bf16[96, 32] = concat(checkpoint("q"), checkpoint("k"), checkpoint("v"); dim=0)
  weight @table: f32[64, 16] = rope_table(; rows=64, inv_freq=[1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125,
  0.015625, 0.0078125], scaling=1.0) weight @gate_up: bf16[96, 32] = interleave(checkpoint("gate"),
  checkpoint("up"); tile=16) %x: f32[T, 32] = group.embed(%token_ids, @embed) {
    %x: f32[T, 32] = embedding(%token_ids, @embed; vocab_axis="")
  }
  %normed: bf16[T, 32] = group.rms_norm(%x, @norm) {
    %n: f32[T, 32] = rms_norm(%x, @norm; eps=1e-06)
    %normed: bf16[T, 32] = cast(%n; to="bf16")
  }
  %qkv.out: f32[T, 96] = group.linear(%normed, @qkv) {
    %qkv.out: f32[T, 96] = linear(%normed, @qkv)
  }
  %q: bf16[T, 2, 16], %kv.0.new: state bf16[2, 16] = group.qkv_write(%qkv.out, @table, %positions, %kv.0,
  %slots) {
    %q.flat: f32[T, 32], %k.flat: f32[T, 32], %v.flat: f32[T, 32] = split(%qkv.out; sizes=[32, 32, 32])
    %q.heads: f32[T, 2, 16] = reshape(%q.flat; shape=["T", 2, 16])
    %k.heads: f32[T, 2, 16] = reshape(%k.flat; shape=["T", 2, 16])
    %v.heads: f32[T, 2, 16] = reshape(%v.flat; shape=["T", 2, 16])
    %q.rope: f32[T, 2, 16] = rope(%q.heads, @table, %positions; interleaved=false)
    %k.rope: f32[T, 2, 16] = rope(%k.heads, @table, %positions; interleaved=false)
    %q: bf16[T, 2, 16] = cast(%q.rope; to="bf16")
    %k: bf16[T, 2, 16] = cast(%k.rope; to="bf16")
    %v: bf16[T, 2, 16] = cast(%v.heads; to="bf16")
    %kv.0.new: state bf16[2, 16] = kv_write(%kv.0, %k, %v, %slots; page_size=64)
  }
  %att: f32[T, 2, 16] = group.attention(%q, %kv.0.new, %positions, %query_start, %context_len, %page_table) {
    %att: f32[T, 2, 16] = attention(%q, %kv.0.new, %positions, %query_start, %context_len, %page_table;
    page_size=64, scale=0.25, window=0)
  }
  %logits: f32[L, 32] = group.gather_rows(%x, %logit_rows) {
    %logits: f32[L, 32] = gather_rows(%x, %logit_rows)
  }
  output %logits
}
"""
SHAPES = {
    "embed": (50, 32),
    "norm": (32,),
    "q": (32, 32),
    "k": (32, 32),
    "v": (32, 32),
    "gate": (40, 32),
    "up": (40, 32),
}
SOURCES = {"embed": torch.bfloat16, "norm": torch.float16, "k": torch.float16}  # the others: float32


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: tensor.to(SOURCES.get(name, torch.float32)) for name, tensor in made.items()}


def checkpoint(folder: Path) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return Checkpoint(folder)


def build(folder: Path, targets: tuple[str, ...] = ("cpu-avx2", "cpu-amx"), **options: object) -> Build:
    """As `emit` leaves it; kernels and libraries are made up."""
    graph = parse(TEXT)
    (folder / "small.py").parent.mkdir(parents=True, exist_ok=True)
    (folder / "small.py").write_text("# a model\n")
    result = Build(
        Options(folder / "small.py", folder, out=folder / "plan.tsp", **options),  # type: ignore[arg-type]
        checkpoint(folder),
        Mesh(),
        graph,
        ModelInfo("small", "SmallForCausalLM", 32, 64, (1, 2), 0, "bf16"),
    )
    for target in targets:
        layouts = {"embed": "rows", "norm": "rows", "qkv": "tiles", "table": "rows", "gate_up": "tiles"}
        steps = graph.groups()
        symbols = {step.name: f"{step.group}_1234" for step in steps}
        buckets = {result.options.max_tokens: Bucket(graph, steps, symbols)}
        made = TargetBuild(target, buckets, layouts, library=b"\x7fELF", compiler="cc 1")
        result.targets[target] = made
    return result
