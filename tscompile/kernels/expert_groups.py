"""Groups of routed experts -> the descriptions of their kernels (tscompile/ops/experts.py)."""

from __future__ import annotations

from collections.abc import Mapping

from tscompile.errors import InternalError
from tscompile.ir import Group, Sym
from tscompile.kernels import desc
from tscompile.kernels.desc import KernelDesc
from tscompile.kernels.roles import Roles, known, maybe, only, result
from tscompile.ops.base import integer, number


def route(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles = only(group, "route"), Roles(group)
    for role, value in zip(("logits", "bias"), op.inputs, strict=False):
        roles.add(role, value)
    for role, value in zip(("ids", "weights"), op.outputs, strict=True):
        roles.give(role, value)
    k, groups, kept = (integer(op.attrs, name) for name in ("k", "groups", "kept"))
    return desc.Route(
        roles.args(),
        known(op.inputs[0].shape[1]),
        k,
        str(op.attrs["scores"]),
        bool(op.attrs["normalize"]),
        number(op.attrs, "scale"),
        groups,
        kept,
    )


def sort_routes(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles = only(group, "sort_routes"), Roles(group)
    for role, value in zip(("ids", "numbers"), op.inputs, strict=True):
        roles.add(role, value)
    for role, value in zip(("order", "counts"), op.outputs, strict=True):
        roles.give(role, value)
    return desc.SortRoutes(roles.args(), known(op.inputs[1].shape[0]), known(op.inputs[0].shape[1]))


def experts(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles = only(group, "expert_linear"), Roles(group)
    dispatch, combine, swiglu = (maybe(group, kind) for kind in ("dispatch", "combine", "swiglu"))
    rows, counts, weight = op.inputs
    out, routed = result(group), rows.shape[0]
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
    num_experts, n, k = (known(dim) for dim in weight.shape)
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


def dispatch(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles = only(group, "dispatch"), Roles(group)
    for role, value in zip(("x", "order"), op.inputs, strict=True):
        roles.add(role, value)
    roles.give("out", op.outputs[0])
    x = op.inputs[0]
    return desc.Dispatch(roles.args(), integer(op.attrs, "k"), known(x.shape[1]), x.dtype)


def combine(group: Group, layouts: Mapping[str, str]) -> KernelDesc:
    op, roles = only(group, "combine"), Roles(group)
    for role, value in zip(("rows", "order", "weights"), op.inputs, strict=True):
        roles.add(role, value)
    roles.give("out", op.outputs[0])
    rows, _, weights = op.inputs
    return desc.Combine(roles.args(), known(weights.shape[1]), known(rows.shape[1]))
