"""overlap: what runs while a collective is in flight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import golden
import pytest

from tscompile.build import Build
from tscompile.errors import InternalError
from tscompile.ir import Graph, Group, Sym, Value
from tscompile.kernels.steps import FINISH, START, steps_of
from tscompile.parser import parse
from tscompile.passes import fuse, overlap, propagate
from tscompile.price import Prices
from tscompile.verify import verify

# A router whose logits are gathered, experts of which each rank has a part; shared experts, written first.
LAYER = """graph layer mesh(tp=2) {
  input %token_ids: i32[T]
  weight @table: f32[64, 32] = checkpoint("table")
  weight @norm: f32[32] = checkpoint("norm")
  weight @shared: f32[32, 32] = checkpoint("shared")
  weight @router: f32[4, 32] tp:S(0) = shard(checkpoint("router"); dim=0, axis="tp")
  weight @part: f32[32, 8] = checkpoint("part")
  %x: f32[T, 32] = embedding(%token_ids, @table; vocab_axis="")
  %h: f32[T, 32] = rms_norm(%x, @norm; eps=1e-06)
  %inner: f32[T, 32] = linear(%h, @shared)
  %shared: f32[T, 32] = linear(%inner, @shared)
  %own: f32[T, 4] tp:S(1) = linear(%h, @router)
  %routes: f32[T, 8] = all_gather(%own; axis="tp", dim=1, ranks=2)
  %sum: f32[T, 32] tp:P(sum) = linear(%routes, @part)
  %whole: f32[T, 32] = all_reduce(%sum; axis="tp", op="sum")
  %both: f32[T, 32] = add(%whole, %x)
  %y: f32[T, 32] = rms_norm(%both, @norm; eps=1e-06)
  %z: f32[T, 32] = add(%y, %shared)
  output %z
}
"""


def layer(monkeypatch: pytest.MonkeyPatch, *, beside: set[str] | None = None, split_s: float = 0.0) -> Build:
    """After the pass, in which of a collective of 1 us these terms may be hidden."""
    prices = golden.prices(1e-6, 1e12)
    link = dataclasses.replace(prices.topology.host, beside=frozenset({"base"} if beside is None else beside))
    machine = dataclasses.replace(prices.topology, host=link, split_s=split_s)
    monkeypatch.setattr(propagate, "prices_of", lambda _: dataclasses.replace(prices, topology=machine))
    build = golden.build_of(parse(LAYER))
    fuse.run(build)
    overlap.run(build)
    verify(build.graph)
    return build


def test_golden(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    golden.check("overlap", layer(monkeypatch).graph, request)


def test_what_the_next_collective_needs_runs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared experts wait for collectives, which have nothing else, though they were first."""
    build = layer(monkeypatch)
    kinds = [(group.group, group.outputs[0].name) for group in build.graph.groups()]
    assert kinds == [
        ("embed", "x"),
        ("rms_norm", "h"),
        ("linear", "own"),
        ("start", "routes.started"),
        ("linear", "inner"),
        ("finish", "routes"),
        ("linear", "sum"),
        ("start", "whole.started"),
        ("linear", "shared"),
        ("finish", "whole"),
        ("rms_norm", "y"),  # what is left of all_reduce_rms_norm
        ("elementwise", "z"),
    ]


def test_receipts_and_report(monkeypatch: pytest.MonkeyPatch) -> None:
    build = layer(monkeypatch)
    told = [(r.where, r.matched, r.reason) for r in build.receipts if r.pattern == "overlap"]
    assert [row[:2] for row in told] == [("routes", True), ("whole", True)]
    assert [row[2] for row in told] == ["beside inner: 1.0 us hidden", "beside shared: 1.0 us hidden"]
    (bucket,) = build.placed["overlaps"]
    assert bucket["max_tokens"] == 512
    rows = bucket["collectives"]
    assert [(r["collective"], r["value"], r["beside"], r["count"]) for r in rows] == [
        ("all_gather", "own", ["inner"], 1),
        ("all_reduce", "sum", ["shared"], 1),
    ]
    for row in rows:
        assert row["us_hidden"] == 1.0 <= min(row["us"], row["us_beside"])
        assert not row["why_not"]


@pytest.mark.parametrize(
    ("beside", "split_s", "why"),
    [
        (set(), 0.0, "0.0 us of it could be hidden, and two launches take 0.0 more"),
        ({"base"}, 2e-6, "1.0 us of it could be hidden, and two launches take 2.0 more"),
    ],
)
def test_nothing_moves_without_a_gain(
    beside: set[str], split_s: float, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = layer(monkeypatch, beside=beside, split_s=split_s)
    before = golden.build_of(parse(LAYER))
    fuse.run(before)
    assert [g.name for g in build.graph.groups()] == [g.name for g in before.graph.groups()]
    assert {r.reason for r in build.receipts if r.pattern == "overlap"} == {why}
    assert {row["us_hidden"] for row in build.placed["overlaps"][0]["collectives"]} == {0.0}


def test_a_chain_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of a dense model: each collective waits for all before it, and all after it for it."""
    prices = golden.prices(1e-6, 1e12)
    link = dataclasses.replace(prices.topology.host, beside=frozenset({"base", "bytes"}))
    machine = dataclasses.replace(prices.topology, host=link)
    monkeypatch.setattr(propagate, "prices_of", lambda _: dataclasses.replace(prices, topology=machine))
    build = golden.after("fuse", overlap.run)
    assert [op.name for op in build.graph.ops] == [op.name for op in golden.read("fuse").ops]
    reasons = [r.reason for r in build.receipts]
    assert reasons
    assert set(reasons) == {"all else that is left to run depends on it"}


def test_a_cache_is_read_before_it_is_written() -> None:
    """The write waits for who reads the cache as it was, though no value leads from one to the other."""
    before, after = (Value(name, (1, 4), "f32", True) for name in ("kv.0", "kv.1"))
    read, later = (Value(name, (4,), "f32") for name in ("read", "later"))
    made = [([before], [read]), ([before], [after]), ([after], [later])]
    groups = [Group("group", taken, given, {}, group="attention", body=[]) for taken, given in made]
    assert overlap.dependences(groups) == [set(), {0}, {1}]


def test_a_start_gives_the_value_and_a_finish_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """So buffers live from the one to the other."""
    steps = steps_of(layer(monkeypatch).graph)
    starts = [step for step in steps if step.group == START]
    finishes = [step for step in steps if step.group == FINISH]
    assert [step.name for step in starts] == ["routes", "whole"]
    for start, finish in zip(starts, finishes, strict=True):
        assert finish.inputs == [*start.outputs, *start.inputs]
        assert not finish.outputs


def unstarted(graph: Graph, at: int) -> None:
    graph.groups()[at].group = "collective"


def unfinished(graph: Graph, at: int) -> None:
    graph.ops, graph.outputs = graph.ops[: at + 1], []


def read_in_flight(graph: Graph, at: int) -> None:
    start, linear = graph.groups()[at : at + 2]
    linear.inputs[0] = linear.body[0].inputs[0] = start.outputs[0]


def two_in_flight(graph: Graph, at: int) -> None:
    start = graph.groups()[at]
    other = Value("other", (Sym("T"), 32), "f32")
    op = dataclasses.replace(start.body[0], outputs=[other])
    graph.ops.insert(at + 1, dataclasses.replace(start, outputs=[other], body=[op]))


BROKEN: list[tuple[Callable[[Graph, int], None], str]] = [
    (unstarted, "group.finish -> %whole finishes %whole.started, but None is in flight"),
    (unfinished, "%whole.started starts and does not finish"),
    (read_in_flight, "group.linear -> %shared reads what only a finish may, of [%whole.started, @shared]"),
    (two_in_flight, "group.start -> %other begins while %whole.started is in flight"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_the_verifier_wants_one_in_flight_until_it_is_finished(
    change: Callable[[Graph, int], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = layer(monkeypatch).graph
    change(graph, next(i for i, op in enumerate(graph.ops) if op.name == "whole.started"))
    with pytest.raises(InternalError) as error:
        verify(graph)
    assert str(error.value) == message


def test_prices_of_what_may_be_hidden() -> None:
    """Within a host a CPU hides the waiting, a GPU all of it; and never more than there is."""
    for target, terms in (("cpu-avx2", {"hop"}), ("sm_90a", {"base", "hop", "bytes"})):
        prices = Prices.of(target, 64)
        assert prices.topology.host.beside == terms
        for kind in ("all_reduce", "all_gather", "all_to_all", "send"):
            whole = prices.collective(kind, 1 << 20, 4)[0] - prices.topology.launch_s
            hidden = prices.hidden(kind, 1 << 20, 4)
            assert 0 < hidden <= whole * (1 + 1e-9)
            assert (hidden == pytest.approx(whole)) == (target == "sm_90a")
