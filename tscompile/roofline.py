"""What each kernel of a GPU target can take at best, for the plan: `tsp/roofline`. Nothing here is measured.

    {TARGET: {"context": tokens, "buckets": [{"max_tokens", "steps": [{"op", "count", "kernels", "flops",
    "bytes", "blocks", "blocks_per_sm", "occupancy_percent", "waves", "bound", "ns"}, ...]}, ...]}}

FLOPs are those of the registry; bytes count each value that is taken or given once, as if caches held what is
read again. ns: the longer of products at the tensor cores' peak and of bytes
at the memory's, of the target's topology. blocks to waves are of the step's first kernel: how many thread
blocks it has, how many fit a multiprocessor by threads, registers and shared memory, which share of its
threads they fill, and how often all of them are filled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tscompile.build import Bucket, Build
from tscompile.inspect import alike, of_any_layer
from tscompile.ir import Group, Weight
from tscompile.kernels.gpu.spec import GpuStep
from tscompile.kernels.gpu.target import GPU_TARGETS, GpuTarget
from tscompile.layout import round_up
from tscompile.ops import lookup
from tscompile.ops.base import elements, num_bytes, size_of
from tscompile.price import Prices
from tscompile.topology import topology_of

CONTEXT = 1024  # tokens that each sequence of a step has behind it


def roofline(build: Build) -> dict[str, Any]:
    """The entry's content; empty without a GPU target."""
    return {
        name: {
            "context": CONTEXT,
            "buckets": [
                {"max_tokens": tokens, "steps": alike(rows(bucket, tokens, made.table, build, name))}
                for tokens, bucket in made.buckets.items()
            ],
        }
        for name, made in build.targets.items()
        if name in GPU_TARGETS
    }


def rows(
    bucket: Bucket, tokens: int, table: Mapping[str, Any], build: Build, target: str
) -> Iterator[dict[str, Any]]:
    """A row a step of the bucket, in steps as large as it."""
    machine = topology_of(target)
    sizes = dict(Prices.of(target, tokens, build.options.max_seqs, CONTEXT).sizes)
    for step in bucket.steps:
        chosen = bucket.device[step.name]
        flops, moved = work_of(step, sizes)
        computing, reading = flops / machine.flops_per_s["bf16"], moved / machine.read_bytes_per_s
        yield {
            "op": of_any_layer(step.name),
            "kernels": [launch.kernel.symbol for launch in chosen.launches],
            "flops": flops,
            "bytes": moved,
            **occupancy(chosen, table, GPU_TARGETS[target]),
            "bound": "products" if computing > reading else "memory",
            "ns": round(max(computing, reading) * 1e9),
        }


def work_of(step: Group, sizes: Mapping[str, int]) -> tuple[int, int]:
    """(FLOPs, bytes) of a step: what it takes and gives, once; of KV caches what its ops say, and of a table
    that an op takes beside numbers, a row a number, and no more than its op says."""
    flops = moved = 0
    tables: set[int] = set()
    for op in step.body:
        definition = lookup(op.kind)
        flops += definition.flops(op.inputs, op.outputs, op.attrs, sizes)
        if any(v.state for v in op.inputs):
            touched = definition.bytes(op.inputs, op.outputs, op.attrs, sizes)
            rest = [v for v in (*op.inputs, *op.outputs) if v.dtype != "i32"]
            moved += max(0, touched - num_bytes(rest, sizes))
        for index in (v for v in op.inputs if v.dtype == "i32"):
            for table in (v for v in op.inputs if isinstance(v, Weight) and id(v) not in tables):
                row = num_bytes([table], sizes) // size_of(table.shape[0], sizes)
                others = [v for v in (*op.inputs, *op.outputs) if v.dtype != "i32" and v is not table]
                said = definition.bytes(op.inputs, op.outputs, op.attrs, sizes) - num_bytes(others, sizes)
                moved += min(elements(index.shape, sizes) * row, num_bytes([table], sizes), max(0, said))
                tables.add(id(table))
    whole = [v for v in (*step.inputs, *step.outputs) if id(v) not in tables]
    return flops, moved + num_bytes(whole, sizes)


def occupancy(chosen: GpuStep, table: Mapping[str, Any], target: GpuTarget) -> dict[str, int]:
    launch = chosen.launches[0]
    kernel = table[launch.kernel.symbol]
    warps = kernel["threads"] // target.warp
    registers = warps * round_up(target.warp * kernel["registers"], target.register_unit)
    shared = max(1, kernel["shared_bytes"] + target.shared_reserved)
    fit = min(
        target.sm_blocks,
        target.sm_threads // kernel["threads"],
        target.sm_registers // registers,
        target.sm_shared_bytes // shared,
    )
    x, y, z = launch.grid
    return {
        "blocks": x * y * z,
        "blocks_per_sm": fit,
        "occupancy_percent": 100 * fit * kernel["threads"] // target.sm_threads,
        "waves": -(-x * y * z // (fit * target.num_sms)),
    }
