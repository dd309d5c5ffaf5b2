"""Of the ways to compute a description that `select` offers, the one that is taken, and why.

The one that a lockfile names; else the first, by the cost model, whose operands fit shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tscompile.errors import CompileError
from tscompile.kernels.desc import KernelDesc
from tscompile.kernels.gpu.lockfile import Lockfile
from tscompile.kernels.gpu.spec import GpuStep, Rows
from tscompile.kernels.gpu.target import GpuTarget


@dataclass(frozen=True)
class Offer:
    """operand_bytes: of shared memory, that a tile's operands take while they are on their way."""

    step: GpuStep
    operand_bytes: int = 0

    @property
    def config(self) -> str:
        """Its name: of its first kernel, template and configuration."""
        kernel = self.step.launches[0].kernel
        return f"{kernel.template} {kernel.config.text}"


@dataclass(frozen=True)
class Choice:
    """why: what a lockfile said, or what did not fit; empty if it is simply the best by the cost model."""

    step: GpuStep
    config: str
    why: str


def choose(
    offers: Sequence[Offer], made: KernelDesc, target: GpuTarget, rows: Rows, lock: Lockfile | None
) -> Choice:
    """offers: the best first. CompileError if none fits, or the lockfile names none of those that do."""
    too_large = {
        offer.config: f"its operands take {offer.operand_bytes} bytes of shared memory, {target.name} has "
        f"{target.tile_bytes} for them"
        for offer in offers
        if offer.operand_bytes > target.tile_bytes
    }
    fitting = [offer for offer in offers if offer.config not in too_large]
    if not fitting:
        raise CompileError(f"no kernel for {made.text} fits: {too_large[offers[-1].config]}")
    entry = lock.find(target.name, made, rows) if lock else None
    if lock is None or entry is None:
        best = fitting[0]
        skipped = [offer.config for offer in offers[: offers.index(best)]]
        why = "; ".join(f"not {config}: {too_large[config]}" for config in skipped)
        return Choice(best.step, best.config, why)
    for offer in fitting:
        if offer.config == entry.config:
            why = f"{entry.us:g} us on {entry.device}, {entry.date}, says the lockfile"
            return Choice(offer.step, offer.config, why)
    raise CompileError(
        f"{lock.where(entry)}: {target.name} computes no {made.kind} by {entry.config!r}: "
        f"{too_large.get(entry.config, 'there is no such kernel')}. It can by "
        f"{', '.join(repr(offer.config) for offer in fitting)}: measure again, or leave the line out"
    )
