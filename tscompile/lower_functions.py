"""How functions and tensor methods that a model file calls become ops; tscompile/lower.py does modules. Each
lowering takes (builder, the call's own arguments) and returns values.

Values are f32 here; `precision` rounds them later. So casts to float types are nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tscompile.errors import CompileError
from tscompile.ir import Sym, Value
from tscompile.ops.base import text_of
from tscompile.ops.layout import reshape_attr

if TYPE_CHECKING:
    from tscompile.capture import Builder

Operand = Value | int | float


def linear(b: Builder, input: Value, weight: Value, bias: Value | None = None) -> Value:
    out = b.emit("linear", [input, weight])[0]
    return out if bias is None else b.emit("add", [out, bias])[0]


def embedding(
    b: Builder,
    input: Value,
    weight: Value,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    **other: Any,
) -> Value:
    if max_norm is not None:
        raise CompileError("an embedding with max_norm is not supported: it would change its own weight")
    return b.emit("embedding", [input, weight], {"vocab_axis": ""}, name="out")[0]


def rms_norm(
    b: Builder,
    input: Value,
    normalized_shape: Sequence[int],
    weight: Value | None = None,
    eps: float | None = None,
) -> Value:
    if tuple(normalized_shape) != input.shape[-1:]:
        raise CompileError(
            f"rms_norm over {list(normalized_shape)} of {text_of(input.shape)}: wanted the last dim alone"
        )
    if weight is None or eps is None:
        raise CompileError("rms_norm without a weight or without eps is not supported: give both")
    return b.emit("rms_norm", [input, weight], {"eps": float(eps)}, name="normed")[0]


def unary(kind: str) -> Callable[..., Value]:
    def lower(b: Builder, input: Value, inplace: bool = False) -> Value:
        return b.emit(kind, [input])[0]

    return lower


def gelu(b: Builder, input: Value, approximate: str = "none") -> Value:
    if approximate != "tanh":
        raise CompileError('gelu by erf is not supported: gelu(x, approximate="tanh") is')
    return b.emit("gelu_tanh", [input])[0]


def scalar(x: Any) -> float | None:
    return float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else None


def operand(x: Any) -> Value:
    if not isinstance(x, Value):
        raise CompileError(
            f"arithmetic with {type(x).__name__} is not supported: wanted a tensor or a number"
        )
    return x


def add(b: Builder, x: Operand, y: Operand, alpha: float = 1) -> Value:
    if alpha != 1:
        raise CompileError("add with alpha is not supported: multiply first")
    for value, other in ((x, y), (y, x)):
        number = scalar(value)
        if number is not None:
            return b.emit("shift", [operand(other)], {"value": number})[0]
    return b.emit("add", [operand(x), operand(y)])[0]


def sub(b: Builder, x: Operand, y: Operand) -> Value:
    first, second = scalar(x), scalar(y)
    if second is not None:
        return b.emit("shift", [operand(x)], {"value": -second})[0]
    if first is not None:
        return b.emit("shift", b.emit("neg", [operand(y)]), {"value": first})[0]
    return b.emit("sub", [operand(x), operand(y)])[0]


def mul(b: Builder, x: Operand, y: Operand) -> Value:
    for value, other in ((x, y), (y, x)):
        number = scalar(value)
        if number is not None:
            return b.emit("scale", [operand(other)], {"value": number})[0]
    return b.emit("mul", [operand(x), operand(y)])[0]


def div(b: Builder, x: Operand, y: Operand) -> Value:
    number = scalar(y)
    if not number:
        raise CompileError("division is supported by a number other than 0 only")
    return b.emit("scale", [operand(x)], {"value": 1 / number})[0]


def same(b: Builder, x: Value, *args: Any, **kwargs: Any) -> Value:
    return x


def to_float(b: Builder, x: Value, dtype: Any = None, *args: Any, **kwargs: Any) -> Value:
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CompileError(
            f"to({dtype}) is not supported: a model file's values are floats, and the build says which"
        )
    return x


def reshape(b: Builder, x: Value, *shape: Any) -> Value:
    wanted = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else list(shape)
    if not all(isinstance(dim, (int, Sym)) for dim in wanted):
        raise CompileError(f"reshape to {wanted}: wanted ints, or dims of x.shape")
    symbols = [dim for dim in x.shape if isinstance(dim, Sym)]
    count, known, unknown = x.row_elements, 1, [i for i, dim in enumerate(wanted) if dim == -1]
    for dim in wanted:
        known *= dim if isinstance(dim, int) and dim != -1 else 1
    if len(unknown) > 1:
        raise CompileError(f"reshape to {wanted}: at most one -1")
    if unknown:
        # without T among the wanted dims, -1 is T if the rest is the row
        is_symbol = symbols and not any(isinstance(dim, Sym) for dim in wanted)
        inferred: Any = symbols[0] if is_symbol and known == count else count // max(known, 1)
        wanted[unknown[0]] = inferred
    if tuple(wanted) == x.shape:
        return x
    return b.emit("reshape", [x], {"shape": reshape_attr(tuple(wanted))})[0]


def flatten(b: Builder, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    start, end = start_dim % len(x.shape), end_dim % len(x.shape)
    middle = x.shape[start : end + 1]
    if any(isinstance(dim, Sym) for dim in middle) and len(middle) > 1:
        raise CompileError(
            f"flatten of {text_of(x.shape)} from dim {start} to {end}: T must stay a dim of its own"
        )
    product: Any = 1 if middle and isinstance(middle[0], int) else middle[0]
    for dim in middle:
        product = product * dim if isinstance(dim, int) else product
    return reshape(b, x, [*x.shape[:start], product, *x.shape[end + 1 :]])


def unflatten(b: Builder, x: Value, dim: int, sizes: Sequence[int]) -> Value:
    at = dim % len(x.shape)
    old, known = x.shape[at], 1
    if isinstance(old, Sym):
        raise CompileError(f"unflatten of the symbolic dim {old} is not supported")
    for size in sizes:
        known *= size if size != -1 else 1
    filled = [old // known if size == -1 else size for size in sizes]
    return reshape(b, x, [*x.shape[:at], *filled, *x.shape[at + 1 :]])


def last_dim(x: Value, dim: int, what: str) -> int:
    if dim not in (-1, len(x.shape) - 1) or not isinstance(x.shape[-1], int):
        raise CompileError(
            f"{what} along dim {dim} of {text_of(x.shape)} is not supported: only along the last"
        )
    return x.shape[-1]


def split(b: Builder, x: Value, split_size: int | Sequence[int], dim: int = 0) -> list[Value]:
    total = last_dim(x, dim, "split")
    if isinstance(split_size, int):
        step = split_size
        split_size = [min(step, total - start) for start in range(0, total, step)]
    return b.emit("split", [x], {"sizes": tuple(split_size)})


def chunk(b: Builder, x: Value, chunks: int, dim: int = 0) -> list[Value]:
    return split(b, x, -(-last_dim(x, dim, "chunk") // chunks), dim)


def cat(b: Builder, tensors: Sequence[Value], dim: int = 0) -> Value:
    last_dim(tensors[0], dim, "cat")
    return b.emit("concat", list(tensors))[0]


def getitem(b: Builder, x: Value, index: Any) -> Value:
    """x[..., start:stop], or x[:, start:stop] of the last dim."""
    parts = list(index) if isinstance(index, tuple) else [index]
    leading = parts[:-1] == [...] or (
        len(parts) == len(x.shape) and all(p == slice(None) for p in parts[:-1])
    )
    last = parts[-1]
    if not (leading and isinstance(last, slice) and last.step is None and isinstance(x.shape[-1], int)):
        raise CompileError(f"indexing {text_of(x.shape)} like this is not supported: x[..., start:stop] is")
    start, stop, _ = last.indices(x.shape[-1])
    sizes = [start, stop - start, x.shape[-1] - stop]
    kept = [size for size in sizes if size]
    parts_of = b.emit("split", [x], {"sizes": tuple(kept)})
    return parts_of[1 if start else 0]


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    F.embedding: embedding,
    F.rms_norm: rms_norm,
    F.silu: unary("silu"),
    F.relu: unary("relu"),
    F.sigmoid: unary("sigmoid"),
    F.gelu: gelu,
    torch.relu: unary("relu"),
    torch.sigmoid: unary("sigmoid"),
    torch.neg: unary("neg"),
    torch.add: add,
    torch.sub: sub,
    torch.mul: mul,
    torch.div: div,
    torch.reshape: reshape,
    torch.flatten: flatten,
    torch.unflatten: unflatten,
    torch.split: split,
    torch.chunk: chunk,
    torch.cat: cat,
    operator.add: add,
    operator.iadd: add,
    operator.sub: sub,
    operator.isub: sub,
    operator.mul: mul,
    operator.imul: mul,
    operator.truediv: div,
    operator.itruediv: div,
    operator.neg: unary("neg"),
    operator.getitem: getitem,
}
METHODS: dict[str, Callable[..., Any]] = {
    "view": reshape,
    "reshape": reshape,
    "flatten": flatten,
    "unflatten": unflatten,
    "split": split,
    "chunk": chunk,
    "add": add,
    "sub": sub,
    "mul": mul,
    "div": div,
    "neg": unary("neg"),
    "relu": unary("relu"),
    "sigmoid": unary("sigmoid"),
    "contiguous": same,
    "float": same,
    "to": to_float,
}
