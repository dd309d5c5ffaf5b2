"""Checks a graph against the registry. Runs after every pass; what it finds is a bug of ours, so it raises
InternalError."""

from __future__ import annotations

from collections.abc import Sequence

from tscompile.errors import InternalError
from tscompile.ir import BATCH_ARRAYS, DTYPES, GROUP_KINDS, Graph, Group, Op, Sym, Value
from tscompile.ops import OpDef, ShapeError, lookup
from tscompile.ops.base import text_of
from tscompile.placement import Shard


def verify(graph: Graph) -> None:
    """Names are unique; every use comes after its definition; every op's types are what its rule says; a
    state is taken once; groups say truly what they take and give; placements fit mesh and shape; what starts
    is finished before another collective begins, and is read by nothing else. InternalError names the
    value."""
    _Verifier(graph).run()


class _Verifier:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.names: set[str] = set()
        self.defined: set[int] = set()
        self.spent: set[int] = set()  # states that an op has updated
        self.flying: Value | None = None  # of the collective that has started and not finished
        self.flown: set[int] = set()  # all that started

    def run(self) -> None:
        graph = self.graph
        for value in graph.inputs:
            self.define(value)
            known = BATCH_ARRAYS.get(value.name)
            if not value.state and known != value.shape:
                raise InternalError(f"{value!r} {text_of(value.shape)} is no batch array")
        for weight in graph.weights:
            self.define(weight)
            if not all(isinstance(dim, int) and dim > 0 for dim in weight.shape):
                raise InternalError(f"{weight!r} has shape {text_of(weight.shape)}: wanted positive ints")
        for op in graph.ops:
            self.group(op) if isinstance(op, Group) else self.op(op)
        self.uses("the output", graph.outputs)
        if self.flying:
            raise InternalError(f"{self.flying!r} starts and does not finish")

    def define(self, value: Value) -> None:
        name = repr(value)
        if name in self.names:
            raise InternalError(f"{name} is defined twice")
        if value.dtype not in DTYPES:
            raise InternalError(f"{name} has dtype {value.dtype!r}")
        if value.placement and len(value.placement) != len(self.graph.mesh.axes):
            raise InternalError(f"{name} has {len(value.placement)} placements on {self.graph.mesh}")
        for placement in value.placement:
            if isinstance(placement, Shard) and not 0 <= placement.dim < len(value.shape):
                raise InternalError(f"{name} {text_of(value.shape)} is placed {placement}")
        for place, dim in enumerate(value.shape):
            over = dim.over if isinstance(dim, Sym) else ()
            cut = [
                axis
                for axis, p in zip(self.graph.mesh.names, value.placement, strict=False)
                if p == Shard(place, "T" if isinstance(dim, Sym) and dim.ragged else "")
            ]
            if over and list(over) != cut:
                raise InternalError(
                    f"{name} has the dim {dim}, but is placed {' '.join(cut) or 'whole'} there"
                )
        self.names.add(name)
        self.defined.add(id(value))

    def uses(self, user: str, values: Sequence[Value]) -> None:
        for value in values:
            if id(value) not in self.defined:
                raise InternalError(f"{user} reads {value!r}, which nothing above it defines")
            if id(value) in self.spent:
                raise InternalError(f"{user} reads {value!r}, a state that an op above it has updated")

    def op(self, op: Op) -> None:
        if not op.outputs:
            raise InternalError(f"an op {op.kind} without outputs")
        definition, what = lookup(op.kind), f"{op.kind} -> {op.outputs[0]!r}"
        self.uses(what, op.inputs)
        more, last = len(op.inputs) - len(definition.inputs), definition.inputs[-1]
        if not (more == 0 or (more > 0 and last.variadic) or (more == -1 and last.optional)):
            raise InternalError(f"{what} has {len(op.inputs)} inputs, wanted {len(definition.inputs)}")
        self.attrs(what, op, definition)
        self.slots(what, op, definition)
        try:
            types = definition.infer(op.inputs, op.attrs)
        except ShapeError as error:
            raise InternalError(f"{what}: {error}") from None
        found = [(v.shape, v.dtype, v.state) for v in op.outputs]
        if found != [tuple(t) for t in types]:
            wanted = ", ".join(f"{t.dtype}{text_of(t.shape)}" for t in types)
            shown = ", ".join(f"{v.dtype}{text_of(v.shape)}" for v in op.outputs)
            raise InternalError(f"{what} gives {shown}, but its rule says {wanted}")
        if any(v.state for v in op.outputs):
            self.spent |= {id(v) for v in op.inputs if v.state}
        for value in op.outputs:
            self.define(value)

    def attrs(self, what: str, op: Op, definition: OpDef) -> None:
        may = {**definition.attrs, **definition.optional}
        if not set(definition.attrs) <= set(op.attrs) <= set(may):
            raise InternalError(f"{what} has attrs {sorted(op.attrs)}, wanted {sorted(definition.attrs)}")
        for key, wanted in may.items():
            if key in op.attrs and type(op.attrs[key]) is not wanted:
                raise InternalError(f"{what}: {key}={op.attrs[key]!r}, wanted {wanted.__name__}")

    def slots(self, what: str, op: Op, definition: OpDef) -> None:
        for index, value in enumerate(op.inputs):
            slot = definition.slot(index)
            allowed = {"storage": ("f32", "bf16"), "state": ("f32", "bf16"), "any": tuple(DTYPES)}
            if value.dtype not in allowed.get(slot.dtype, (slot.dtype,)) or value.state != (
                slot.dtype == "state"
            ):
                raise InternalError(
                    f"{what} takes {value!r} of {value.dtype} as its {slot.name}: wanted {slot.dtype}"
                )
        stored = {
            v.dtype for i, v in enumerate(op.inputs) if definition.slot(i).dtype in ("storage", "state")
        }
        if len(stored) > 1:
            raise InternalError(f"{what} takes operands of {' and '.join(sorted(stored))}: wanted one dtype")

    def group(self, group: Group) -> None:
        what = f"group.{group.group} -> {group.outputs[0]!r}"
        if group.group not in GROUP_KINDS:
            raise InternalError(f"{what}: no such kind of group")
        made = {id(v): v for op in group.body for v in op.outputs}
        read: dict[int, Value] = {}
        for op in group.body:
            read.update({id(v): v for v in op.inputs if id(v) not in made and id(v) not in read})
        if [id(v) for v in group.inputs] != list(read):
            raise InternalError(f"{what} takes {group.inputs}, but its body reads {list(read.values())}")
        if any(id(v) not in made for v in group.outputs):
            raise InternalError(f"{what} gives a value that its body does not make")
        for op in group.body:
            self.op(op)
        self.flight(what, group)
        # inside stays inside
        self.defined -= set(made) - {id(v) for v in group.outputs}

    def flight(self, what: str, group: Group) -> None:
        """Of a collective in two groups: one is in flight at a time, and only its finish reads it."""
        if group.group == "finish":
            if self.flying is None or group.inputs[0] is not self.flying:
                raise InternalError(f"{what} finishes {group.inputs[0]!r}, but {self.flying!r} is in flight")
            self.flying = None
        elif any(id(value) in self.flown for value in group.inputs):
            raise InternalError(f"{what} reads what only a finish may, of {group.inputs}")
        if self.flying and any(lookup(op.kind).exchanges for op in group.body):
            raise InternalError(f"{what} begins while {self.flying!r} is in flight")
        if group.group == "start":
            (self.flying,) = group.outputs
            self.flown.add(id(self.flying))
