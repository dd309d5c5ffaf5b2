"""Why each op lies as it does: what its rule also allows, and what that would cost. Kept in the plan as
"tsp/placements", for `tscompile explain`."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from tscompile.inspect import alike, of_any_layer
from tscompile.ir import Graph, Op, Value, Weight
from tscompile.mesh import by_stage
from tscompile.placement import Partial, Placement, Replicate
from tscompile.price import Prices
from tscompile.search import Search, settled
from tscompile.sharding import Strategy, chosen, rule_of


def reasons(graph: Graph, prices: Prices, *, pinned: bool) -> list[dict[str, Any]]:
    """A row an op and axis of a placed graph, before reshard; ops that are alike once, with `count`. `us` is
    the op and the moves that it alone needs, for the step that `prices` is of; `others` what its rule also
    allows, `us_more` than that if all else stays as it is, or None where no collective leads there. pinned:
    weights and KV caches lie where steps of another size want them, so that much else is not allowed."""
    rows = []
    for index, (axis, ranks) in enumerate(graph.mesh.axes):
        if ranks > 1 and not by_stage(axis):
            search = Search(graph, axis, ranks, prices, settled(graph, index), pinned=pinned)
            around = _Around(graph, index, search)
            rows += [around.reason(op) for op in graph.ops if op.kind != "boundary"]
    return alike(rows)


class _Around:
    """Prices one op's strategies on one axis, with its neighbours where they are."""

    def __init__(self, graph: Graph, index: int, search: Search) -> None:
        self.index, self.search = index, search
        self.read: dict[int, Counter[Placement]] = {}  # id(value) -> how many readers take it as that
        for op in graph.ops:
            strategy = chosen(op, search.axis, index, search.ranks)
            for value, placement in zip(op.inputs, strategy.takes, strict=True):
                self._count(value)[placement] += 1
        for value in graph.outputs:
            self._count(value)[Replicate()] += 1

    def _count(self, value: Value) -> Counter[Placement]:
        return self.read.setdefault(id(value), Counter())

    def reason(self, op: Op) -> dict[str, Any]:
        here = chosen(op, self.search.axis, self.index, self.search.ranks)
        cost = self.cost(op, here, here)
        others = []
        for other in self.search.options(op):
            if other != here:
                more = self.cost(op, other, here) - cost
                us_more = None if math.isinf(more) else round(more * 1e6, 2)
                others.append({**told(other), "us_more": us_more})
        return {
            "op": op.kind,
            "values": [of_any_layer(value.name) for value in op.outputs],
            "at": str(op.source or ""),
            "axis": self.search.axis,
            "rule": rule_of(op).text,
            **told(here),
            "us": round(cost * 1e6, 2),
            "others": others,
        }

    def cost(self, op: Op, strategy: Strategy, here: Strategy) -> float:
        total = self.search.op_cost(op, strategy)
        for value, wanted, taken in zip(op.inputs, strategy.takes, here.takes, strict=True):
            others = self.read[id(value)] - Counter([taken])
            if not others[wanted]:  # else it is brought there anyway
                total += self._bring(value, wanted)
        for value, given in zip(op.outputs, strategy.gives, strict=True):
            total += sum(
                self.search.bring(value, wanted, (given,)) for wanted in self.read.get(id(value), ())
            )
        return total

    def _bring(self, value: Value, wanted: Placement) -> float:
        """From where it is made; a weight is made wherever it is wanted."""
        have = () if isinstance(value, Weight) else (value.placement[self.index],)
        return self.search.bring(value, wanted, have)


def told(strategy: Strategy) -> dict[str, str]:
    """sharded: the factor of the rule; or nothing, or sums that pass through a linear op."""
    takes, gives = (", ".join(map(str, placements)) for placements in (strategy.takes, strategy.gives))
    nothing = "sums" if any(isinstance(taken, Partial) for taken in strategy.takes) else "nothing"
    return {"sharded": strategy.factor or nothing, "placements": f"{takes} -> {gives}"}
