"""emit: the kernels of each target, from templates to one shared object, or cubins, compiled in parallel and
cached by content.

Takes build.targets[t].kernels. Gives build.targets[t].library and compiler, of a GPU target also table.
"""

from __future__ import annotations

import sys

from tscompile.build import Build, TargetBuild
from tscompile.kernels import build as kernels
from tscompile.kernels.emit import emit, headers
from tscompile.kernels.gpu import build as gpu
from tscompile.kernels.gpu.target import GpuTarget
from tscompile.kernels.target import Target, find_target


def run(build: Build) -> None:
    for made in build.targets.values():
        target = find_target(made.target)
        if isinstance(target, GpuTarget):
            build.notes += for_gpu(made, target)
        else:
            for_cpu(made, target)


def for_cpu(made: TargetBuild, target: Target) -> None:
    compiler = kernels.find_compiler()
    sources = {kernel.desc.symbol: emit(kernel.desc, kernel.tiling, target) for kernel in made.kernels}
    made.library = kernels.build(
        sources,
        headers(),
        target.flags,
        compiler=compiler,
        cache=kernels.cache_folder(),
        progress=_progress(made),
    )
    made.compiler = compiler.version


def for_gpu(made: TargetBuild, target: GpuTarget) -> list[str]:
    """What there is to note."""
    compiled, made.compiler = gpu.compile_all(
        made.kernels, target, cache=kernels.cache_folder(), progress=_progress(made)
    )
    made.library, made.table = gpu.library_of(compiled, target)
    if not any(kernel.randomised for kernel in compiled.values()):
        return []
    return [
        f"{target.name}: this system lets no process turn address randomisation off (personality(2)), so "
        "another build may give other bytes for the same kernels"
    ]


def _progress(made: TargetBuild) -> kernels.Progress:
    """A line that counts, where somebody watches."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(
                f"\r  {made.target}: {done} of {total} kernels",
                end="\n" if done == total else "",
                file=sys.stderr,
            )

    return show
