"""The graph's text: what prints, parses back to the same; what is no graph is refused by line."""

from __future__ import annotations

import pytest
from graphs import random_graph

from tscompile.parser import ParseError, parse
from tscompile.printer import print_graph
from tscompile.verify import verify


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_random_graphs_round_trip(start: int) -> None:
    for seed in range(start, start + 100):
        graph = random_graph(seed)
        verify(graph)
        text = print_graph(graph)
        again = parse(text)
        assert print_graph(again) == text, f"seed {seed}"
        verify(again)
        assert [op.attrs for op in again.ops] == [op.attrs for op in graph.ops], f"seed {seed}"
        assert [w.recipe for w in again.weights] == [w.recipe for w in graph.weights], f"seed {seed}"


def test_line_breaks_mean_nothing() -> None:
    text = print_graph(random_graph(7)).replace("  #", " #")
    spread = text.replace(" = ", "\n=\n").replace(", ", " ,\n ")
    assert print_graph(parse(spread)).replace("  #", " #") == text


def test_dims_of_routed_rows() -> None:
    text = GOOD.replace("output %x", "").replace(
        "}",
        """  weight @numbers: f32[4] = arange(; count=4)
  weight @router: f32[4, 4] = stack(checkpoint("a"), checkpoint("b"))
  %s: f32[T, 4] = linear(%x, @router)
  %i: i32[T, 2], %w2: f32[T, 2] = route(%s; groups=1, k=2, kept=1, normalize=false, scale=1.0,
    scores="softmax")
  %o: i32[R*2], %c: i32[4] = sort_routes(%i, @numbers)
  output %o
}""",
    )
    graph = parse(text)
    verify(graph)
    assert str(graph.outputs[0].shape[0]) == "R*2"
    assert print_graph(parse(print_graph(graph))) == print_graph(graph)


GOOD = """graph g mesh(tp=2) {
  input %token_ids: i32[T]
  weight @w: f32[4, 4] = checkpoint("w")
  %x: f32[T, 4] = embedding(%token_ids, @w; vocab_axis="")
  output %x
}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("graph g", "grap g", "line 1: found 'grap', wanted 'graph'"),
        ("tp=2", "tp=2.5", "line 1: found '2.5', wanted an integer"),
        ("i32[T]", "i33[T]", "line 2: found 'i33', wanted a dtype (f32, bf16, f16, i32)"),
        ("i32[T]", "i32[%]", "line 2: found '%', wanted a name"),
        ('checkpoint("w")', "checkpoint(w)", "line 3: found 'w', wanted a string"),
        ('checkpoint("w")', 'conat(checkpoint("w"); dim=0)', "line 4: no recipe 'conat'"),
        ("@w; ", "@v; ", "line 4: found 'v', wanted a value that is defined above"),
        ("; vocab", " vocab", "line 4: found 'vocab_axis', wanted ')'"),
        ('=""', "=$", "line 4: '$' begins no token"),
        ("output %x", "output x", "line 5: found 'x', wanted a value"),
        ("}", "", "line 7: found 'the end', wanted '}'"),
        (
            "f32[T, 4] =",
            "f32[T, 4] tp:S(x) =",
            "line 4: 'S(x)' is not a placement; known are R, S(dim), S(dim,T), P(sum), P(max), O, "
            "stage(index)",
        ),
    ],
)
def test_what_is_no_graph(old: str, new: str, message: str) -> None:
    assert print_graph(parse(GOOD)) == GOOD
    with pytest.raises(ParseError) as error:
        parse(GOOD.replace(old, new, 1))
    assert str(error.value) == message
