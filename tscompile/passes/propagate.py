"""propagate: nothing to do on one rank."""

from __future__ import annotations

from tscompile.build import Build
from tscompile.errors import CompileError


def run(build: Build) -> None:
    if build.mesh.num_ranks > 1:
        raise CompileError(f"{build.mesh}: more than one rank is not supported yet")
