"""Small random models: what a model file might say, of blocks chosen, sized and joined at random, with random
placements at their boundaries. Each comes from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from tscompile.errors import Source
from tscompile.ir import BATCH_ARRAYS, Attr, Graph, Op, Sym, Value, Weight
from tscompile.mesh import Mesh, by_stage
from tscompile.ops import lookup
from tscompile.recipe import Arange, Checkpoint

PAGE_SIZE, VOCAB = 2, 20
SIZES = (4, 6, 8, 8, 12, 12, 16, 24, 5, 7, 10)  # of features: those that ranks divide, and odd ones
UNARY = ("neg", "silu", "sigmoid", "relu", "gelu_tanh", "scale", "shift")
TOKENS = Sym("T")
AXES = ("tp", "ep", "dp", "cp", "pp")


def random_mesh(rng: random.Random) -> Mesh:
    """One axis, two, or now and then three, of up to 8 ranks."""
    while True:
        names = rng.sample(AXES, rng.choice([1, 1, 1, 2, 2, 3]))
        sizes = {"pp": [2, 2, 3]}  # few modules have more places to cut
        axes = tuple((name, rng.choice(sizes.get(name, [2, 2, 2, 3, 4, 4, 5, 6, 7, 8]))) for name in names)
        if math.prod(size for _, size in axes) <= 8:
            return Mesh(axes)


class RandomModel:
    """The graph as `precision` would leave it, f32."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.graph = Graph("g", random_mesh(rng))
        self.inputs: dict[str, Value] = {}
        self.live: list[Value] = []  # [T, n] of f32
        self.count = 0
        ids, (table,) = self.batch("token_ids"), self.weights((VOCAB, self.size()))
        self.live += self.emit("embedding", [ids, table], vocab_axis="")
        blocks = self.blocks()
        for _ in range(rng.choice([1, 2, 2, 3, 3, 4])):
            block = rng.choice(list(blocks))
            x = self.pick()
            x = self.boundary(x) if rng.random() < 0.3 else x
            y = blocks[block](x)
            self.live.append(self.boundary(y) if rng.random() < 0.3 else y)
            if rng.random() < 0.4:
                self.add_residual(x)
        self.finish()

    def blocks(self) -> dict[str, Callable[[Value], Value]]:
        return {
            "linear": lambda x: self.linear(x, self.size()),
            "elementwise": self.elementwise,
            "mlp": self.mlp,
            "mlp again": self.mlp,
            "norm": self.norm,
            "swiglu": self.swiglu,
            "attention": self.attention,
            "latent attention": self.latent_attention,
            "experts": self.experts,
            "heads": self.heads,
            "apart": self.apart,
        }

    # --- parts ---

    def size(self) -> int:
        return self.rng.choice(SIZES)

    def pick(self) -> Value:
        return self.rng.choice(self.live[-3:])

    def emit(self, kind: str, inputs: list[Value], **attrs: Attr) -> list[Value]:
        types = lookup(kind).infer(inputs, attrs)
        self.count += 1
        names = [f"v{self.count}" + (f".{i}" if i else "") for i in range(len(types))]
        outputs = [Value(name, t.shape, t.dtype, t.state) for name, t in zip(names, types, strict=True)]
        self.graph.ops.append(Op(kind, list(inputs), outputs, attrs, Source("model.py", self.count)))
        return list(outputs)

    def one(self, kind: str, *inputs: Value, **attrs: Attr) -> Value:
        (value,) = self.emit(kind, list(inputs), **attrs)
        return value

    def batch(self, name: str) -> Value:
        if name not in self.inputs:
            self.inputs[name] = Value(name, BATCH_ARRAYS[name], "i32")
        return self.inputs[name]

    def arrays(self) -> list[Value]:
        return [self.batch(name) for name in ("positions", "query_start", "context_len", "page_table")]

    def state(self, *shape: int) -> Value:
        name = f"kv.{len(self.inputs)}"
        self.inputs[name] = Value(name, shape, "f32", True)
        return self.inputs[name]

    def weights(self, *shapes: tuple[int, ...]) -> list[Weight]:
        """New ones; now and then one that is already there, if it has the shape."""
        found = []
        for shape in shapes:
            same = [w for w in self.graph.weights if w.shape == shape and isinstance(w.recipe, Checkpoint)]
            if same and self.rng.random() < 0.2:
                found.append(self.rng.choice(same))
                continue
            name = f"w{len(self.graph.weights)}"
            found.append(Weight(name, shape, "f32", recipe=Checkpoint(name)))
            self.graph.weights.append(found[-1])
        return found

    def boundary(self, x: Value) -> Value:
        """Each axis says something, or nothing; most say what an author would."""
        said = []
        for axis in [name for name in self.graph.mesh.names if not by_stage(name)]:
            some = ["R", "R", "S(1)", "S(0)" if self.rng.random() < 0.1 else "R", "P(sum)"]
            if self.rng.random() < 0.8:
                said.append(f"{axis}:{self.rng.choices(some, [6, 6, 5, 1, 1])[0]}")
        return self.one("boundary", x, module=f"m{self.count}", placements=" ".join(said))

    def add_residual(self, x: Value) -> None:
        y = self.live[-1]
        if y.shape != x.shape:
            y = self.linear(y, x.row_elements)
        self.live.append(self.one(self.rng.choice(["add", "add", "sub"]), x, y))

    # --- blocks: [T, n] -> [T, m] ---

    def linear(self, x: Value, size: int) -> Value:
        """With a bias, sometimes."""
        (weight,) = self.weights((size, x.row_elements))
        y = self.one("linear", x, weight)
        return self.one("add", y, *self.weights((size,))) if self.rng.random() < 0.3 else y

    def norm(self, x: Value) -> Value:
        return self.one("rms_norm", x, *self.weights((x.row_elements,)), eps=1e-2)

    def elementwise(self, x: Value) -> Value:
        same = [v for v in self.live if v.shape == x.shape and v is not x]
        if same and self.rng.random() < 0.5:
            kind = self.rng.choice(["add", "sub", "mul"])
            return self.one(kind, *self.rng.sample([x, self.rng.choice(same)], 2))
        if self.rng.random() < 0.3:  # each feature its own factor
            return self.one("mul", x, *self.weights((x.row_elements,)))
        kind = self.rng.choice([*UNARY, "cast"])
        attrs: dict[str, Attr] = {"value": 0.5} if kind in ("scale", "shift") else {}
        return self.one(kind, x, **({"to": "f32"} if kind == "cast" else attrs))

    def mlp(self, x: Value) -> Value:
        wide = self.size()
        gate = self.linear(x, wide)
        gate = self.one(self.rng.choice(["silu", "gelu_tanh"]), gate) if self.rng.random() < 0.7 else gate
        return self.linear(self.one("mul", gate, self.linear(x, wide)), self.size())

    def swiglu(self, x: Value) -> Value:
        width = self.rng.randint(1, 6)
        both = self.linear(x, 2 * (width + width % 2))
        return self.linear(self.one("swiglu", both, width=width, tile=2), self.size())

    def apart(self, x: Value) -> Value:
        """Split, one part changed, and together again."""
        n = x.row_elements
        first = self.rng.randint(1, n - 1)
        parts = self.emit("split", [x], sizes=(first, n - first))
        parts[0] = self.elementwise(parts[0])
        parts = parts if self.rng.random() < 0.5 else parts[::-1]
        return self.emit("concat", parts)[0]

    def heads(self, x: Value) -> Value:
        """As heads, each by its own norm, and flat again."""
        n = x.row_elements
        heads = self.rng.choice([h for h in range(1, n + 1) if n % h == 0])
        y = self.one("reshape", x, shape=(-1, heads, n // heads))
        y = self.norm_of(y)
        return self.one("reshape", y, shape=(-1, n))

    def norm_of(self, x: Value) -> Value:
        (weight,) = self.weights((int(str(x.shape[-1])),))
        return self.one("rms_norm", x, weight, eps=1e-2) if self.rng.random() < 0.7 else x

    def attention(self, x: Value) -> Value:
        kv_heads, dim = self.rng.choice([1, 2, 2, 3, 4]), self.rng.choice([2, 4])
        heads = kv_heads * self.rng.choice([1, 2, 2, 4])
        q, k, v = (
            self.one("reshape", self.linear(x, n * dim), shape=(-1, n, dim))
            for n in (heads, kv_heads, kv_heads)
        )
        q, k = self.norm_of(q), self.norm_of(k)
        if self.rng.random() < 0.5:
            (table,) = self.weights((64, 2))
            q, k = (self.one("rope", h, table, self.batch("positions"), interleaved=dim == 4) for h in (q, k))
        cache = self.state(kv_heads, dim)
        cache = self.one("kv_write", cache, k, v, self.batch("slots"), page_size=PAGE_SIZE)
        attrs: dict[str, Attr] = {"scale": 0.7, "window": self.rng.choice([0, 0, 3]), "page_size": PAGE_SIZE}
        out = self.one("attention", q, cache, *self.arrays(), **attrs)
        return self.linear(self.one("reshape", out, shape=(-1, heads * dim)), self.size())

    def latent_attention(self, x: Value) -> Value:
        heads, rank, rope = self.rng.choice([1, 2, 4, 6]), self.rng.choice([2, 4]), 2
        cache = self.one(
            "latent_write",
            self.state(rank + rope),
            self.linear(x, rank + rope),
            self.batch("slots"),
            page_size=PAGE_SIZE,
        )
        q = self.one("reshape", self.linear(x, heads * 4), shape=(-1, heads, 4))
        nope, rotated = self.emit("split", [q], sizes=(2, 2))
        w_k, w_v = self.weights((heads, rank, 2), (heads, 3, rank))
        q = self.one("concat", self.one("head_linear", nope, w_k), rotated)
        attrs: dict[str, Attr] = {"scale": 0.7, "rank": rank, "page_size": PAGE_SIZE}
        out = self.one("latent_attention", q, cache, *self.arrays(), **attrs)
        out = self.one("head_linear", out, w_v)
        return self.linear(self.one("reshape", out, shape=(-1, heads * 3)), self.size())

    def experts(self, x: Value) -> Value:
        count, hidden, inner = self.rng.choice([4, 4, 6, 8]), x.row_elements, self.size()
        k, grouped = self.rng.randint(1, 2), self.rng.random() < 0.3
        logits, bias = self.linear(x, count), self.weights((count,)) if self.rng.random() < 0.3 else []
        attrs: dict[str, Attr] = {"k": k, "normalize": self.rng.random() < 0.5, "scale": 1.5}
        attrs |= {"scores": self.rng.choice(["softmax", "sigmoid"])}
        attrs |= {"groups": 2, "kept": 1} if grouped else {"groups": 1, "kept": 1}
        ids, chosen = self.emit("route", [logits, *bias], **attrs)
        numbers = Weight(f"w{len(self.graph.weights)}", (count,), "f32", recipe=Arange(count))
        self.graph.weights.append(numbers)
        order, counts = self.emit("sort_routes", [ids, numbers])
        rows = self.one("dispatch", x, order, k=k)
        up, down = self.weights((count, inner, hidden), (count, self.size(), inner))
        rows = self.one("silu", self.one("expert_linear", rows, counts, up))
        return self.one("combine", self.one("expert_linear", rows, counts, down), order, chosen)

    # --- the end ---

    def finish(self) -> None:
        """One output or two; of all tokens, or of some; and what nothing reads is taken away."""
        for x in dict.fromkeys([self.live[-1], *([self.pick()] if self.rng.random() < 0.3 else [])]):
            value = x
            if self.rng.random() < 0.5:
                value = self.one("gather_rows", value, self.batch("logit_rows"))
                if self.rng.random() < 0.5:
                    value = self.linear(value, self.size())
            self.graph.outputs.append(value)
        self.prune()

    def prune(self) -> None:
        """Drops what no output needs."""
        needed = {id(v) for v in self.graph.outputs}
        kept = []
        for op in reversed(self.graph.ops):
            if any(id(v) in needed for v in op.outputs):
                needed |= {id(v) for v in op.inputs}
                kept.append(op)
        self.graph.ops = kept[::-1]
        given = [v for v in self.inputs.values() if id(v) in needed]
        self.graph.inputs = sorted(given, key=lambda value: value.state)
        self.graph.weights = [weight for weight in self.graph.weights if id(weight) in needed]
