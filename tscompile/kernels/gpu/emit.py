"""Kernel -> the Python source of its Triton function, from templates/triton."""

from __future__ import annotations

from functools import cache

import jinja2

from tscompile.kernels.desc import padded_head
from tscompile.kernels.gpu.spec import GpuKernel
from tscompile.kernels.templates import environment
from tscompile.layout import stored_shape

# operation of an elementwise kernel -> its Triton, of operands and constant
FUNCTIONS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "scale": "{0} * {value}",
    "shift": "{0} + {value}",
    "neg": "-{0}",
    "silu": "{0} / (1.0 + tl.exp(-{0}))",
    "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))",
    "relu": "tl.maximum({0}, 0.0)",
    "gelu_tanh": "{0} / (1.0 + tl.exp(-1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0})))",
    "cast_bf16": "{0}.to(tl.bfloat16).to(tl.float32)",
}


def emit(kernel: GpuKernel, *, interpret: bool = False, dependent_launch: bool = True) -> str:
    """The source: one function of the name kernel.symbol, which takes kernel.params. interpret: for Triton's
    interpreter instead of its compiler. dependent_launch: whether the target has programmatic dependent
    launch."""
    aliases = [f"{role} = {arg.roles[0]}" for arg in kernel.desc.args for role in arg.roles[1:]]
    return (
        _environment()
        .get_template(f"{kernel.template}.py.j2")
        .render(
            d=kernel.desc,
            t=dict(kernel.config.values),
            sym=kernel.symbol,
            params=", ".join(param.name for param in kernel.params),
            aliases=aliases,
            functions=FUNCTIONS,
            interpret=interpret,
            dependent_launch=dependent_launch and not interpret,
        )
    )


def _stored_row(dtype: str, width: int) -> int:
    """Elements from one row of a weight to the next, as it lies in the plan."""
    return stored_shape("rows", dtype, (width,))[-1]


@cache
def _environment() -> jinja2.Environment:
    found = environment("triton")
    found.globals |= {"stored_row": _stored_row, "padded_head": padded_head}
    return found
