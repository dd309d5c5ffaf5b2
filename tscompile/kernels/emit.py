"""Description, configuration and target -> the C++ source of one kernel, from templates/cpu."""

from __future__ import annotations

from functools import cache

from tscompile import resources
from tscompile.kernels.chain import FUNCTIONS
from tscompile.kernels.desc import KernelDesc
from tscompile.kernels.select import Tiling
from tscompile.kernels.target import Target
from tscompile.kernels.templates import environment

TEMPLATES = resources.TEMPLATES / "cpu"


def emit(desc: KernelDesc, tiling: Tiling, target: Target) -> str:
    """The source, self-contained but for the headers of `headers()`. It defines the symbol desc.symbol and
    nothing else visible."""
    template = environment("cpu").get_template(f"{desc.kind}.cpp.j2")
    return template.render(d=desc, t=tiling, target=target, sym=desc.symbol, functions=FUNCTIONS)


@cache
def headers() -> dict[str, str]:
    """What the sources include, by name."""
    files = [*sorted(TEMPLATES.glob("*.h")), resources.LAUNCH_ABI]
    return {path.name: path.read_text() for path in files}
