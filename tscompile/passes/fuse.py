"""fuse: every op becomes part of a group, and each group one kernel (tscompile/ir.py, GROUP_KINDS).

Takes one rank's graph of registry ops. Gives a graph of groups, and build.receipts: for each pattern and
place where it was tried, whether it matched, or why not. Rewrites come first (gate and up merged, QKV
merged), then groups are cut around anchors. What a pattern or a group is stands in the tables below;
tscompile/match.py matches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tscompile.build import Build, Receipt
from tscompile.cut import Cut, Cutter
from tscompile.ir import Graph, Op, Value, Weight
from tscompile.match import Bind, Either, Found, Mismatch, Node, Parameter, Pattern, Through, projection
from tscompile.recipe import Concat, Interleave, Recipe, checkpoint_names
from tscompile.rewrite import Rewriter, common_path, in_order

TILE = 16  # columns that gate and up take in turn: the kernels' tile

HEAD = ("cast", "rope", "rms_norm")  # what a head may go through between projection and cache, nearest first
Q, K, V = projection("q"), projection("k"), projection("v")
WRITE = Node("kv_write", (Bind("state"), Through(HEAD, K, "k"), Through(("cast",), V, "v")), name="write")
QKV = Node("attention", (Through(HEAD, Q, "q"), WRITE))
LATENT = Node("rms_norm", (projection("latent"), Parameter("norm")))
LATENT_ROW = Node("concat", (LATENT, Through(("rope",), projection("k_rope"), "k_rope")))
LATENT_WRITE = Node("latent_write", (Bind("state"), Through(("cast",), LATENT_ROW, "row")))
Q_LATENT = Node("head_linear", (Through(("cast",), Bind("q_nope"), "x"), Parameter("w_k")))
LATENT_QUERY = Node("concat", (Q_LATENT, Node("rope", (Bind("q_rope"), Parameter("table")), name="rope")))
QUERY = Node("latent_attention", (Through(("cast",), LATENT_QUERY, "q"),))
GATE_UP = Node("mul", (Node("silu", (projection("gate"),)), projection("up")), swap=True)


def expert_projection(name: str) -> Pattern:
    """expert_linear(rows, counts, weight)."""
    return Node("expert_linear", (Bind("x"), Bind("counts"), Parameter(name)), name=f"{name}.linear")


EXPERTS_GATE_UP = Node(
    "mul", (Node("silu", (expert_projection("gate"),)), expert_projection("up")), swap=True
)


def is_bias(add: Op, value: Value) -> str:
    """Why `add` adds no bias to `value`, or nothing."""
    other = add.inputs[1] if add.inputs[0] is value else add.inputs[0]
    vector = isinstance(other, Weight) and other.shape == value.shape[-1:]
    return "" if vector else f"what is added, {other!r}, is no bias: a weight of the row's length"


def is_residual(add: Op, value: Value) -> str:
    """Why `add` adds no two activations of one shape, or nothing."""
    same = add.inputs[0].shape == add.inputs[1].shape and not any(isinstance(v, Weight) for v in add.inputs)
    return "" if same else "the sum is not of two values of one shape"


# In order: an op belongs to the first group that takes it. What is left becomes elementwise groups.
CUTS = (
    Cut(
        "linear",
        "linear",
        before={0: ("gather_rows",)},
        after=("add", "swiglu", "cast"),
        when={"add": is_bias},
    ),
    Cut(
        "all_reduce_rms_norm",
        "rms_norm",
        before={0: ("add", "all_reduce")},
        after=("cast",),
        when={"add": is_residual},
        shared=("add",),
        receipt=("all_reduce_residual_rms_norm", "all_reduce"),
        required=True,
    ),
    Cut(
        "rms_norm",
        "rms_norm",
        before={0: ("add",)},
        after=("cast",),
        when={"add": is_residual},
        shared=("add",),
        receipt=("residual_rms_norm", "add"),
    ),
    Cut("attention", "attention", after=("cast",)),
    Cut("head_linear", "head_linear", after=("cast",)),
    Cut("latent_attention", "latent_attention", after=("cast",)),
    Cut("latent_write", "latent_write", before={1: ("cast",)}),
    Cut("embed", "embedding"),
    Cut("rope", "rope", after=("cast",)),
    Cut("kv_write", "kv_write", before={1: ("cast",), 2: ("cast",)}),
    Cut("merge_parts", "merge_parts", after=("cast",)),
    Cut("gather_rows", "gather_rows"),
    Cut("route", "route"),
    Cut("sort_routes", "sort_routes"),
    Cut("experts", "expert_linear", before={0: ("dispatch",)}, after=("swiglu", "cast", "combine")),
    Cut("dispatch", "dispatch"),
    Cut("combine", "combine"),
)


def run(build: Build) -> None:
    for graph in build.buckets.values():
        fuse(graph, build.receipts)
    # a bucket whose weights merge otherwise would have them twice in the plan: the next one runs its steps
    merged = {weight.name for weight in build.graph.weights}
    build.smaller = {
        tokens: graph
        for tokens, graph in build.smaller.items()
        if merged >= {weight.name for weight in graph.weights if any(checkpoint_names(weight.recipe))}
    }


def fuse(graph: Graph, receipts: list[Receipt]) -> None:
    fuser = _Fuser(Rewriter(graph), receipts)
    fuser.merge("gate_up_swiglu", "mul", Either(EXPERTS_GATE_UP, GATE_UP), fuser.merge_gate_up)
    fuser.merge("qkv", "attention", QKV, fuser.merge_qkv)
    fuser.merge("latent_write", "latent_write", LATENT_WRITE, fuser.merge_latent)
    fuser.merge("latent_query", "latent_attention", QUERY, fuser.join_query)
    graph.ops = in_order(graph.ops)
    cutter = Cutter(graph, fuser.rewriter.names)
    for kind, members in fuser.groups:
        cutter.group(kind, members)
        if kind == "qkv_write":
            fuser.note("qk_norm_rope_kv_write", members[-1])
    for cut in CUTS:
        for op, reason in cutter.cut(cut):
            fuser.note(cut.receipt[0], op, reason)
    cutter.finish()


@dataclass
class _Fuser:
    rewriter: Rewriter
    receipts: list[Receipt]
    groups: list[tuple[str, list[Op]]] = field(default_factory=list)  # found whole: a kind and its members

    def note(self, pattern: str, op: Op, reason: str = "") -> None:
        self.receipts.append(Receipt(pattern, op.name, str(op.source or ""), not reason, reason))

    def merge(self, pattern: str, anchor: str, wanted: Pattern, rewrite: Callable[[Op, Found], None]) -> None:
        """Tries a pattern at every op of the anchor's kind."""
        for op in [op for op in self.rewriter.graph.ops if op.kind == anchor]:
            try:
                rewrite(op, self.rewriter.matcher.match(wanted, op.outputs[0]))
                self.note(pattern, op)
            except Mismatch as reason:
                self.note(pattern, op, str(reason))

    # --- merged projections ---

    def merged(
        self, found: Found, names: tuple[str, ...], called: str, join: Callable[..., Concat | Interleave]
    ) -> Value:
        """One linear (and bias) in place of those that the match bound as `names`. Its output."""
        linears = [found.ops[f"{name}.linear"] for name in names]
        adds = [found.ops[f"{name}.add"] for name in names if f"{name}.add" in found.ops]
        if adds and len(adds) < len(linears):
            raise Mismatch("some of the projections have a bias, wanted all or none")
        path = common_path(op.name for op in linears)
        weight = self._joined(f"{path}{called}.weight", [found.values[name] for name in names], join)
        out = self.rewriter.like(linears[0].outputs[0], f"{path}{called}")
        out.shape = (*out.shape[:-1], weight.shape[-2])
        inputs = [*linears[0].inputs[:-1], weight]
        ops = [Op(linears[0].kind, inputs, [out], {}, linears[0].source)]
        if adds:
            bias = self._joined(
                f"{path}{called}.bias", [found.values[f"{name}.bias"] for name in names], join
            )
            biased = self.rewriter.like(out, f"{path}{called}.biased")
            ops.append(Op("add", [out, bias], [biased], {}, linears[0].source))
        self.rewriter.replace([*linears[1:], *adds], linears[0], ops)
        return ops[-1].outputs[0]

    def _joined(self, name: str, parts: list[Value], join: Callable[..., Concat | Interleave]) -> Weight:
        recipes: list[Recipe] = [part.recipe for part in parts if isinstance(part, Weight)]
        return self.rewriter.merge_weights(name, join(tuple(recipes)), parts)

    def merge_gate_up(self, mul: Op, found: Found) -> None:
        gate = found.values["gate"]
        width, dim = gate.shape[-2], len(gate.shape) - 2
        if not isinstance(width, int) or width != found.values["up"].shape[-2]:
            raise Mismatch("gate and up are of different widths")
        silu = [op for op in found.inside if op.kind == "silu"]
        joined = self.merged(found, ("gate", "up"), "gate_up", lambda parts: Interleave(parts, TILE, dim))
        swiglu = Op("swiglu", [joined], mul.outputs, {"width": width, "tile": TILE}, mul.source)
        self.rewriter.replace(silu, mul, [swiglu])

    def merge_qkv(self, attention: Op, found: Found) -> None:
        heads = [op for name in "qkv" for op in found.chains[name]]
        if any(op.kind == "rms_norm" and len(op.inputs[0].shape) != 3 for op in heads):
            raise Mismatch("q or k is normed over the whole row, wanted over each head [T, heads, head_dim]")
        if len({id(op.inputs[1]) for op in heads if op.kind == "rope"}) > 1:
            raise Mismatch("q and k are rotated by different tables")
        split = self._merged_and_split(found, ("q", "k", "v"), "qkv")
        self.groups.append(("qkv_write", [split, *heads, found.ops["write"]]))

    def _merged_and_split(self, found: Found, names: tuple[str, ...], called: str) -> Op:
        """The projections merged into one, and the split that gives its parts to their readers."""
        tops = [found.ops.get(f"{name}.add", found.ops[f"{name}.linear"]).outputs[0] for name in names]
        joined = self.merged(found, names, called, Concat)
        parts = [
            self.rewriter.like(top, f"{joined.name}.{name}") for name, top in zip(names, tops, strict=True)
        ]
        sizes = tuple(part.row_elements for part in parts)
        split = Op("split", [joined], parts, {"sizes": sizes}, found.ops[f"{names[0]}.linear"].source)
        maker = self.rewriter.matcher.producers[id(joined)]
        self.rewriter.replace([], maker, [maker, split])
        for top, part in zip(tops, parts, strict=True):
            self.rewriter.reread(top, part)
        return split

    # --- latent attention ---

    def merge_latent(self, write: Op, found: Found) -> None:
        """The projection of latent and key whole again, and all between it and the cache one group."""
        rope = next((op for op in found.chains["k_rope"] if op.kind == "rope"), None)
        if rope is None or rope.inputs[1].shape[1] != rope.inputs[0].row_elements:
            raise Mismatch("the key is not rotated whole")
        between = [op for op in found.inside if op.kind not in ("linear", "add")]
        split = self._merged_and_split(found, ("latent", "k_rope"), "kv_a")
        self.groups.append(("latent_write", [split, *between]))

    def join_query(self, attention: Op, found: Found) -> None:
        """A query's two parts, read from one row and written to one."""
        split = self.rewriter.matcher.producers.get(id(found.values["q_nope"]))
        parts = [found.values["q_nope"], found.values["q_rope"]]
        if split is None or split.kind != "split" or split.outputs != parts:
            raise Mismatch("q_nope and q_rope are not the two parts of one split")
        if not all(self.rewriter.matcher.single(part) for part in parts):
            raise Mismatch("a part of q has other readers")
        if parts[1].shape[-1] != found.values["table"].shape[1]:
            raise Mismatch("q_rope is not rotated whole")
        members = [op for op in found.inside if op is not attention]
        self.groups.append(("head_linear", [split, *members]))
