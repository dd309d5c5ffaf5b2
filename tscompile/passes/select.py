"""select: for each target, each group's kernel and how it is tiled, and each weight's layout.

Takes the fused build.graph and the options' targets (this machine's best if none is named). Gives
build.targets: buckets, layouts, and kernels, a list of `Selected`, one a distinct description. All ranks run
the same kernels, and steps of any number of tokens the same where they do the same; but on a GPU, where
kernels are a list of `GpuKernel`, each bucket of tokens has its own tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tscompile.build import Bucket, Build, Receipt, TargetBuild
from tscompile.costs import sizes
from tscompile.errors import CompileError
from tscompile.inspect import of_any_layer
from tscompile.ir import Group
from tscompile.kernels.desc import KernelDesc
from tscompile.kernels.gpu.lockfile import Lockfile
from tscompile.kernels.gpu.offers import Choice
from tscompile.kernels.gpu.select import decide
from tscompile.kernels.gpu.spec import GpuKernel, Rows
from tscompile.kernels.gpu.target import GpuTarget
from tscompile.kernels.groups import ROWS, describe, layouts_of
from tscompile.kernels.host import best_target
from tscompile.kernels.select import Tiling, choose
from tscompile.kernels.steps import BETWEEN_RANKS, steps_of
from tscompile.kernels.target import Target, find_target


@dataclass(frozen=True)
class Selected:
    """A kernel of one target."""

    desc: KernelDesc
    tiling: Tiling


def run(build: Build) -> None:
    steps = {tokens: steps_of(graph) for tokens, graph in build.buckets.items()}
    lock = Lockfile.read(build.options.kernels_lock) if build.options.kernels_lock else None
    for name in build.options.targets or (best_target(),):
        target = find_target(name)
        if isinstance(target, GpuTarget):
            build.targets[name] = for_gpu(build, steps, target, lock)
        else:
            build.targets[name] = for_cpu(build, steps, target)
    if lock is not None:
        build.notes.append(f"{lock.path}: {len(lock.used)} of {len(lock.entries)} entries are of this build")


def for_cpu(build: Build, steps: dict[int, list[Group]], target: Target) -> TargetBuild:
    """One kernel a description."""
    layouts = layouts_of([step for some in steps.values() for step in some])
    distinct: dict[str, KernelDesc] = {}
    buckets = {}
    for tokens, graph in build.buckets.items():
        descriptions = {step.name: describe(step, layouts) for step in kernels_of(steps[tokens])}
        distinct |= {desc.symbol: desc for desc in descriptions.values()}
        symbols = {step: desc.symbol for step, desc in descriptions.items()}
        buckets[tokens] = Bucket(graph, steps[tokens], symbols)
    selected = [Selected(desc, choose(desc, target)) for desc in distinct.values()]
    return TargetBuild(target.name, buckets, layouts, selected)


def for_gpu(
    build: Build, steps: dict[int, list[Group]], target: GpuTarget, lock: Lockfile | None
) -> TargetBuild:
    """Kernels and grids for steps of 1, 2, 4, ... tokens. CompileError for what no kernel of the target
    does, or what the lockfile says and the target does not have."""
    if build.mesh.num_ranks > 1:
        raise CompileError(
            f"{target.name}: a plan of {build.mesh.num_ranks} ranks ({build.mesh}) needs collectives on the "
            "device, which there are not yet: build it for one rank"
        )
    layouts = layouts_of([step for some in steps.values() for step in some], product=ROWS)
    buckets: dict[int, Bucket] = {}
    distinct: dict[str, GpuKernel] = {}
    for tokens in sizes(build.options.max_tokens):
        of = min(most for most in build.buckets if most >= tokens)
        rows = Rows(tokens, min(tokens, build.options.max_seqs))
        described = {step.name: describe(step, layouts) for step in kernels_of(steps[of])}
        chosen = {desc: decide(desc, target, rows, lock) for desc in dict.fromkeys(described.values())}
        distinct |= {x.kernel.symbol: x.kernel for choice in chosen.values() for x in choice.step.launches}
        device = {name: chosen[desc].step for name, desc in described.items()}
        build.receipts += receipts({name: chosen[desc] for name, desc in described.items()}, target, tokens)
        buckets[tokens] = Bucket(build.buckets[of], steps[of], device=device)
    return TargetBuild(target.name, buckets, layouts, list(distinct.values()))


def receipts(chosen: Mapping[str, Choice], target: GpuTarget, tokens: int) -> list[Receipt]:
    """Of steps whose kernel is not simply the best by the cost model: what else decided."""
    found = {}
    for name, choice in chosen.items():
        if choice.why:
            where = f"{target.name}, steps of up to {tokens} tokens: {of_any_layer(name)}"
            found[where, choice] = Receipt("kernel", where, "", True, f"{choice.config}: {choice.why}")
    return list(found.values())


def kernels_of(steps: list[Group]) -> list[Group]:
    return [step for step in steps if step.group not in BETWEEN_RANKS]
