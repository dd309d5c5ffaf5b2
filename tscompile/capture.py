"""Captures a model by torch.fx symbolic tracing on the meta device: each call becomes ops of the graph the
moment it is traced, so that shapes are known while the model's own code runs (x.shape gives ints and the
symbolic T), and an error names its line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import fx, nn

from tscompile.errors import CompileError, Source
from tscompile.ir import BATCH_ARRAYS, Attr, Graph, Op, Shape, Sym, Value, Weight
from tscompile.lower import MODULES
from tscompile.lower_functions import FUNCTIONS, METHODS
from tscompile.mesh import Mesh
from tscompile.models import calling_line, shown, user_code
from tscompile.nn import Boundary
from tscompile.ops import ShapeError, lookup
from tscompile.ops.base import text_of
from tscompile.recipe import Checkpoint, Origin, Recipe


class Tensor(fx.Proxy):
    """A traced value. What the model can ask of it is known: shape, size, dim, dtype."""

    value: Value

    @property
    def shape(self) -> Shape:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return len(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def size(self, dim: int | None = None) -> Any:
        return self.value.shape if dim is None else self.value.shape[dim]

    def dim(self) -> int:
        return len(self.value.shape)

    def __len__(self) -> int:
        raise CompileError(
            f"len() of a value of {text_of(self.value.shape)}: ask x.shape for the dims you need"
        )

    def __iter__(self) -> Iterator[Any]:
        raise CompileError(
            f"iterating over a value of {text_of(self.value.shape)}: use split, chunk or unflatten"
        )


class Builder:
    """What a lowering writes with: emits ops into the graph, named by the module that runs and placed at its
    line."""

    def __init__(self, name: str, mesh: Mesh, model_path: Path, page_size: int) -> None:
        self.graph = Graph(name, mesh)
        self.page_size = page_size
        self.model_path = model_path
        self.path: list[str] = []  # of the module that runs, the root's is ""
        self.states: dict[str, Value] = {}  # module path -> its KV state, as updated last
        self.origins: dict[int, tuple[Origin, ...]] = {}  # id(weight), for those of the checkpoint
        self._weights: dict[Recipe, Weight] = {}
        self._names: set[str] = set()

    def emit(
        self, kind: str, inputs: Sequence[Value], attrs: dict[str, Attr] | None = None, name: str = ""
    ) -> list[Value]:
        """One op at the end of the graph. name: of the first output, under the running module's path; default
        the kind. CompileError if shapes or dtypes do not fit."""
        attrs = attrs or {}
        definition = lookup(kind)
        for index, value in enumerate(inputs):
            wanted = definition.slot(index).dtype
            if (wanted == "i32") != (value.dtype == "i32") and wanted != "any":
                raise CompileError(
                    f"{kind} takes {'integers' if wanted == 'i32' else 'floats'} as its "
                    f"{definition.slot(index).name}, not {value!r} of {value.dtype}",
                    self.source(),
                )
        try:
            types = definition.infer(inputs, attrs)
        except ShapeError as error:
            raise CompileError(str(error), self.source()) from None
        first = self.fresh(".".join(part for part in (*self.path[-1:], name or kind) if part))
        outputs = [
            Value(first if i == 0 else self.fresh(f"{first}.{i}"), t.shape, t.dtype, t.state)
            for i, t in enumerate(types)
        ]
        self.graph.ops.append(Op(kind, list(inputs), outputs, attrs, self.source()))
        return outputs

    def fresh(self, name: str) -> str:
        """`name`, or with a number if it is taken."""
        unique, count = name, 1
        while unique in self._names:
            count += 1
            unique = f"{name}_{count}"
        self._names.add(unique)
        return unique

    def source(self) -> Source | None:
        return calling_line(self.model_path)

    def forward_line(self, model: nn.Module) -> Source:
        """Where the model's forward begins."""
        code = type(model).forward.__code__
        return Source(shown(Path(code.co_filename)), code.co_firstlineno)

    def batch_array(self, name: str) -> Value:
        """A batch array as graph input, made at first use."""
        for value in self.graph.inputs:
            if value.name == name:
                return value
        value = Value(self.fresh(name), BATCH_ARRAYS[name], "i32")
        self.graph.inputs.append(value)
        return value

    def state(self, shape: tuple[int, ...]) -> Value:
        """The next layer's KV cache, of `shape` a token, as graph input."""
        value = Value(self.fresh(f"kv.{len(self.graph.states)}"), shape, "f32", state=True)
        self.graph.inputs.append(value)
        return value

    def weight(self, name: str, shape: Sequence[int], recipe: Recipe) -> Weight:
        """A weight; equal recipes share one."""
        if recipe not in self._weights:
            weight = Weight(self.fresh(name), tuple(shape), "f32", recipe=recipe)
            self._weights[recipe] = weight
            self.graph.weights.append(weight)
        return self._weights[recipe]

    def parameter(self, module: nn.Module, name: str) -> Weight:
        """A leaf module's parameter."""
        parameter = module._parameters[name]  # not getattr, which fx has made give traced values
        assert parameter is not None
        return self.weight_of(parameter)

    def weight_of(self, parameter: nn.Parameter) -> Weight:
        name = self.parameter_names[id(parameter)]
        return self.weight_from(name, parameter.shape, (Origin(Checkpoint(name), tuple(parameter.shape)),))

    def weight_from(self, name: str, shape: Sequence[int], origins: Sequence[Origin]) -> Weight:
        """A weight of the checkpoint's, by the first of `origins` that it has; they name the model's
        parameters."""
        weight = self.weight(name, shape, origins[0].recipe)
        self.origins[id(weight)] = tuple(origins)
        return weight

    parameter_names: dict[int, str]


class Tracer(fx.Tracer):
    """Lowers each call as it is traced."""

    def __init__(self, builder: Builder) -> None:
        super().__init__()
        self.builder = builder
        self.result: Value | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in MODULES or (
            type(m).__module__.startswith("torch.nn")
            and not isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        )

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Tensor(node, self)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        boundary: Boundary | None = getattr(m, "tscompile_boundary", None)
        self.builder.path.append(path)
        try:
            if boundary and args:
                args = (self._boundary(args[0], path, boundary.takes, "takes"), *args[1:])
            result = super().call_module(m, forward, args, kwargs)
            return self._boundary(result, path, boundary.gives, "gives") if boundary else result
        finally:
            self.builder.path.pop()

    def _boundary(self, x: Any, path: str, wanted: Any, side: str) -> Any:
        if not isinstance(x, Tensor):
            raise CompileError(
                f"{path} has placements, so it must take and give one tensor, not {type(x).__name__}"
            )
        names = self.builder.graph.mesh.names
        text = " ".join(f"{axis}:{wanted[axis]}" for axis in names if axis in wanted)
        attrs: dict[str, Attr] = {"module": path, "placements": text}
        return self.wrap(self.builder.emit("boundary", [x.value], attrs, name=side)[0])

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return self.wrap(self.builder.weight_of(attr_val)) if isinstance(attr_val, nn.Parameter) else attr_val

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        match kind:
            case "placeholder":
                return self.wrap(self.builder.batch_array("token_ids"))
            case "call_module":
                module = self.root.get_submodule(target)
                lowering, what = MODULES.get(type(module)), f"the module {type(module).__name__}"
                args = (module, *args)
            case "call_function":
                lowering, what = FUNCTIONS.get(target), f"the function {getattr(target, '__name__', target)}"
            case _:
                lowering, what = METHODS.get(target), f"the method {target}"
        if lowering is None:
            known = sorted({*METHODS, *(getattr(f, "__name__", str(f)) for f in FUNCTIONS)})
            raise CompileError(
                f"{what} is not supported. Supported functions and methods: {', '.join(known)}. "
                f"Modules: {', '.join(sorted(m.__name__ for m in MODULES))}",
                self.builder.source(),
            )
        return self.wrap_all(self._lower(lowering, what, self.unwrap(args), self.unwrap(kwargs)))

    def _lower(self, lowering: Callable[..., Any], what: str, args: Any, kwargs: Any) -> Any:
        try:
            inspect.signature(lowering).bind(self.builder, *args, **kwargs)
            return lowering(self.builder, *args, **kwargs)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, AssertionError) as error:
            # what torch would refuse too: arguments of wrong types, sizes that make no sense
            message = f"{what}: these arguments are not supported: {error}"
            raise CompileError(message, self.builder.source()) from None

    def unwrap(self, x: Any) -> Any:
        """Traced values -> graph values, through containers."""
        if isinstance(x, Tensor):
            return x.value
        if isinstance(x, fx.Proxy):  # x.attribute, not called
            raise CompileError(
                f"the attribute {getattr(x, 'attr', '?')} is not supported: shape, ndim and dtype are"
            )
        if isinstance(x, (tuple, list)):
            return type(x)(self.unwrap(item) for item in x)
        if isinstance(x, dict):
            return {key: self.unwrap(item) for key, item in x.items()}
        if isinstance(x, nn.Parameter):
            return self.builder.weight_of(x)
        return x

    def wrap_all(self, x: Any) -> Any:
        return tuple(self.wrap(item) for item in x) if isinstance(x, (list, tuple)) else self.wrap(x)

    def wrap(self, value: Value) -> Tensor:
        node = self.create_node("placeholder", "x", (), {})
        proxy = self.proxy(node)
        assert isinstance(proxy, Tensor)
        proxy.value = value
        return proxy

    def create_arg(self, a: Any) -> Any:
        """fx asks for this only for what forward returns."""
        if not isinstance(a, Tensor):
            what = f"Model.forward returns {type(a).__name__}, wanted the logits [T, vocab_size]"
            raise CompileError(what, self.builder.forward_line(self.root))
        self.result = a.value
        return a.node

    def to_bool(self, obj: fx.Proxy) -> NoReturn:
        raise CompileError(
            "control flow on a traced value: its numbers are known only when a step runs. "
            "Decide by the config instead, in __init__",
            self.builder.source(),
        )


def capture(model: nn.Module, builder: Builder) -> Graph:
    """The graph of model.forward(token_ids [T]) -> logits [T, vocab_size], its rows gathered by logit_rows
    [L]. Weights' recipes name the model's parameters. CompileError names the model file's line."""
    builder.parameter_names = {
        id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))
    }
    builder.path.append("")
    tracer = Tracer(builder)
    where = builder.forward_line(model)
    arguments = list(inspect.signature(model.forward).parameters)
    if len(arguments) != 1:
        raise CompileError(
            f"Model.forward takes {', '.join(arguments) or 'nothing'}, wanted token_ids alone", where
        )
    with user_code(builder.model_path):
        tracer.trace(model)
    logits = tracer.result
    if logits is None or len(logits.shape) != 2 or logits.shape[0] != Sym("T"):
        raise CompileError(
            f"Model.forward returns {text_of(logits.shape) if logits else None}, wanted [T, vocab_size]",
            where,
        )
    graph = builder.graph
    graph.outputs = builder.emit("gather_rows", [logits, builder.batch_array("logit_rows")], name="logits")
    graph.inputs.sort(key=lambda v: list(BATCH_ARRAYS).index(v.name) if not v.state else len(BATCH_ARRAYS))
    return graph
