"""fit: vocabularies padded, KV heads repeated, and what cannot be."""

from __future__ import annotations

import golden
import pytest

from tscompile.errors import CompileError
from tscompile.ir import Graph
from tscompile.mesh import Mesh
from tscompile.parser import parse
from tscompile.passes import fit
from tscompile.printer import print_graph, print_recipe
from tscompile.verify import verify

GRAPH = """graph g mesh(tp=RANKS) {
    input %token_ids: i32[T]
    input %slots: i32[T]
    input %query_start: i32[S+1]
    input %context_len: i32[S]
    input %page_table: i32[S, P]
    input %positions: i32[T]
    input %kv.0: state f32[2, 4]
    weight @table: f32[VOCAB, 16] = checkpoint("table")
    weight @q: f32[32, 16] = checkpoint("q")
    weight @k: f32[8, 16] = checkpoint("k")
    weight @k_bias: f32[8] = checkpoint("k_bias")
    weight @norm: f32[4] = checkpoint("norm")
    weight @v: f32[8, 16] = checkpoint("v")
    weight @o: f32[16, 32] = checkpoint("o")
    %x: f32[T, 16] = embedding(%token_ids, @table; vocab_axis="")
    %q0: f32[T, 32] = linear(%x, @q)
    %q1: f32[T, 8, 4] = reshape(%q0; shape=[-1, 8, 4])
    %k0: f32[T, 8] = linear(%x, @k)
    %kb: f32[T, 8] = add(%k0, @k_bias)
    %k1: f32[T, 2, 4] = reshape(%kb; shape=[-1, 2, 4])
    %k2: f32[T, 2, 4] = rms_norm(%k1, @norm; eps=1e-6)
    %v0: f32[T, 8] = linear(%x, @v)
    %v1: f32[T, 2, 4] = reshape(%v0; shape=[-1, 2, 4])
    %kv: state f32[2, 4] = kv_write(%kv.0, %k2, %v1, %slots; page_size=32)  # model.py:7
    %a: f32[T, 8, 4] = attention(%q1, %kv, %positions, %query_start, %context_len, %page_table; page_size=32, scale=0.5, window=0)
    %a1: f32[T, 32] = reshape(%a; shape=[-1, 32])
    %y: f32[T, 16] = linear(%a1, @o)
    %z: f32[T, VOCAB] = linear(%y, @table)
    output %z }"""  # noqa: E501


def fitted(ranks: int, vocab: int = 64, graph: str = GRAPH) -> tuple[Graph, list[str]]:
    build = golden.build_of(parse(graph.replace("RANKS", str(ranks)).replace("VOCAB", str(vocab))))
    verify(build.graph)
    fit.run(build)
    verify(build.graph)
    return build.graph, build.notes


def recipes(graph: Graph) -> dict[str, str]:
    return {weight.name: print_recipe(weight.recipe) for weight in graph.weights}


def test_what_divides_is_left_alone() -> None:
    before = print_graph(parse(GRAPH.replace("RANKS", "2").replace("VOCAB", "64")))
    graph, notes = fitted(2)
    assert (print_graph(graph), notes) == (before, [])


def test_golden_is_left_alone() -> None:
    assert print_graph(golden.after("canonicalize", fit.run).graph) == print_graph(
        golden.read("canonicalize")
    )


def test_one_rank_is_left_alone() -> None:
    assert golden.after("canonicalize", fit.run, Mesh()).notes == []


@pytest.mark.parametrize(("ranks", "times"), [(4, 2), (8, 4)])
def test_kv_heads_are_repeated(ranks: int, times: int) -> None:
    graph, notes = fitted(ranks)
    assert notes == [f"tp={ranks}: each of the 2 KV heads lies on {times} ranks, in 1 layer"]
    found = recipes(graph)
    for name in ("k", "k_bias", "v"):
        assert found[name] == f'repeat(checkpoint("{name}"); dim=0, parts=2, times={times})'
    for name in ("q", "norm", "o", "table"):
        assert found[name] == f'checkpoint("{name}")'
    assert graph.states[0].shape == (2 * times, 4)
    values = {v.name: v.shape[1:] for v in graph.values()}
    assert (values["k2"], values["a"]) == ((2 * times, 4), (8, 4))


def test_a_tied_table_is_padded_once() -> None:
    graph, notes = fitted(2, vocab=63)
    assert notes == ["tp=2: @table padded with zeros from 63 to 64"]
    assert recipes(graph)["table"] == 'pad(checkpoint("table"); dim=0, size=64)'
    assert graph.outputs[0].shape[1] == 64


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(CompileError) as error:
        fitted(3)
    assert str(error.value) == (
        "model.py:7: tp=3 does not divide the 2 KV heads of %kv, nor can each lie on as many ranks as others "
        "do, with an equal part of the 8 query heads: tp can be 1, 2, 4, 8"
    )


def test_more_ranks_than_query_heads() -> None:
    with pytest.raises(CompileError, match="equal part of the 8 query heads: tp can be 1, 2, 4, 8"):
        fitted(16)


def test_heads_that_cannot_be_repeated() -> None:
    """A norm over the whole row of k depends on all heads at once."""
    whole = (
        GRAPH.replace("@norm: f32[4]", "@norm: f32[8]")
        .replace("%k1: f32[T, 2, 4] = reshape(%kb", "%k2: f32[T, 2, 4] = reshape(%k1")
        .replace("    %k2: f32[T, 2, 4] = rms_norm(%k1, @norm; eps=1e-6)\n", "")
        .replace("    %k2:", "    %k1: f32[T, 8] = rms_norm(%kb, @norm; eps=1e-6)  # model.py:5\n    %k2:")
    )
    with pytest.raises(CompileError) as error:
        fitted(4, graph=whole)
    assert str(error.value) == (
        "model.py:7: tp=4 is more than the 2 KV heads of %kv, and they cannot be repeated: rms_norm -> %k1 "
        "(model.py:5) needs dim 1 of %k1 as it is. tp can be 1, 2"
    )


def test_keys_that_are_given_out_too() -> None:
    with pytest.raises(CompileError, match="they cannot be repeated: %kb is an output of the model"):
        fitted(4, graph=GRAPH.replace("output %z", "output %z, %kb"))


def test_keys_of_one_head_that_are_two_heads_elsewhere() -> None:
    """Repeated as one head they would be a b a b, and the others' readers take a a b b."""
    one_head = """
    %w1: f32[T, 1, 8] = reshape(%kb; shape=[-1, 1, 8])
    %w: state f32[1, 8] = kv_write(%kv.1, %w1, %w1, %slots; page_size=32)  # model.py:6
    %q2: f32[T, 4, 8] = reshape(%q0; shape=[-1, 4, 8])
    %b: f32[T, 4, 8] = attention(%q2, %w, %positions, %query_start, %context_len, %page_table; ATTRS)
    %k1:"""
    one_head = one_head.replace("ATTRS", "page_size=32, scale=0.5, window=0")
    graph = GRAPH.replace("\n    %k1:", one_head)
    graph = graph.replace("    weight @table", "    input %kv.1: state f32[1, 8]\n    weight @table", 1)
    with pytest.raises(CompileError) as error:
        fitted(2, graph=graph)
    assert str(error.value) == (
        "model.py:6: tp=2 is more than the 1 KV heads of %w, and they cannot be repeated: attention -> %a "
        "needs dim 0 of %kv as it is. tp can be 1"
    )
