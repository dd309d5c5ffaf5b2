"""States of the search (tscompile/search.py): where the live values lie. They are compared and hashed a great
deal, so all the places that one value has been brought to are a number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any, TypeAlias, cast

from tscompile.placement import Placement

Live: TypeAlias = tuple[str, ...]  # values that have been brought somewhere and are read again, by their repr
State: TypeAlias = tuple[int, ...]  # of each of them, all that it has been brought to so far
Picker: TypeAlias = Callable[[tuple[Any, ...]], tuple[Any, ...]]  # some items of a tuple

PLACES: list[tuple[Placement, ...]] = []  # by number
_numbers: dict[tuple[Placement, ...], int] = {}


def number_of(places: tuple[Placement, ...]) -> int:
    if places not in _numbers:
        _numbers[places] = len(PLACES)
        PLACES.append(places)
    return _numbers[places]


NOWHERE = number_of(())


def without_dominated(costs: dict[State, float]) -> dict[State, float]:
    """Without the states that another makes needless: one where the same values come from the same
    placements, brought to all of these and maybe to more, at no greater cost. The cheapest first."""
    kept: dict[State, float] = {}
    for state in sorted(costs, key=lambda s: (costs[s], -sum(len(PLACES[place]) for place in s))):
        if not any(covers(better, state) for better in kept):
            kept[state] = costs[state]
    return kept


def covers(one: State, other: State) -> bool:
    """Whether each value comes from the same placement, and has been brought to all that it has in the
    other."""
    return all(map(_covers, one, other))


@cache
def _covers(one: int, other: int) -> bool:
    have, want = PLACES[one], PLACES[other]
    return have[:1] == want[:1] and set(have) >= set(want)


def renamed(live: Live, old: str, new: str) -> Live:
    return tuple(new if name == old else name for name in live)


def picker(positions: Sequence[int]) -> Picker:
    """What takes these of a state's numbers, in this order."""
    if len(positions) > 1:
        return cast(Picker, itemgetter(*positions))
    return (lambda state: (state[positions[0]],)) if positions else (lambda _: ())
