"""A group of elementwise ops, splits, concats and reshapes -> the segments of an `Elementwise` kernel.
 Which element of which leaf an output element needs is worked out for every element of a row, by following
indices up the graph; runs of neighbours that compute alike then become loops. So any nesting of splits,
concats, reshapes and broadcasts is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tscompile.errors import InternalError
from tscompile.ir import Group, Op, Value, Weight
from tscompile.kernels.desc import Node, Segment
from tscompile.layout import stored_shape

Indices: TypeAlias = NDArray[np.int64]

# operation -> its C++ (templates/cpu/math.h, vec.h) of operands and constant
FUNCTIONS = {
    "add": "add({0}, {1})",
    "sub": "sub({0}, {1})",
    "mul": "mul({0}, {1})",
    "scale": "mul({0}, splat({value}f))",
    "shift": "add({0}, splat({value}f))",
    "neg": "neg({0})",
    "silu": "silu({0})",
    "sigmoid": "sigmoid({0})",
    "relu": "relu({0})",
    "gelu_tanh": "gelu_tanh({0})",
    "cast_bf16": "round_to<bf16>({0})",
}


@dataclass(frozen=True, eq=False)
class Read:
    """elements[i] of a row of a leaf, for the i-th element asked for."""

    leaf: int
    elements: Indices


@dataclass(frozen=True, eq=False)
class Apply:
    op: str
    operands: tuple[Expression, ...]
    value: float


Expression: TypeAlias = Read | Apply


@dataclass(frozen=True)
class Case:
    """Elements that are computed alike. where: their positions among those asked for, ascending."""

    where: Indices
    results: tuple[Expression, ...]


def segments_of(group: Group, leaves: Sequence[Value], outputs: Sequence[Value]) -> tuple[Segment, ...]:
    """The segments that cover a row of `outputs`, which are of one size. InternalError for an op that no
    kernel computes."""
    chain = _Chain(group, leaves)
    row = np.arange(outputs[0].row_elements)
    cases = chain.cases(outputs[0], row)
    for output in outputs[1:]:
        cases = _together(cases, chain.cases(output, row))
    found = [segment for case in cases for segment in _segments(case)]
    return tuple(sorted(found, key=lambda segment: segment.start))


class _Chain:
    """Follows one group's body upwards."""

    def __init__(self, group: Group, leaves: Sequence[Value]) -> None:
        self.makers: dict[int, Op] = {id(v): op for op in group.body for v in op.outputs}
        self.leaves = {id(v): i for i, v in enumerate(leaves)}
        self.known: dict[tuple[int, bytes], list[Case]] = {}

    def cases(self, value: Value, elements: Indices) -> list[Case]:
        """How to compute these elements of a row of `value`."""
        key = (id(value), elements.tobytes())
        if key not in self.known:
            self.known[key] = self._cases(value, elements)
        return self.known[key]

    def _cases(self, value: Value, elements: Indices) -> list[Case]:
        op = self.makers.get(id(value))
        if op is None:
            return [Case(np.arange(len(elements)), (Read(self.leaves[id(value)], _stored(value, elements)),))]
        if op.kind == "reshape":
            return self.cases(op.inputs[0], elements)
        if op.kind == "split":
            return self.cases(op.inputs[0], _in_whole(op, value, elements))
        if op.kind == "concat":
            return self._concat(op, value, elements)
        kind = f"cast_{op.attrs['to']}" if op.kind == "cast" else op.kind
        operands = [self.cases(x, elements % _size(x)) for x in op.inputs]  # a suffix of the shape repeats
        if kind == "cast_f32":
            return operands[0]
        if kind not in FUNCTIONS:
            raise InternalError(f"no elementwise kernel computes {kind}, which makes {value!r}")
        constant = op.attrs.get("value", 0.0)
        assert isinstance(constant, (int, float))
        cases = operands[0]
        for other in operands[1:]:
            cases = _together(cases, other)
        return [Case(case.where, (Apply(kind, case.results, float(constant)),)) for case in cases]

    def _concat(self, op: Op, value: Value, elements: Indices) -> list[Case]:
        found: list[Case] = []
        column, start = elements % _last(value), 0
        for part in op.inputs:
            stop = start + _last(part)
            where = np.flatnonzero((start <= column) & (column < stop))
            inner = elements[where] // _last(value) * _last(part) + column[where] - start
            if len(where):
                found += [Case(where[case.where], case.results) for case in self.cases(part, inner)]
            start = stop
        return found


def _last(value: Value) -> int:
    size = value.shape[-1]
    assert isinstance(size, int)
    return size


def _size(value: Value) -> int:
    return math.prod(dim for dim in value.shape if isinstance(dim, int))


def _stored(leaf: Value, elements: Indices) -> Indices:
    """Where they lie: a weight's rows are padded."""
    if not isinstance(leaf, Weight) or len(leaf.shape) < 2:
        return elements
    width = stored_shape("rows", leaf.dtype, (_last(leaf),))[-1]
    return elements // _last(leaf) * width + elements % _last(leaf)


def _in_whole(split: Op, part: Value, elements: Indices) -> Indices:
    index = next(i for i, v in enumerate(split.outputs) if v is part)
    before = sum(_last(v) for v in split.outputs[:index])
    return elements // _last(part) * _last(split.inputs[0]) + before + elements % _last(part)


def _together(left: Sequence[Case], right: Sequence[Case]) -> list[Case]:
    """What both say, for the positions that a case of each has."""
    found = []
    for a in left:
        for b in right:
            where, in_a, in_b = np.intersect1d(a.where, b.where, assume_unique=True, return_indices=True)
            if len(where):
                chosen = [_choose(x, in_a) for x in a.results] + [_choose(x, in_b) for x in b.results]
                found.append(Case(where, tuple(chosen)))
    return found


def _choose(expression: Expression, chosen: Indices) -> Expression:
    if isinstance(expression, Read):
        whole = len(chosen) == len(expression.elements)
        return expression if whole else Read(expression.leaf, expression.elements[chosen])
    operands = tuple(_choose(x, chosen) for x in expression.operands)
    same = all(x is y for x, y in zip(operands, expression.operands, strict=True))
    return expression if same else Apply(expression.op, operands, expression.value)


def _segments(case: Case) -> list[Segment]:
    reads: list[Read] = []
    for result in case.results:
        _collect(result, reads)
    nodes: list[Node] = []
    known: dict[int, int] = {}
    results = tuple(_number(result, reads, nodes, known) for result in case.results)
    return [
        Segment(
            len(runs),
            runs[0].length,
            runs[0].start,
            runs[1].start - runs[0].start if len(runs) > 1 else 0,
            tuple(
                (
                    read.leaf,
                    runs[0].firsts[i],
                    runs[1].firsts[i] - runs[0].firsts[i] if len(runs) > 1 else 0,
                    runs[0].steps[i],
                )
                for i, read in enumerate(reads)
            ),
            tuple(nodes),
            results,
        )
        for runs in _repeats(_runs(case.where, [read.elements for read in reads]))
    ]


def _alike(a: Read, b: Read) -> bool:
    return a is b or (a.leaf == b.leaf and np.array_equal(a.elements, b.elements))


def _collect(expression: Expression, reads: list[Read]) -> None:
    if isinstance(expression, Apply):
        for operand in expression.operands:
            _collect(operand, reads)
    elif not any(_alike(expression, read) for read in reads):
        reads.append(expression)


def _number(expression: Expression, reads: list[Read], nodes: list[Node], known: dict[int, int]) -> int:
    """The expression's number; equal nodes are one."""
    if isinstance(expression, Read):
        return next(i for i, read in enumerate(reads) if _alike(expression, read))
    if id(expression) not in known:
        operands = tuple(_number(x, reads, nodes, known) for x in expression.operands)
        node = Node(expression.op, operands, expression.value)
        if node not in nodes:
            nodes.append(node)
        known[id(expression)] = len(reads) + nodes.index(node)
    return known[id(expression)]


@dataclass(frozen=True)
class _Run:
    """Neighbours: output elements start.. and, of each read, elements from firsts on, steps (0 or 1)
    apart."""

    start: int
    length: int
    firsts: tuple[int, ...]
    steps: tuple[int, ...]

    def follows(self, other: _Run) -> tuple[int, ...]:
        return (self.start - other.start, *(a - b for a, b in zip(self.firsts, other.firsts, strict=True)))


def _runs(where: Indices, reads: Sequence[Indices]) -> list[_Run]:
    steps = (
        np.stack([np.diff(x) for x in reads], axis=-1) if reads else np.zeros((len(where) - 1, 0), np.int64)
    )
    ends = (np.diff(where) != 1) | ((steps != 0) & (steps != 1)).any(-1)
    changes = np.zeros_like(ends)
    changes[1:] = (steps[1:] != steps[:-1]).any(-1)
    cuts: list[int] = []
    for at in np.flatnonzero(ends | changes):
        # a step that differs from the one before ends a run, unless that one lay between two runs
        if ends[at] or not (cuts and cuts[-1] == at - 1):
            cuts.append(int(at))
    runs, first = [], 0
    for last in [*cuts, len(where) - 1]:
        inner = tuple(int(x) for x in steps[first]) if last > first else (1,) * len(reads)
        runs.append(_Run(int(where[first]), last - first + 1, tuple(int(x[first]) for x in reads), inner))
        first = last + 1
    return runs


def _repeats(runs: Sequence[_Run]) -> list[list[_Run]]:
    """Consecutive runs of one kind at even distances."""
    found: list[list[_Run]] = []
    for run in runs:
        last = found[-1] if found else []
        kind = bool(last) and (run.length, run.steps) == (last[0].length, last[0].steps)
        even = len(last) < 2 or run.follows(last[-1]) == last[1].follows(last[0])
        if kind and even:
            last.append(run)
        else:
            found.append([run])
    return found
