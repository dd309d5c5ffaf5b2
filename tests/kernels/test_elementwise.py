"""elementwise: groups of any shape of graph, against the registry's references in torch; bit for bit across
targets and threads."""

from __future__ import annotations

from collections.abc import Callable

import kernel_arrays as arrays
import numpy as np
import pytest
import torch
from kernel_harness import BASE, DESCS, VARIANTS, Buffer, Variant, call, desc

from tscompile.ir import Attr, Group, Op, Sym, Value, Weight, unique
from tscompile.kernels.chain import FUNCTIONS
from tscompile.kernels.groups import describe
from tscompile.mesh import Mesh
from tscompile.ops import REGISTRY, lookup
from tscompile.ops.base import RankContext
from tscompile.ops.elementwise import TORCH_DTYPES
from tscompile.recipe import Checkpoint

T, ROWS = Sym("T"), 5


class Body:
    """Builds a group's body."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def value(self, *shape: int, dtype: str = "f32") -> Value:
        return Value(f"v{id(object())}", (T, *shape), dtype)

    def weight(self, *shape: int) -> Weight:
        return Weight("w", shape, "f32", recipe=Checkpoint("w"))

    def op(self, kind: str, *inputs: Value, **attrs: Attr) -> list[Value]:
        types = lookup(kind).infer(inputs, attrs)
        outputs = [Value(f"{kind}{len(self.ops)}.{i}", t.shape, t.dtype) for i, t in enumerate(types)]
        self.ops.append(Op(kind, list(inputs), outputs, attrs))
        return outputs

    def group(self, *outputs: Value) -> Group:
        made = {id(v) for op in self.ops for v in op.outputs}
        inputs = unique([v for op in self.ops for v in op.inputs if id(v) not in made])
        return Group("group", inputs, list(outputs), group="elementwise", body=self.ops)


def swiglu(b: Body) -> Group:
    """A merged projection that no pattern took: silu of one half times the other."""
    (gate, up) = b.op("split", b.value(74), sizes=(37, 37))
    return b.group(*b.op("mul", *b.op("silu", gate), up))


def heads(b: Body) -> Group:
    """Parts of each head, put together the other way round, scaled by a weight that repeats."""
    x = b.value(3, 40)
    (first, last) = b.op("split", x, sizes=(16, 24))
    (joined,) = b.op("concat", *b.op("neg", last), first)
    return b.group(*b.op("mul", joined, b.weight(40)))


def reshaped(b: Body) -> Group:
    (rows,) = b.op("reshape", b.value(6, 20), shape=(-1, 4, 30))
    (_, part) = b.op("split", rows, sizes=(13, 17))
    (cast,) = b.op("cast", *b.op("add", part, b.weight(4, 17)), to="bf16")
    return b.group(*b.op("reshape", cast, shape=(-1, 68)))


def two_outputs(b: Body) -> Group:
    x, y = b.value(50), b.value(50)
    (total,) = b.op("add", x, y)
    (less,) = b.op("sub", total, *b.op("scale", y, value=0.3))
    (narrow,) = b.op("cast", total, to="bf16")
    return b.group(less, narrow)


def everything(b: Body) -> Group:
    (x,) = b.op("shift", *b.op("scale", b.value(33), value=1.5), value=-0.25)
    (y,) = b.op("sigmoid", *b.op("gelu_tanh", x))
    (z,) = b.op("relu", *b.op("neg", y))
    (once,) = b.op("cast", *b.op("cast", x, to="bf16"), to="f32")
    return b.group(*b.op("add", *b.op("mul", once, once), *b.op("add", z, y)))


def scalar(b: Body) -> Group:
    """A single element for all, and a leaf that is read at two places."""
    x = b.value(32, 1)
    (scaled,) = b.op("mul", x, b.weight(1))
    (left, _) = b.op("split", *b.op("reshape", scaled, shape=(-1, 32)), sizes=(31, 1))
    (_, right) = b.op("split", *b.op("reshape", x, shape=(-1, 32)), sizes=(1, 31))
    return b.group(*b.op("mul", left, right))


def copied(b: Body) -> Group:
    (y,) = b.op("concat", b.value(7), b.value(20), b.value(7, dtype="f32"))
    return b.group(y)


MAKERS = (swiglu, heads, reshaped, two_outputs, everything, scalar, copied)
GROUPS = {make.__name__: make(Body()) for make in MAKERS}
CASES = [desc(f"elementwise-{name}", describe(group, {})) for name, group in GROUPS.items()]


def reference(group: Group, inputs: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    values, context = dict(inputs), RankContext(Mesh(), 0)
    for op in group.body:
        run = lookup(op.kind).reference
        assert run is not None
        attrs = {
            key: (ROWS, *x[1:]) if key == "shape" and isinstance(x, tuple) else x
            for key, x in op.attrs.items()
        }
        found = run(context, [values[id(v)] for v in op.inputs], attrs)
        values.update({id(v): x for v, x in zip(op.outputs, found, strict=True)})
    return [values[id(v)] for v in group.outputs]


@pytest.mark.parametrize("name", GROUPS)
def test_equals_reference(name: str) -> None:
    group, kernel = GROUPS[name], f"elementwise-{name}"
    generator = torch.Generator().manual_seed(1)
    inputs = {
        id(v): torch.randn([ROWS if isinstance(d, Sym) else d for d in v.shape], generator=generator).to(
            TORCH_DTYPES[v.dtype]
        )
        for v in group.inputs
    }
    wanted = reference(group, inputs)
    run = runner(kernel, group, inputs)
    base = run(BASE, 1)
    for found, expected, output in zip(base, wanted, group.outputs, strict=True):
        y = expected.float().numpy().reshape(ROWS, -1)
        slack = 2.0**-8 if output.dtype == "bf16" else 2e-6
        assert (np.abs(arrays.values(found, output.dtype) - y) <= slack * (1 + np.abs(y))).all()
    for variant in VARIANTS:
        for threads in (1, 2, 3, 7):
            found = run(variant, threads)
            assert [x.tobytes() for x in found] == [x.tobytes() for x in base], (
                f"{variant}, {threads} threads"
            )


def runner(
    kernel: str, group: Group, inputs: dict[int, torch.Tensor]
) -> Callable[[Variant, int], list[np.ndarray]]:
    def run(variant: Variant, threads: int) -> list[np.ndarray]:
        arguments = {}
        for i, value in enumerate(group.inputs):
            data = inputs[id(value)].numpy()
            stored = arrays.padded_rows(data) if isinstance(value, Weight) else data
            arguments[f"a{i}"] = Buffer(stored.shape, np.float32, stored)
        outputs = [Buffer((ROWS, v.row_elements), arrays.STORED[v.dtype]) for v in group.outputs]
        arguments.update({f"y{i}": out for i, out in enumerate(outputs)})
        call(kernel, variant, {"num_tokens": ROWS}, arguments, threads)
        return [out.array for out in outputs]

    return run


def test_every_elementwise_op_has_a_function() -> None:
    ops = {name for name, definition in REGISTRY.items() if definition.elementwise} - {"cast"}
    assert ops <= set(FUNCTIONS)


def test_equal_groups_are_one_kernel() -> None:
    assert describe(swiglu(Body()), {}) == DESCS["elementwise-swiglu"]
    assert describe(heads(Body()), {}).symbol != DESCS["elementwise-swiglu"].symbol
