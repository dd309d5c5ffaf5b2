"""A group of the fused graph -> the description of its kernel. One function a group kind; each reads the
constants off the body."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tscompile.errors import InternalError
from tscompile.ir import BATCH_ARRAYS, Group, Op, Value, Weight
from tscompile.kernels import desc, expert_groups
from tscompile.kernels.chain import segments_of
from tscompile.kernels.desc import KernelDesc
from tscompile.kernels.roles import Roles, batch_array, is_constant, known, maybe, only, result, rows_of
from tscompile.kernels.steps import coordinate_of
from tscompile.ops.base import integer, number
from tscompile.ops.parts import num_parts

TILES = "tiles"
ROWS = "rows"
# group kind -> its op that takes a weight in tiles, last
PRODUCTS = {"linear": "linear", "head_linear": "head_linear", "experts": "expert_linear"}


def layouts_of(groups: Sequence[Group], product: str = TILES) -> dict[str, str]:
    """Weight -> how its kernels read it (tscompile/layout.py): `product` if a linear multiplies by it, else
    rows."""
    layouts: dict[str, str] = {}
    for group in groups:
        for value in group.inputs:
            if isinstance(value, Weight):
                layouts.setdefault(value.name, ROWS)
        if group.group in PRODUCTS:
            layouts[only(group, PRODUCTS[group.group]).inputs[-1].name] = product
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


def _embed(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles = only(group, "embedding"), Roles(group)
    ids = batch_array(group, op.inputs[0], ("token_ids", "positions"))
    roles.add("table", op.inputs[1])
    coordinate = coordinate_of(group)
    if coordinate:
        roles.add("rank", coordinate)
    roles.give("out", result(group))
    table = op.inputs[1]
    rows = known(table.shape[0]) if coordinate else 0
    layout = layouts.get(table.name, ROWS)
    return desc.Embed(roles.args(), ids, known(table.shape[1]), table.dtype, layout, rows)


def _rms_norm(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, add, roles = only(group, "rms_norm"), maybe(group, "add"), Roles(group)
    cast = maybe(group, "cast")
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
    width = known(op.inputs[0].shape[-1])
    heads = op.inputs[0].row_elements // width
    return desc.RmsNorm(roles.args(), rows_of(op.inputs[0]), heads, width, number(op.attrs, "eps"), out.dtype)


def _linear(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, gather, add, roles = (
        only(group, "linear"),
        maybe(group, "gather_rows"),
        maybe(group, "add"),
        Roles(group),
    )
    swiglu, x, weight, out = maybe(group, "swiglu"), op.inputs[0], op.inputs[1], result(group)
    n, k = known(weight.shape[0]), known(weight.shape[1])
    if gather:
        batch_array(group, gather.inputs[1], ("logit_rows",))
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
    length = known(bias.shape[0]) if bias else 0
    width = integer(swiglu.attrs, "width") if swiglu else 0
    fold = x.row_elements // k
    return desc.Linear(
        roles.args(), rows_of(out), gather is not None, fold, k, n, weight.dtype, length, width, out.dtype
    )


def _qkv_write(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    split, write, roles = only(group, "split"), only(group, "kv_write"), Roles(group)
    state, q = write.inputs[0], result(group)
    heads, kv_heads, head_dim = (
        q.row_elements // known(state.shape[1]),
        known(state.shape[0]),
        known(state.shape[1]),
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
            rotary = known(op.inputs[1].shape[1])
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
    page_size, parts = integer(write.attrs, "page_size"), _parts(group, write, roles, 4)
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
        parts,
    )


def _parts(group: Group, op: Op, roles: Roles, index: int) -> int:
    """Into how many parts the cache's context is cut. index: which input says the numbers of the rank's own
    parts, if there is one."""
    for numbers in op.inputs[index:]:
        if numbers.shape != (1,):
            raise InternalError(f"{group.name}: parts {numbers!r} {numbers.shape}, wanted one on each rank")
        roles.add("part", numbers)
    return num_parts(op.attrs)


def _attention(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles, out = only(group, "attention"), Roles(group), result(group)
    q, state = op.inputs[0], op.inputs[1]
    roles.add("q", q)
    roles.add("kv", state)
    parts = _parts(group, op, roles, 6)
    roles.give("out", out)
    return desc.Attention(
        roles.args(),
        known(q.shape[1]),
        known(state.shape[0]),
        known(state.shape[1]),
        state.dtype,
        integer(op.attrs, "page_size"),
        number(op.attrs, "scale"),
        integer(op.attrs, "window"),
        out.dtype,
        parts,
    )


def _head_linear(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, rope, roles, out = only(group, "head_linear"), maybe(group, "rope"), Roles(group), result(group)
    x, weight = op.inputs
    heads, n, k = (known(dim) for dim in weight.shape)
    rotary, interleaved = _tail(group, rope, op.outputs[0])
    if rope:
        x = only(group, "split").inputs[0]
    roles.add("x", x)
    roles.add("weight", weight)
    if rope:
        roles.add("table", rope.inputs[1])
    roles.give("out", out)
    return desc.HeadLinear(
        roles.args(), heads, k, n, rotary, interleaved, roles.origin(x).dtype, weight.dtype, out.dtype
    )


def _latent_write(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, cast, roles = only(group, "latent_write"), maybe(group, "cast"), Roles(group)
    norm, rope = maybe(group, "rms_norm"), maybe(group, "rope")
    state, row = op.inputs[0], roles.origin(cast.inputs[0] if cast else op.inputs[1])
    rotary, interleaved = _tail(group, rope, norm.outputs[0] if norm else row)
    roles.add("kv", state)
    if norm and rope:
        row = only(group, "split").inputs[0]
        roles.add("norm", norm.inputs[1])
        roles.add("table", rope.inputs[1])
    roles.add("row", row)
    parts = _parts(group, op, roles, 3)
    return desc.LatentWrite(
        roles.args(),
        known(state.shape[0]),
        number(norm.attrs, "eps") if norm else 0.0,
        rotary,
        interleaved,
        row.dtype,
        state.dtype,
        integer(op.attrs, "page_size"),
        parts,
    )


def _tail(group: Group, rope: Op | None, head: Value) -> tuple[int, bool]:
    """(rotary, interleaved) of a group that computes `head` from the first part of a split, rotates the
    second and puts them together again; (0, False) if it does not rotate."""
    if rope is None:
        return 0, False
    split, concat, roles = only(group, "split"), only(group, "concat"), Roles(group)
    rotary = known(rope.inputs[1].shape[1])
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
    op, roles, out = only(group, "latent_attention"), Roles(group), result(group)
    q, state = op.inputs[0], op.inputs[1]
    parts = _parts(group, op, roles, 6)
    roles.add("q", q)
    roles.add("kv", state)
    roles.give("out", out)
    return desc.LatentAttention(
        roles.args(),
        known(q.shape[1]),
        known(state.shape[0]),
        integer(op.attrs, "rank"),
        state.dtype,
        integer(op.attrs, "page_size"),
        number(op.attrs, "scale"),
        out.dtype,
        parts,
    )


def _merge_parts(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles, out = only(group, "merge_parts"), Roles(group), result(group)
    roles.add("x", op.inputs[0])
    roles.give("out", out)
    _, parts, heads, width = op.inputs[0].shape
    return desc.MergeParts(roles.args(), known(parts), known(heads), known(width) - 2, out.dtype)


def _gather_rows(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles = only(group, "gather_rows"), Roles(group)
    batch_array(group, op.inputs[1], ("logit_rows",))
    roles.add("x", op.inputs[0])
    roles.give("out", result(group))
    return desc.GatherRows(roles.args(), op.inputs[0].row_elements, op.inputs[0].dtype)


def _rope(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles, out = only(group, "rope"), Roles(group), result(group)
    x, table = op.inputs[0], op.inputs[1]
    roles.add("x", x)
    roles.add("table", table)
    roles.give("out", out)
    return desc.Rope(
        roles.args(),
        known(x.shape[1]),
        known(x.shape[2]),
        known(table.shape[1]),
        bool(op.attrs["interleaved"]),
        out.dtype,
    )


def _kv_write(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles = only(group, "kv_write"), Roles(group)
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
    page_size, parts = integer(op.attrs, "page_size"), _parts(group, op, roles, 4)
    return desc.KvWrite(
        roles.args(),
        known(state.shape[0]),
        known(state.shape[1]),
        k.dtype,
        v.dtype,
        state.dtype,
        page_size,
        parts,
    )


def _elementwise(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    roles, outputs = Roles(group), group.outputs
    leaves = [v for v in group.inputs if v.name not in BATCH_ARRAYS]
    found = []
    for i, leaf in enumerate(leaves):
        roles.roles.setdefault(id(leaf), []).append(f"a{i}")
        found.append(desc.Leaf(leaf.dtype, 0 if is_constant(leaf) else leaf.row_elements))
    for i, output in enumerate(outputs):
        roles.roles.setdefault(id(output), []).append(f"y{i}")
    sizes = {output.row_elements for output in outputs}
    if len(sizes) != 1:
        raise InternalError(f"{group.name} gives rows of {sorted(sizes)}, wanted one size")
    return desc.Elementwise(
        roles.args(),
        "1" if is_constant(outputs[0]) else rows_of(outputs[0]),
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
    "merge_parts": _merge_parts,
    "gather_rows": _gather_rows,
    "rope": _rope,
    "kv_write": _kv_write,
    "elementwise": _elementwise,
    "route": expert_groups.route,
    "sort_routes": expert_groups.sort_routes,
    "experts": expert_groups.experts,
    "dispatch": expert_groups.dispatch,
    "combine": expert_groups.combine,
}
