"""What cannot be placed, and what is said then: the texts are part of the interface."""

from __future__ import annotations

import golden
import pytest

from tscompile import nn
from tscompile.errors import CompileError
from tscompile.parser import parse
from tscompile.passes import propagate
from tscompile.placement import Owned, Partial, Replicate, Shard
from tscompile.price import Prices
from tscompile.topology import topology_of

GRAPH = """graph g mesh(MESH) {
    input %token_ids: i32[T]
    weight @table: f32[320, 1024] = checkpoint("table")
    weight @up: f32[4096, 1024] = checkpoint("up")
    weight @down: f32[1023, 4096] = checkpoint("down")
    %x: f32[T, 1024] = embedding(%token_ids, @table; vocab_axis="")  # model.py:30
    %a: f32[T, 1024] = boundary(%x; module="mlp", placements="TAKES")  # model.py:31
    %h: f32[T, 4096] = linear(%a, @up)  # model.py:10
    %i: f32[T, 4096] = boundary(%h; module="mlp.act", placements="ACT")  # model.py:11
    %s: f32[T, 4096] = silu(%i)  # model.py:12
    %y: f32[T, 1023] = linear(%s, @down)  # model.py:13
    %b: f32[T, 1023] = boundary(%y; module="mlp", placements="GIVES")  # model.py:32
    output %b }"""


def error_of(
    takes: str = "", act: str = "", gives: str = "", mesh: str = "tp=2", target: str = "cpu-avx2"
) -> str:
    text = GRAPH.replace("MESH", mesh).replace("TAKES", takes).replace("ACT", act).replace("GIVES", gives)
    with pytest.raises(CompileError) as error:
        propagate.place(golden.build_of(parse(text)), Prices.of(target, 64))
    return str(error.value)


def test_tokens_are_not_the_authors_to_shard() -> None:
    assert error_of(takes="tp:S(0)") == (
        "model.py:31: mlp says tp:S(0), but its value %x is [T, 1024]: wanted a dim whose size is known "
        "(tp:S(1)); which rank has which tokens is the compiler's to choose"
    )


def test_a_dim_that_is_not_there() -> None:
    assert error_of(takes="tp:S(2)") == (
        "model.py:31: mlp says tp:S(2), but its value %x is [T, 1024]: wanted a dim whose size is known "
        "(tp:S(1)); which rank has which tokens is the compiler's to choose"
    )


def test_a_size_that_does_not_divide() -> None:
    assert error_of(gives="tp:S(1)") == (
        "model.py:32: mlp says tp:S(1), but its value %y is [T, 1023]: tp=2 does not divide 1023; "
        "tp can be 1, 3, 11, 31, 33"
    )


def test_a_prime_number_of_ranks() -> None:
    assert error_of(takes="tp:S(1)", mesh="tp=7") == (
        "model.py:31: mlp says tp:S(1), but its value %x is [T, 1024]: tp=7 does not divide 1024; "
        "tp can be 1, 2, 4, 8, 16, 32, 64"
    )


def test_one_dim_over_two_axes() -> None:
    assert error_of(takes="ep:S(1) tp:S(1)", mesh="ep=2, tp=2") == (
        "model.py:31: mlp says S(1) on ep and on tp: wanted different dims of %x [T, 1024], "
        "as a dim is sharded over one axis at most"
    )


def test_a_maximum_of_what_is_no_maximum() -> None:
    assert error_of(gives="tp:P(max)") == (
        "model.py:32: boundary -> %b cannot be placed on tp=2: it takes %y as P(max), but linear "
        "(model.py:13) gives it as P(sum) or R, and no collective leads there; legal would be R"
    )


def test_a_maximum_inside_a_module() -> None:
    assert error_of(act="tp:P(max)") == (
        "model.py:11: boundary -> %i cannot be placed on tp=2: it takes %h as P(max), but linear "
        "(model.py:10) gives it as P(sum) or R or S(1), and no collective leads there; "
        "legal would be R or S(1)"
    )


def test_the_axis_that_is_wrong_is_named() -> None:
    assert error_of(takes="ep:P(max)", mesh="ep=4, tp=2") == (
        "model.py:31: boundary -> %a cannot be placed on ep=4: it takes %x as P(max), but embedding "
        "(model.py:30) gives it as P(sum) or R or S(0) or S(1), and no collective leads there; "
        "legal would be R or S(1)"
    )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"tpp": Replicate()}, "placements: 'tpp' is no mesh axis; known are tp, ep, dp, cp, pp"),
        ({"tp": "S(0)"}, "placements: tp is 'S(0)', wanted Replicate(), Shard(dim) or Partial()"),
        ({"tp": Shard(-1)}, "placements: tp is S(-1), wanted a dim counted from 0"),
        ({"tp": Owned()}, "placements: tp is Owned(), wanted Replicate(), Shard(dim) or Partial()"),
        (
            {"pp": Shard(0)},
            "placements: pp is an axis of stages, and which stage runs a module is the compiler's to choose: "
            "leave it out",
        ),
    ],
)
def test_what_is_no_placement(said: dict[str, object], message: str) -> None:
    with pytest.raises(CompileError) as error:
        nn.placements(takes={"tp": Partial()}, gives=said)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_a_target_that_is_not_known() -> None:
    with pytest.raises(CompileError) as error:
        topology_of("sm_80")
    assert str(error.value) == (
        "unknown target 'sm_80'; known are cpu-amx, cpu-avx2, cpu-avx512, gfx950, sm_100a, sm_90a"
    )
