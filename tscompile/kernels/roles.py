"""What describing a group needs: its ops by kind, and each of its values' role in the kernel."""

from __future__ import annotations

from dataclasses import replace

from tscompile.errors import InternalError
from tscompile.ir import BATCH_ARRAYS, Group, Op, Sym, Value, Weight
from tscompile.kernels.desc import Arg


class Roles:
    """Collects what each of a group's values is to the kernel."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.roles: dict[int, list[str]] = {}
        self.reshaped = {id(op.outputs[0]): op.inputs[0] for op in group.body if op.kind == "reshape"}

    def origin(self, value: Value) -> Value:
        """The value before reshapes in the body."""
        while id(value) in self.reshaped:
            value = self.reshaped[id(value)]
        return value

    def add(self, role: str, value: Value) -> None:
        """The kernel reads `value`, which a reshape in the body may have made."""
        self.roles.setdefault(id(self.origin(value)), []).append(role)

    def give(self, role: str, value: Value) -> None:
        """The kernel writes `value`."""
        self.roles.setdefault(id(value), []).append(role)

    def args(self) -> tuple[Arg, ...]:
        """In the order of ts_args.ptr."""
        outputs = {id(v) for v in self.group.outputs}
        result = []
        for value in self.group.launch_args():
            if id(value) not in self.roles:
                raise InternalError(
                    f"{self.group.name}: {value!r} has no role in a kernel of kind {self.group.group}"
                )
            kind = "kv" if value.state else "weight" if isinstance(value, Weight) else "buffer"
            result.append(Arg(tuple(self.roles[id(value)]), kind, value.state or id(value) in outputs))
        return tuple(result)


def only(group: Group, kind: str) -> Op:
    ops = [op for op in group.body if op.kind == kind]
    if len(ops) != 1:
        raise InternalError(f"{group.name}: {len(ops)} ops {kind} in a group {group.group}, wanted one")
    return ops[0]


def maybe(group: Group, kind: str) -> Op | None:
    return only(group, kind) if any(op.kind == kind for op in group.body) else None


def result(group: Group) -> Value:
    """The one output that is a buffer."""
    buffers = [v for v in group.outputs if not v.state]
    if len(buffers) != 1:
        raise InternalError(f"{group.name} gives {buffers}, wanted one value")
    return buffers[0]


def rows_of(value: Value) -> str:
    """Which of the batch's sizes the value's leading dim is; of its rank's part of the batch, where tokens
    are sharded."""
    dim = value.shape[0]
    if not isinstance(dim, Sym) or replace(dim, over=()) not in (Sym("T"), Sym("L")):
        raise InternalError(f"{value!r} has rows of {dim}, wanted T or L")
    return dim.name


def is_constant(value: Value) -> bool:
    """A weight, or made of weights alone: the same for every row of the batch."""
    return not any(isinstance(dim, Sym) for dim in value.shape)


def known(dim: object) -> int:
    assert isinstance(dim, int), dim
    return dim


def batch_array(group: Group, value: Value, wanted: tuple[str, ...]) -> str:
    if value.name not in BATCH_ARRAYS or value.name not in wanted:
        raise InternalError(f"{group.name} takes its indices from {value!r}, wanted {' or '.join(wanted)}")
    return value.name
