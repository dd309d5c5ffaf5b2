"""The verifier names the value and what is wrong with it: each thing that a broken pass could leave."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tscompile import pipeline
from tscompile.build import Build, Options
from tscompile.errors import InternalError
from tscompile.ir import Graph, Group, Value
from tscompile.parser import parse
from tscompile.placement import Replicate, Shard
from tscompile.verify import verify

TEXT = """graph g mesh(tp=2) {
  input %token_ids: i32[T]
  input %slots: i32[T]
  input %kv.0: state f32[1, 4]
  weight @w: f32[4, 4] = checkpoint("w")
  %x: f32[T, 4] = embedding(%token_ids, @w; vocab_axis="")
  %h: f32[T, 1, 4] = reshape(%x; shape=[-1, 1, 4])
  %kv: state f32[1, 4] = kv_write(%kv.0, %h, %h, %slots; page_size=32)
  %y: f32[T, 4] = linear(%x, @w)
  %z: f32[T, 4] = group.elementwise(%y, %x) {
    %a: f32[T, 4] = relu(%y)
    %z: f32[T, 4] = add(%a, %x)
  }
  output %z
}
"""


def group(graph: Graph) -> Group:
    last = graph.ops[-1]
    assert isinstance(last, Group)
    return last


def value(graph: Graph, name: str) -> Value:
    return next(v for v in graph.values() if v.name == name)


BROKEN: dict[str, tuple[Callable[[Graph], object], str]] = {
    "name": (lambda g: setattr(value(g, "y"), "name", "x"), "%x is defined twice"),
    "order": (
        lambda g: g.ops.insert(0, g.ops.pop(3)),
        "linear -> %y reads %x, which nothing above it defines",
    ),
    "output": (
        lambda g: g.outputs.append(Value("q", (1,), "f32")),
        "the output reads %q, which nothing above it defines",
    ),
    "shape": (
        lambda g: setattr(value(g, "y"), "shape", (5,)),
        "linear -> %y gives f32[5], but its rule says f32[T, 4]",
    ),
    "dtype": (
        lambda g: setattr(value(g, "y"), "dtype", "bf16"),
        "linear -> %y gives bf16[T, 4], but its rule says f32[T, 4]",
    ),
    "no dtype": (lambda g: setattr(g.weights[0], "dtype", "f8"), "@w has dtype 'f8'"),
    "stored": (
        lambda g: setattr(g.weights[0], "dtype", "bf16"),
        "linear -> %y takes operands of bf16 and f32: wanted one dtype",
    ),
    "weight": (lambda g: setattr(g.weights[0], "shape", (4, 0)), "@w has shape [4, 0]: wanted positive ints"),
    "input": (lambda g: setattr(g.inputs[0], "name", "ids"), "%ids [T] is no batch array"),
    "attrs": (lambda g: g.ops[0].attrs.clear(), "embedding -> %x has attrs [], wanted ['vocab_axis']"),
    "attr": (lambda g: g.ops[0].attrs.update(vocab_axis=1), "embedding -> %x: vocab_axis=1, wanted str"),
    "arity": (lambda g: g.ops[3].inputs.pop(), "linear -> %y has 1 inputs, wanted 2"),
    "slot": (lambda g: g.ops[0].inputs.reverse(), "embedding -> %x takes @w of f32 as its ids: wanted i32"),
    "rule": (
        lambda g: g.ops[1].attrs.update(shape=(-1, 3)),
        "reshape -> %h: [T, 4] does not reshape to [-1, 3]",
    ),
    "kind": (lambda g: setattr(g.ops[3], "kind", "lineal"), "no op 'lineal'; known are add"),
    "state": (
        lambda g: g.ops.append(g.ops[2]),
        "kv_write -> %kv reads %kv.0, a state that an op above it has updated",
    ),
    "placements": (
        lambda g: setattr(value(g, "y"), "placement", (Replicate(), Replicate())),
        "%y has 2 placements on mesh(tp=2)",
    ),
    "placed": (lambda g: setattr(value(g, "y"), "placement", (Shard(2),)), "%y [T, 4] is placed S(2)"),
    "group kind": (lambda g: setattr(group(g), "group", "magic"), "group.magic -> %z: no such kind of group"),
    "group takes": (
        lambda g: group(g).inputs.pop(),
        "group.elementwise -> %z takes [%y], but its body reads [%y, %x]",
    ),
    "group gives": (
        lambda g: group(g).outputs.append(value(g, "x")),
        "group.elementwise -> %z gives a value that its body does not make",
    ),
    "inside stays inside": (
        lambda g: setattr(g, "outputs", [group(g).body[0].outputs[0]]),
        "the output reads %a, which nothing above it defines",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_break_is_named(name: str) -> None:
    graph = parse(TEXT)
    verify(graph)
    mutate, message = BROKEN[name]
    mutate(graph)
    with pytest.raises(InternalError) as error:
        verify(graph)
    assert str(error.value).startswith(message)


def test_the_pipeline_names_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    build = Build(Options(None, None), None, parse(TEXT).mesh, parse(TEXT))  # type: ignore[arg-type]

    def broken(build: Build) -> None:
        BROKEN["name"][0](build.graph)

    monkeypatch.setattr("tscompile.passes.precision.run", broken)
    with pytest.raises(InternalError, match="after the pass precision: %x is defined twice"):
        pipeline.run(build, ("precision",))
