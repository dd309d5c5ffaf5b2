"""emit: the kernels of each target, from templates to one shared object, compiled in parallel and cached by
content.

Takes build.targets[t].kernels. Gives build.targets[t].library and compiler.
"""

from __future__ import annotations

import sys

from tscompile.build import Build, TargetBuild
from tscompile.kernels import build as kernels
from tscompile.kernels.emit import emit, headers
from tscompile.kernels.target import find_target


def run(build: Build) -> None:
    compiler = kernels.find_compiler()
    for made in build.targets.values():
        target = find_target(made.target)
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
