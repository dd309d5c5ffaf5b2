"""The op registry: the only place that knows an op. `lookup(kind)` gives its OpDef."""

from __future__ import annotations

from tscompile.errors import InternalError
from tscompile.ops import attention, collective, dense, elementwise, experts, latent, layout, parts
from tscompile.ops.base import REGISTRY, OpDef, Rule, ShapeError, Slot, Type

__all__ = ["REGISTRY", "OpDef", "Rule", "ShapeError", "Slot", "Type", "lookup"]

# importing them fills the registry
_ = (attention, collective, dense, elementwise, experts, latent, layout, parts)


def lookup(kind: str) -> OpDef:
    """The op of this name; InternalError if there is none."""
    if kind not in REGISTRY:
        raise InternalError(f"no op {kind!r}; known are {', '.join(sorted(REGISTRY))}")
    return REGISTRY[kind]
