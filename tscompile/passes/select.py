"""select: for each target, each group's kernel and how it is tiled, and each weight's layout.

Takes the fused build.graph and the options' targets (this machine's best if none is named). Gives
build.targets: buckets, layouts, and kernels, a list of `Selected`, one a distinct description. All ranks run
the same kernels, and steps of any number of tokens the same where they do the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from tscompile.build import Bucket, Build, TargetBuild
from tscompile.kernels.desc import KernelDesc
from tscompile.kernels.groups import describe, layouts_of
from tscompile.kernels.host import best_target
from tscompile.kernels.select import Tiling, choose
from tscompile.kernels.steps import BETWEEN_RANKS, steps_of
from tscompile.kernels.target import find_target


@dataclass(frozen=True)
class Selected:
    """A kernel of one target."""

    desc: KernelDesc
    tiling: Tiling


def run(build: Build) -> None:
    steps = {tokens: steps_of(graph) for tokens, graph in build.buckets.items()}
    layouts = layouts_of([step for some in steps.values() for step in some])
    distinct: dict[str, KernelDesc] = {}
    buckets = {}
    for tokens, graph in build.buckets.items():
        kernels = [step for step in steps[tokens] if step.group not in BETWEEN_RANKS]
        descriptions = {step.name: describe(step, layouts) for step in kernels}
        distinct |= {desc.symbol: desc for desc in descriptions.values()}
        symbols = {step: desc.symbol for step, desc in descriptions.items()}
        buckets[tokens] = Bucket(graph, steps[tokens], symbols)
    for name in build.options.targets or (best_target(),):
        target = find_target(name)
        selected = [Selected(desc, choose(desc, target)) for desc in distinct.values()]
        build.targets[name] = TargetBuild(name, dict(buckets), dict(layouts), selected)
