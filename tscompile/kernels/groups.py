"""A group of the fused graph -> the description of its kernel. One function a group kind; each reads the
constants off the body."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tscompile.errors import InternalError
from tscompile.ir import BATCH_ARRAYS, Group, Op, Sym, Value, Weight
from tscompile.kernels import desc
from tscompile.kernels.chain import segments_of
from tscompile.kernels.desc import Arg, KernelDesc
from tscompile.kernels.steps import coordinate_of
from tscompile.ops.base import integer, number

TILES = "tiles"
ROWS = "rows"
# group kind -> its op that takes a weight in tiles, last
PRODUCTS = {"linear": "linear", "head_linear": "head_linear", "experts": "expert_linear"}


def layouts_of(groups: list[Group]) -> dict[str, str]:
    """Weight -> how its kernels read it (tscompile/layout.py): tiles if a linear multiplies by it, else
    rows."""
    layouts: dict[str, str] = {}
    for group in groups:
        for value in group.inputs:
            if isinstance(value, Weight):
                layouts.setdefault(value.name, ROWS)
        if group.group in PRODUCTS:
            layouts[_only(group, PRODUCTS[group.group]).inputs[-1].name] = TILES
    for group in groups:
        others = [] if group.group in (*PRODUCTS, "embed") else group.inputs
        for value in others:
            if layouts.get(value.name) == TILES and isinstance(value, Weight):
                raise InternalError(
                    f"{value!r} lies in tiles for a linear; {group.name} reads its rows: wanted two"
                )
    return layouts


def describe(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    """The kernel of `group`. InternalError if its body is not what its kind says: `fuse` made it."""
    if group.group not in _DESCRIBERS:
        raise InternalError(f"no kernel for the group {group.name} of kind {group.group}")
    return _DESCRIBERS[group.group](group, layouts)


class _Roles:
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


def _only(group: Group, kind: str) -> Op:
    ops = [op for op in group.body if op.kind == kind]
    if len(ops) != 1:
        raise InternalError(f"{group.name}: {len(ops)} ops {kind} in a group {group.group}, wanted one")
    return ops[0]


def _maybe(group: Group, kind: str) -> Op | None:
    return _only(group, kind) if any(op.kind == kind for op in group.body) else None


def _result(group: Group) -> Value:
    """The one output that is a buffer."""
    buffers = [v for v in group.outputs if not v.state]
    if len(buffers) != 1:
        raise InternalError(f"{group.name} gives {buffers}, wanted one value")
    return buffers[0]


def _rows(value: Value) -> str:
    """Which of the batch's sizes the value's leading dim is."""
    dim = value.shape[0]
    if not isinstance(dim, Sym) or dim.name not in ("T", "L") or dim.plus:
        raise InternalError(f"{value!r} has rows of {dim}, wanted T or L")
    return dim.name


def _is_constant(value: Value) -> bool:
    """A weight, or made of weights alone: the same for every row of the batch."""
    return not any(isinstance(dim, Sym) for dim in value.shape)


def _int(dim: object) -> int:
    assert isinstance(dim, int), dim
    return dim


def _batch_array(group: Group, value: Value, wanted: tuple[str, ...]) -> str:
    if value.name not in BATCH_ARRAYS or value.name not in wanted:
        raise InternalError(f"{group.name} takes its indices from {value!r}, wanted {' or '.join(wanted)}")
    return value.name


def _embed(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles = _only(group, "embedding"), _Roles(group)
    ids = _batch_array(group, op.inputs[0], ("token_ids", "positions"))
    roles.add("table", op.inputs[1])
    coordinate = coordinate_of(group)
    if coordinate:
        roles.add("rank", coordinate)
    roles.give("out", _result(group))
    table = op.inputs[1]
    rows = _int(table.shape[0]) if coordinate else 0
    layout = layouts.get(table.name, ROWS)
    return desc.Embed(roles.args(), ids, _int(table.shape[1]), table.dtype, layout, rows)


def _rms_norm(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, add, roles = _only(group, "rms_norm"), _maybe(group, "add"), _Roles(group)
    cast = _maybe(group, "cast")
    out = (cast or op).outputs[0]
    if add:
        roles.add("x", add.inputs[0])
        roles.add("delta", add.inputs[1])
        if any(v is add.outputs[0] for v in group.outputs):
            roles.give("sum", add.outputs[0])
    else:
        roles.add("x", op.inputs[0])
    roles.add("weight", op.inputs[1])
    for value in group.outputs:
        if not (add and value is add.outputs[0]):
            roles.give("out", value)
    width = _int(op.inputs[0].shape[-1])
    heads = op.inputs[0].row_elements // width
    return desc.RmsNorm(roles.args(), _rows(op.inputs[0]), heads, width, number(op.attrs, "eps"), out.dtype)


def _linear(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, gather, add, roles = (
        _only(group, "linear"),
        _maybe(group, "gather_rows"),
        _maybe(group, "add"),
        _Roles(group),
    )
    swiglu, x, weight, out = _maybe(group, "swiglu"), op.inputs[0], op.inputs[1], _result(group)
    n, k = _int(weight.shape[0]), _int(weight.shape[1])
    if gather:
        _batch_array(group, gather.inputs[1], ("logit_rows",))
        if roles.origin(x) is not gather.outputs[0]:
            raise InternalError(f"{group.name}: what is gathered is not what is multiplied")
    roles.add("x", gather.inputs[0] if gather else x)
    roles.add("weight", weight)
    bias = None
    if add:
        bias = next((v for v in add.inputs if isinstance(v, Weight)), None)
        if bias is None or len(bias.shape) != 1 or (swiglu and bias.shape != (n,)):
            raise InternalError(f"{group.name}: adds {add.inputs}, wanted a bias of {n}")
        roles.add("bias", bias)
    roles.give("out", out)
    length = _int(bias.shape[0]) if bias else 0
    width = integer(swiglu.attrs, "width") if swiglu else 0
    fold = x.row_elements // k
    return desc.Linear(
        roles.args(), _rows(out), gather is not None, fold, k, n, weight.dtype, length, width, out.dtype
    )


def _qkv_write(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    split, write, roles = _only(group, "split"), _only(group, "kv_write"), _Roles(group)
    state, q = write.inputs[0], _result(group)
    heads, kv_heads, head_dim = (
        q.row_elements // _int(state.shape[1]),
        _int(state.shape[0]),
        _int(state.shape[1]),
    )
    roles.add("qkv", split.inputs[0])
    roles.add("kv", state)
    roles.give("q", q)
    part = {id(value): name for value, name in zip(split.outputs, "qkv", strict=True)}
    eps, rotary, interleaved = {"q": 0.0, "k": 0.0}, 0, set[bool]()
    for op in group.body:
        name = part.get(id(op.inputs[0]), "")
        if op.kind in ("reshape", "cast", "rms_norm", "rope"):
            part[id(op.outputs[0])] = name
        if op.kind == "rms_norm":
            eps[name] = number(op.attrs, "eps")
            roles.add(f"{name}_norm", op.inputs[1])
        if op.kind == "rope":
            rotary = _int(op.inputs[1].shape[1])
            interleaved.add(bool(op.attrs["interleaved"]))
            if "table" not in roles.roles.get(id(op.inputs[1]), []):
                roles.add("table", op.inputs[1])
    rotated = [part[id(op.inputs[0])] for op in group.body if op.kind == "rope"]
    fits = (
        [part.get(id(v)) for v in (q, *write.inputs[1:3])] == ["q", "k", "v"]
        and set(eps) == {"q", "k"}
        and rotated in ([], ["q", "k"], ["k", "q"])
        and len(interleaved) <= 1
        and split.inputs[0].row_elements == (heads + 2 * kv_heads) * head_dim
    )
    if not fits:
        raise InternalError(f"{group.name}: q, k and v do not take the way that qkv_write computes")
    page_size = integer(write.attrs, "page_size")
    return desc.QkvWrite(
        roles.args(),
        heads,
        kv_heads,
        head_dim,
        eps["q"],
        eps["k"],
        rotary,
        interleaved == {True},
        state.dtype,
        page_size,
    )


def _attention(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles, out = _only(group, "attention"), _Roles(group), _result(group)
    q, state = op.inputs[0], op.inputs[1]
    roles.add("q", q)
    roles.add("kv", state)
    roles.give("out", out)
    return desc.Attention(
        roles.args(),
        _int(op.outputs[0].shape[1]),
        _int(state.shape[0]),
        _int(state.shape[1]),
        state.dtype,
        integer(op.attrs, "page_size"),
        number(op.attrs, "scale"),
        integer(op.attrs, "window"),
        out.dtype,
    )


def _head_linear(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, rope, roles, out = _only(group, "head_linear"), _maybe(group, "rope"), _Roles(group), _result(group)
    x, weight = op.inputs
    heads, n, k = (_int(dim) for dim in weight.shape)
    rotary, interleaved = _tail(group, rope, op.outputs[0])
    if rope:
        x = _only(group, "split").inputs[0]
    roles.add("x", x)
    roles.add("weight", weight)
    if rope:
        roles.add("table", rope.inputs[1])
    roles.give("out", out)
    return desc.HeadLinear(
        roles.args(), heads, k, n, rotary, interleaved, roles.origin(x).dtype, weight.dtype, out.dtype
    )


def _latent_write(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, cast, roles = _only(group, "latent_write"), _maybe(group, "cast"), _Roles(group)
    norm, rope = _maybe(group, "rms_norm"), _maybe(group, "rope")
    state, row = op.inputs[0], roles.origin(cast.inputs[0] if cast else op.inputs[1])
    rotary, interleaved = _tail(group, rope, norm.outputs[0] if norm else row)
    roles.add("kv", state)
    if norm and rope:
        row = _only(group, "split").inputs[0]
        roles.add("norm", norm.inputs[1])
        roles.add("table", rope.inputs[1])
    roles.add("row", row)
    return desc.LatentWrite(
        roles.args(),
        _int(state.shape[0]),
        number(norm.attrs, "eps") if norm else 0.0,
        rotary,
        interleaved,
        row.dtype,
        state.dtype,
        integer(op.attrs, "page_size"),
    )


def _tail(group: Group, rope: Op | None, head: Value) -> tuple[int, bool]:
    """(rotary, interleaved) of a group that computes `head` from the first part of a split, rotates the
    second and puts them together again; (0, False) if it does not rotate."""
    if rope is None:
        return 0, False
    split, concat, roles = _only(group, "split"), _only(group, "concat"), _Roles(group)
    rotary = _int(rope.inputs[1].shape[1])
    parts = [roles.origin(value) for value in concat.inputs]
    fits = (
        parts == [head, rope.outputs[0]]
        and roles.origin(rope.inputs[0]) is split.outputs[1]
        and len(split.outputs) == 2
        and split.outputs[1].shape[-1] == rotary
    )
    if not fits:
        raise InternalError(f"{group.name}: its parts do not take the way that the kernel computes")
    return rotary, bool(rope.attrs["interleaved"])


def _latent_attention(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles, out = _only(group, "latent_attention"), _Roles(group), _result(group)
    q, state = op.inputs[0], op.inputs[1]
    roles.add("q", q)
    roles.add("kv", state)
    roles.give("out", out)
    return desc.LatentAttention(
        roles.args(),
        _int(q.shape[1]),
        _int(state.shape[0]),
        integer(op.attrs, "rank"),
        state.dtype,
        integer(op.attrs, "page_size"),
        number(op.attrs, "scale"),
        out.dtype,
    )


def _gather_rows(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles = _only(group, "gather_rows"), _Roles(group)
    _batch_array(group, op.inputs[1], ("logit_rows",))
    roles.add("x", op.inputs[0])
    roles.give("out", _result(group))
    return desc.GatherRows(roles.args(), op.inputs[0].row_elements, op.inputs[0].dtype)


def _rope(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles, out = _only(group, "rope"), _Roles(group), _result(group)
    x, table = op.inputs[0], op.inputs[1]
    roles.add("x", x)
    roles.add("table", table)
    roles.give("out", out)
    return desc.Rope(
        roles.args(),
        _int(x.shape[1]),
        _int(x.shape[2]),
        _int(table.shape[1]),
        bool(op.attrs["interleaved"]),
        out.dtype,
    )


def _kv_write(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles = _only(group, "kv_write"), _Roles(group)
    cast = {id(o.outputs[0]): o.inputs[0] for o in group.body if o.kind == "cast"}
    sources = []
    roles.add("kv", op.inputs[0])
    for role, value in zip(("k", "v"), op.inputs[1:3], strict=True):
        source = roles.origin(value)
        source = roles.origin(cast.get(id(source), source))
        roles.add(role, source)
        sources.append(source)
    state = op.inputs[0]
    k, v = sources
    page_size = integer(op.attrs, "page_size")
    return desc.KvWrite(
        roles.args(), _int(state.shape[0]), _int(state.shape[1]), k.dtype, v.dtype, state.dtype, page_size
    )


def _route(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles = _only(group, "route"), _Roles(group)
    for role, value in zip(("logits", "bias"), op.inputs, strict=False):
        roles.add(role, value)
    for role, value in zip(("ids", "weights"), op.outputs, strict=True):
        roles.give(role, value)
    k, groups, kept = (integer(op.attrs, name) for name in ("k", "groups", "kept"))
    return desc.Route(
        roles.args(),
        _int(op.inputs[0].shape[1]),
        k,
        str(op.attrs["scores"]),
        bool(op.attrs["normalize"]),
        number(op.attrs, "scale"),
        groups,
        kept,
    )


def _sort_routes(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles = _only(group, "sort_routes"), _Roles(group)
    for role, value in zip(("ids", "numbers"), op.inputs, strict=True):
        roles.add(role, value)
    for role, value in zip(("order", "counts"), op.outputs, strict=True):
        roles.give(role, value)
    return desc.SortRoutes(roles.args(), _int(op.inputs[1].shape[0]), _int(op.inputs[0].shape[1]))


def _experts(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles = _only(group, "expert_linear"), _Roles(group)
    dispatch, combine, swiglu = (_maybe(group, kind) for kind in ("dispatch", "combine", "swiglu"))
    rows, counts, weight = op.inputs
    out, routed = _result(group), rows.shape[0]
    if not isinstance(routed, Sym) or (combine and combine.inputs[0] is not op.outputs[0]):
        raise InternalError(f"{group.name}: wanted rows of routes, and what is combined to be their product")
    roles.add("x", dispatch.inputs[0] if dispatch else rows)
    roles.add("counts", counts)
    roles.add("weight", weight)
    if dispatch or combine:
        roles.add("order", (dispatch or combine or op).inputs[1])
    if combine:
        roles.add("weights", combine.inputs[2])
    roles.give("out", out)
    num_experts, n, k = (_int(dim) for dim in weight.shape)
    return desc.Experts(
        roles.args(),
        routed.times,
        num_experts,
        k,
        n,
        weight.dtype,
        dispatch is not None,
        integer(swiglu.attrs, "width") if swiglu else 0,
        combine is not None,
        out.dtype,
    )


def _elementwise(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    roles, outputs = _Roles(group), group.outputs
    leaves = [v for v in group.inputs if v.name not in BATCH_ARRAYS]
    found = []
    for i, leaf in enumerate(leaves):
        roles.roles.setdefault(id(leaf), []).append(f"a{i}")
        found.append(desc.Leaf(leaf.dtype, 0 if _is_constant(leaf) else leaf.row_elements))
    for i, output in enumerate(outputs):
        roles.roles.setdefault(id(output), []).append(f"y{i}")
    sizes = {output.row_elements for output in outputs}
    if len(sizes) != 1:
        raise InternalError(f"{group.name} gives rows of {sorted(sizes)}, wanted one size")
    return desc.Elementwise(
        roles.args(),
        "1" if _is_constant(outputs[0]) else _rows(outputs[0]),
        outputs[0].row_elements,
        tuple(found),
        segments_of(group, leaves, outputs),
        tuple(output.dtype for output in outputs),
    )


_DESCRIBERS: dict[str, Callable[[Group, Mapping[str, str]], KernelDesc]] = {
    "embed": _embed,
    "rms_norm": _rms_norm,
    "linear": _linear,
    "qkv_write": _qkv_write,
    "attention": _attention,
    "head_linear": _head_linear,
    "latent_write": _latent_write,
    "latent_attention": _latent_attention,
    "gather_rows": _gather_rows,
    "rope": _rope,
    "kv_write": _kv_write,
    "elementwise": _elementwise,
    "route": _route,
    "sort_routes": _sort_routes,
    "experts": _experts,
}
