"""Cache groups: layers whose KV caches live by one rule, attention to everything or a sliding window, share a
page table. csrc/cache_groups.h says what the engine does with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tscompile.errors import InternalError
from tscompile.ir import Group, Value
from tscompile.ops.base import integer

MOST_GROUPS = 16  # csrc/program.cpp, kMaxGroups


@dataclass(frozen=True)
class CacheGroup:
    """window: tokens that a token sees, itself included; 0: all. layers: their numbers, ascending."""

    window: int
    layers: tuple[int, ...]

    def fields(self) -> dict[str, int | str]:
        """Its item of the program's "kv"."""
        return {"kind": "window", "window": self.window} if self.window else {"kind": "full"}


def windows_of(states: Sequence[Value], layers: dict[int, int], steps: Sequence[Group]) -> list[int]:
    """Of each layer how many tokens back it is read, 0 for all: what the attribute `window` of the ops says
    that read its state. layers: id(state) -> its layer."""
    found: list[list[int]] = [[] for _ in states]
    for step in steps:
        for op in step.body:
            for value in op.inputs:
                if value.state and "window" in op.attrs:
                    found[layers[id(value)]].append(integer(op.attrs, "window"))
    return [max(windows) if windows and all(windows) else 0 for windows in found]


def cache_groups(
    windows: Sequence[int], *, max_context: int, max_tokens: int, page_size: int
) -> list[CacheGroup]:
    """Groups of up to n layers, those of full attention first. A page is of one size for all groups and holds
    n layers, so a group of fewer wastes the rest: n is the one with which the longest sequence takes the
    least memory, of several alike the largest, which makes the fewest groups. A window that holds the longest
    context is none."""

    def pages(window: int) -> int:
        """The most that a sequence holds in a group: CacheGroup::most_pages of the engine."""
        whole = -(-max_context // page_size)
        ahead = (min(max_tokens, max_context) + 2 * page_size - 2) // page_size
        return min(whole, (window + page_size - 2) // page_size + ahead) if window else whole

    windows = [window if window < max_context else 0 for window in windows]
    kinds = {window: [i for i, w in enumerate(windows) if w == window] for window in sorted(set(windows))}

    def num_groups(n: int) -> dict[int, int]:
        return {window: -(-len(layers) // n) for window, layers in kinds.items()}

    def memory(n: int) -> int:
        return n * sum(count * pages(window) for window, count in num_groups(n).items())

    sizes = range(max(len(layers) for layers in kinds.values()), 0, -1)
    allowed = [n for n in sizes if sum(num_groups(n).values()) <= MOST_GROUPS]
    if not allowed:
        raise InternalError(f"{len(kinds)} kinds of layers make more than {MOST_GROUPS} cache groups")
    n = min(allowed, key=memory)
    return [
        CacheGroup(window, tuple(layers[first : first + n]))
        for window, layers in kinds.items()
        for first in range(0, len(layers), n)
    ]
