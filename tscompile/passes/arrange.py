"""arrange: buffers get offsets, and the step becomes a list of launches.

Takes build.targets[t].buckets and build.weights. Gives build.targets[t].program (ARCHITECTURE.md, "The
program"), of one rank and the same for all. A value lives from the launch that makes it to the last that
reads it; values whose lives do not touch may share memory. So a kernel's outputs never lie over its inputs.
What is in flight, and what it is made of, live until that has finished. Buckets share one arena: a step is
one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tscompile.build import Bucket, Build, Options, TargetBuild
from tscompile.cache_groups import cache_groups, windows_of
from tscompile.errors import CompileError, InternalError
from tscompile.ir import DTYPES, Graph, Group, Sym, Value, Weight
from tscompile.kernels.desc import page_elements
from tscompile.kernels.gpu.spec import SCRATCH, GpuStep
from tscompile.kernels.steps import BETWEEN_RANKS, FINISH, launch_fields, stage_of_step, tokens_of
from tscompile.layout import ALIGN, round_up
from tscompile.mesh import by_sequence
from tscompile.ops.base import ints
from tscompile.passes.pack import Packed

LAUNCH_ABI = 2  # csrc/launch_abi.h, TS_LAUNCH_ABI
DEVICE_ABI = 1  # of a GPU target's program and kernels


@dataclass
class Life:
    """A buffer: `value` is alive from launch `first` to launch `last`, both included. offset: set by
    place()."""

    value: Value
    num_bytes: int
    first: int
    last: int
    offset: int = -1

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes

    def meets(self, other: Life) -> bool:
        return self.first <= other.last and other.first <= self.last


def run(build: Build) -> None:
    assert build.model is not None
    limits = limits_of(build.options, build.model.max_context, build.model.vocab_size)
    for target in build.targets.values():
        arena_bytes, lives, buckets = ALIGN, list[Life](), []
        for max_tokens, bucket in target.buckets.items():
            here = lives_of(bucket, limits | {"max_tokens": max_tokens})
            work = work_of(bucket)
            here += work.values()
            needed = place(here)
            check(here, needed)
            arena_bytes = max(arena_bytes, needed)
            at = {id(life.value): index for index, life in enumerate(here, len(lives))}
            lives += here
            between = {key: at[id(life.value)] for key, life in work.items()}
            launches = launches_of(bucket, at, target.target, build.weights, between)
            logits = logits_of(bucket.graph, at)
            buckets.append({"max_tokens": max_tokens, "launches": launches, "logits": logits})
        target.program = {
            "abi": DEVICE_ABI if target.table else LAUNCH_ABI,
            "target": target.target,
            **({"kernels": target.table} if target.table else {}),
            "limits": limits,
            "arena_bytes": arena_bytes,
            "buffers": [{"name": x.value.name, "offset": x.offset, "bytes": x.num_bytes} for x in lives],
            "kv": caches_of(build, target, limits),
            "buckets": buckets,
        }


def caches_of(build: Build, target: TargetBuild, limits: dict[str, int]) -> dict[str, Any]:
    """The program's "kv"."""
    bucket = next(iter(target.buckets.values()))
    states = bucket.graph.states
    groups = cache_groups(
        windows_of(states, layers_of(states, bucket.steps), bucket.steps),
        max_context=limits["max_context"],
        max_tokens=limits["max_tokens"],
        page_size=limits["page_size"],
    )
    group_of = {layer: index for index, group in enumerate(groups) for layer in group.layers}
    return {
        "groups": [group.fields() for group in groups],
        "layers": [group_of[layer] for layer in range(len(states))],
        "page_bytes": page_bytes(build.graph, build.options.page_size),
    }


def limits_of(options: Options, max_context: int, vocab_size: int) -> dict[str, int]:
    """The program's "limits". CompileError for what no step can be made of."""
    if options.page_size < 32 or options.page_size % 32 or options.page_size > 4096:
        raise CompileError(f"page size {options.page_size}: wanted a multiple of 32 up to 4,096")
    if not 1 <= options.max_seqs <= options.max_tokens <= 1 << 20:
        raise CompileError(
            f"max_seqs {options.max_seqs} and max_tokens {options.max_tokens}: wanted 1 <= max_seqs <= "
            "max_tokens <= 2^20, as every sequence of a step has a token"
        )
    return {
        "max_tokens": options.max_tokens,
        "max_seqs": options.max_seqs,
        "max_context": max_context,
        "page_size": options.page_size * options.mesh.num_parts,
        "vocab_size": vocab_size,
    }


def page_bytes(graph: Graph, page_size: int) -> int:
    """One layer's bytes a page; where layers differ the largest's, so that every layer's kernels stay within
    it."""
    sizes = [0]
    for state in graph.states:
        sizes.append(page_elements(ints(state.shape), page_size) * DTYPES[state.dtype])
    if not max(sizes):
        raise CompileError("the model has no attention: nothing in it depends on the context")
    return max(sizes)


def lives_of(bucket: Bucket, limits: dict[str, int]) -> list[Life]:
    """A life for every value that a launch makes and another reads, in order of birth. The graph's outputs
    live to the end."""
    steps, graph = bucket.steps, bucket.graph
    rows = min(limits["max_tokens"], limits["max_seqs"])
    most = {"T": limits["max_tokens"], "S": rows, "L": rows}
    # of tokens by sequence a rank may have all
    most |= {axis: size for axis, size in graph.mesh.axes if not by_sequence(axis)}
    lives: dict[int, Life] = {}
    for index, step in enumerate(steps):
        for value in step.inputs:
            if id(value) in lives:
                lives[id(value)].last = index
        for value in step.outputs:
            if not value.state:
                lives[id(value)] = Life(value, bytes_of(value, most), index, index)
    for value in graph.outputs:
        lives[id(value)].last = len(steps)
    return list(lives.values())


def work_of(bucket: Bucket) -> dict[tuple[str, str], Life]:
    """(step, what its kernels call it) -> what they share, alive in that step alone."""
    found = {}
    for index, step in enumerate(bucket.steps if bucket.device else ()):
        for work in bucket.device[step.name].work if step.name in bucket.device else ():
            value = Value(f"{step.name}.{work.name}", (work.num_bytes // 4,), "f32")
            found[step.name, work.name] = Life(value, work.num_bytes, index, index)
    return found


def bytes_of(value: Value, most: dict[str, int]) -> int:
    """The largest that the value can be."""
    rows = 1
    for dim in value.shape:
        if isinstance(dim, Sym):
            try:
                rows *= dim.size(most)
            except KeyError:
                raise InternalError(f"{value!r} has the dim {dim}, which no limit bounds") from None
    return rows * value.row_elements * DTYPES[value.dtype]


def place(lives: Sequence[Life]) -> int:
    """Sets every offset (a multiple of 64) and returns the arena's bytes. Largest first, each into the
    smallest gap that holds it between those placed before that live at the same time. Ties go by birth, so
    the same graph gives the same offsets."""
    placed: list[Life] = []
    for life in sorted(lives, key=lambda x: -x.num_bytes):
        best, best_gap, end = -1, 0, 0
        for other in sorted((x for x in placed if x.meets(life)), key=lambda x: x.offset):
            gap = other.offset - end
            if life.num_bytes <= gap and (best < 0 or gap < best_gap):
                best, best_gap = end, gap
            end = max(end, round_up(other.end, ALIGN))
        life.offset = best if best >= 0 else end
        placed.append(life)
    return max(round_up(max((x.end for x in lives), default=0), ALIGN), ALIGN)


def check(lives: Sequence[Life], arena_bytes: int) -> None:
    """InternalError unless every buffer is aligned, inside, and apart from all that live with it."""
    for index, life in enumerate(lives):
        if life.offset < 0 or life.offset % ALIGN or life.end > arena_bytes:
            raise InternalError(
                f"{life.value!r} lies at {life.offset} to {life.end} of an arena of {arena_bytes}"
            )
        for other in lives[:index]:
            if life.meets(other) and life.offset < other.end and other.offset < life.end:
                raise InternalError(f"{life.value!r} and {other.value!r} live together and overlap")


def launches_of(
    bucket: Bucket,
    buffers: Mapping[int, int],
    target: str,
    packed: Packed,
    work: Mapping[tuple[str, str], int],
) -> list[dict[str, Any]]:
    """buffers: id(value) -> the index of its buffer; work: likewise what work_of() found."""
    layers = layers_of(bucket.graph.states, bucket.steps)

    def argument(step: Group, value: Value) -> dict[str, Any]:
        if isinstance(value, Weight):
            return packed.find(target, value).argument()
        if value.state:
            return {"kv": layers[id(value)]}
        if id(value) not in buffers:
            raise InternalError(f"{step.name} takes {value!r}, which is no buffer, weight or KV state")
        return {"buffer": buffers[id(value)]}

    launches = []
    for step in bucket.steps:
        taken = step.inputs[:1] if step.group == FINISH else step.launch_args()
        arguments = [argument(step, value) for value in taken]
        stage = {} if (index := stage_of_step(step)) is None else {"stage": index}
        if step.group in BETWEEN_RANKS:
            launches.append({**launch_fields(step), "args": arguments} | stage)
        elif step.name in bucket.device:
            between = {name: index for (of, name), index in work.items() if of == step.name}
            launches += device_launches(step, bucket.device[step.name], arguments, between)
        elif step.name in bucket.symbols:
            tokens = {"tokens": tokens_of(step)} if tokens_of(step) else {}
            launches.append(
                {"kernel": bucket.symbols[step.name], "op": step.name, "args": arguments} | tokens | stage
            )
        else:
            raise InternalError(f"select gave {step.name} no kernel for {target}")
    return launches


def device_launches(
    step: Group, chosen: GpuStep, arguments: Sequence[dict[str, Any]], work: Mapping[str, int]
) -> list[dict[str, Any]]:
    """A launch a kernel, its arguments in the order of its parameters. arguments: those of the step."""
    launches = []
    for launch in chosen.launches:
        kernel = launch.kernel
        found: list[dict[str, Any]] = []
        for param in kernel.params:
            match param.kind:
                case "arg":
                    found.append(arguments[kernel.desc.index(param.name)])
                case "batch":
                    found.append({"batch": param.name})
                case _:
                    found.append({"buffer": work[param.name]})
        found += [{"null": name} for name in SCRATCH]
        launches.append({"kernel": kernel.symbol, "op": step.name, "grid": list(launch.grid), "args": found})
    return launches


def layers_of(states: Sequence[Value], steps: Sequence[Group]) -> dict[int, int]:
    """id(state) -> its layer, for every state that the graph takes or an op gives."""
    layers = {id(state): layer for layer, state in enumerate(states)}
    for step in steps:
        taken = next((layers[id(v)] for v in step.inputs if v.state), None)
        layers.update({id(v): taken for v in step.outputs if v.state and taken is not None})
    return layers


def logits_of(graph: Graph, buffers: Mapping[int, int]) -> dict[str, int]:
    if len(graph.outputs) != 1 or graph.outputs[0].dtype != "f32":
        raise InternalError(f"the graph gives {graph.outputs}, wanted the logits alone, f32")
    return {"buffer": buffers[id(graph.outputs[0])], "stride": graph.outputs[0].row_elements}
