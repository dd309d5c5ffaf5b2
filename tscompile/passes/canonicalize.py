"""canonicalize: one form for what models and checkpoints say in several.

Takes the graph in global shapes, casts included. Gives one that computes the same, in which a linear whose
output is split is several, each of a part of the weight, and rows whose logits are wanted are gathered before
the head. Before `fit` and `propagate`, so that a merged projection is shared out by heads and columns like
one that the checkpoint keeps apart, and the head is priced for the rows that it has.
"""

from __future__ import annotations

from dataclasses import dataclass

from tscompile.build import Build, Receipt
from tscompile.ir import Op, Sym
from tscompile.match import Found, Mismatch, projection
from tscompile.ops import lookup
from tscompile.rewrite import Rewriter, weights_in_use


def run(build: Build) -> None:
    canonicalizer = _Canonicalizer(Rewriter(build.graph), build.receipts)
    canonicalizer.gather_early()
    canonicalizer.split_weights()
    build.graph.weights = weights_in_use(build.graph.ops)


@dataclass
class _Canonicalizer:
    rewriter: Rewriter
    receipts: list[Receipt]

    def note(self, pattern: str, op: Op, reason: str = "") -> None:
        self.receipts.append(Receipt(pattern, op.name, str(op.source or ""), not reason, reason))

    # --- rows gathered early ---

    def gather_early(self) -> None:
        """Moves a gather_rows up, past ops that work row by row, to before the last that does much (the
        head's linear): then only the rows whose logits are wanted are computed."""
        matcher = self.rewriter.matcher
        for gather in [op for op in self.rewriter.graph.ops if op.kind == "gather_rows"]:
            value, path, best = gather.inputs[0], list[tuple[Op, int]](), 0
            while (op := matcher.producers.get(id(value))) and matcher.single(value):
                index = _row_input(op)
                if index is None:
                    break
                path.append((op, index))
                best = len(path) if _is_heavy(op) else best
                value = op.inputs[index]
            if best:
                self._hoist(gather, path[:best])
                self.note("gather_early", path[best - 1][0])
            else:
                self.note(
                    "gather_early",
                    gather,
                    f"{gather.inputs[0]!r} comes from no large op that works row by row",
                )

    def _hoist(self, gather: Op, path: list[tuple[Op, int]]) -> None:
        """path: from the gather up to the op that it moves above."""
        top, index = path[-1]
        source, rows = top.inputs[index], gather.inputs[1]
        early = self.rewriter.like(source, f"{source.name}.rows")
        early.shape = (*rows.shape, *source.shape[1:])
        with self.rewriter.changing([gather, *(op for op, _ in path)]):
            for op, _ in path:
                op.outputs[0].shape = (*rows.shape, *op.outputs[0].shape[1:])
            top.inputs[index] = early
            path[0][0].outputs = gather.outputs  # what the gather gave now comes from the last op of the path
        new = Op("gather_rows", [source, rows], [early], {}, top.source)
        self.rewriter.replace([gather], top, [new, top])

    # --- projections that the checkpoint has merged ---

    def split_weights(self) -> None:
        """A split of a linear's output becomes linears over slices of the weight, as if the checkpoint kept
        its projections apart: each is placed by itself, and `fuse` sees what it looks for."""
        for split in [op for op in self.rewriter.graph.ops if op.kind == "split"]:
            try:
                found = self.rewriter.matcher.match(projection("whole"), split.inputs[0])
                if not self.rewriter.matcher.single(split.inputs[0]):
                    raise Mismatch(f"{split.inputs[0]!r} has other readers")
            except Mismatch as reason:
                self.note("split_weights", split, str(reason))
                continue
            self.rewriter.replace(found.inside, split, self._slices(split, found))
            self.note("split_weights", split)

    def _slices(self, split: Op, found: Found) -> list[Op]:
        ops, start = list[Op](), 0
        bias = found.values.get("whole.bias")
        for out in split.outputs:
            stop = start + out.row_elements
            raw = self.rewriter.like(out, f"{out.name}.raw") if bias else out
            weight = self.rewriter.slice_weight(found.values["whole"], start, stop)
            ops.append(Op("linear", [found.values["x"], weight], [raw], {}, split.source))
            if bias:
                part = self.rewriter.slice_weight(bias, start, stop)
                ops.append(Op("add", [raw, part], [out], {}, split.source))
            start = stop
        return ops


def _row_input(op: Op) -> int | None:
    """The input that `op` works on row by row, with one output: its first dim is the output's, and no other
    input has it, or another that is symbolic."""
    rule = lookup(op.kind).factors(op.inputs, op.outputs, op.attrs)
    factor = rule.outputs[0][0]
    having = [i for i, dims in enumerate(rule.inputs) if factor in dims]
    if factor == "." or len(op.outputs) != 1 or len(having) != 1:
        return None
    index = having[0]
    others = [dim for v in op.inputs if v is not op.inputs[index] for dim in v.shape]
    whole = rule.inputs[index][0] == factor and op.inputs[index].shape[0] == op.outputs[0].shape[0]
    whole = whole and not any(isinstance(dim, Sym) for dim in others)
    return index if whole and op.inputs[index].dtype != "i32" else None


def _is_heavy(op: Op) -> bool:
    """More than a few operations an element of output, as a linear does."""
    sizes = {"T": 1, "S": 1, "L": 1, "P": 1, "context": 1}
    return lookup(op.kind).flops(op.inputs, op.outputs, op.attrs, sizes) > 8 * op.outputs[0].row_elements
