"""capture: the model file and the checkpoint -> a graph as the author wrote it.

Takes build.options and build.checkpoint. Gives build.model, and build.graph: ops of the registry with a
source line each, every float value f32, every weight checkpoint("name"), module boundaries as `boundary` ops.
What the model wants and what the checkpoint has are compared by name and shape here, so that nothing after
this pass can miss a tensor.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from tscompile import models
from tscompile.build import Build, ModelInfo, Options
from tscompile.capture import Builder, capture
from tscompile.checkpoint import DTYPES, Checkpoint
from tscompile.config import Config
from tscompile.errors import CompileError
from tscompile.mesh import Mesh
from tscompile.recipe import Origin, checkpoint_names, renamed


def run(build: Build) -> None:
    builder, model, file, config = traced(build.options, build.checkpoint.config, build.mesh)
    build.graph = builder.graph
    _bind(builder, model, build.checkpoint, file, config)
    build.model = _info(build, config, file)


def traced(
    options: Options, data: dict[str, Any], mesh: Mesh
) -> tuple[Builder, nn.Module, models.ModelFile, Config]:
    """The model file's graph for a config.json, in builder.graph; no checkpoint is needed for that."""
    file = models.load(options.model)
    config = Config(data, "config.json", options.max_context)
    model = file.make(config)
    name = re.sub(r"\W", "_", file.stem)
    builder = Builder(name if name[:1].isalpha() else f"m{name}", mesh, options.model, options.page_size)
    capture(model, builder)
    return builder, model, file, config


def _bind(
    builder: Builder, model: nn.Module, checkpoint: Checkpoint, file: models.ModelFile, config: Config
) -> None:
    """Parameter names -> the checkpoint's names, each tensor found and of the right shape; none left over."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with models.user_code(file.path):
            aliases.setdefault(id(parameter), []).append(file.checkpoint_name(name))
    by_name = {name: aliases[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}

    def tensor(parameter: str) -> str:
        """The checkpoint's tensor for a parameter; a name that it lacks if it has none."""
        with models.user_code(file.path):
            names = by_name.get(parameter) or [file.checkpoint_name(parameter)]
        return next((name for name in names if name in checkpoint.tensors), names[0])

    used: set[str] = {name for names in aliases.values() for name in names}
    missing: list[str] = []
    for weight in builder.graph.weights:
        found = [Origin(renamed(o.recipe, tensor), o.shape) for o in builder.origins.get(id(weight), ())]
        lacks = [[n for n in checkpoint_names(o.recipe) if n not in checkpoint.tensors] for o in found]
        if found and all(lacks):
            missing += [f"{name} {list(found[0].shape)}" for name in lacks[0]]
            used.update(checkpoint_names(found[0].recipe))
        elif found:
            origin = found[lacks.index([])]
            weight.recipe = origin.recipe
            for name in checkpoint_names(origin.recipe):
                used.add(name)
                _check(name, origin.shape, checkpoint, config)
    extra = [
        str(info)
        for name, info in checkpoint.tensors.items()
        if name not in used and not any(fnmatch.fnmatchcase(name, pattern) for pattern in file.ignored)
    ]
    if missing or extra:
        says = [f"lacks {_some(missing)}"] * bool(missing) + [
            f"has {_some(extra)}, which the model does not use"
        ] * bool(extra)
        raise CompileError(
            f"the checkpoint {' and '.join(says)}. Is {models.shown(file.path)} the right model file?"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _check(name: str, shape: tuple[int, ...], checkpoint: Checkpoint, config: Config) -> None:
    info = checkpoint.tensors[name]
    if info.dtype not in DTYPES:
        raise CompileError(f"{info} in {info.file.name}: weights of {', '.join(DTYPES)} can be read")
    if info.shape != shape:
        wrong = [dim for dim, found in zip(shape, info.shape, strict=False) if dim != found]
        why = "; ".join(filter(None, (config.describe(dim) for dim in wrong)))
        raise CompileError(
            f"{name} is {list(info.shape)} in {info.file.name}, but {config.where} makes it "
            f"{list(shape)}" + (f" ({why})" if why else "")
        )


def _info(build: Build, config: Config, file: models.ModelFile) -> ModelInfo:
    vocab_size = build.graph.outputs[0].shape[1]
    assert isinstance(vocab_size, int)
    said = [build.checkpoint.generation, config.data]  # the first that says it wins
    ends: Any = next((d["eos_token_id"] for d in said if d.get("eos_token_id") is not None), [])
    ends = ends if isinstance(ends, list) else [ends]
    begin = next((d["bos_token_id"] for d in said if d.get("bos_token_id") is not None), None)
    for key, value in [
        *(("eos_token_id", end) for end in ends),
        ("bos_token_id", 0 if begin is None else begin),
    ]:
        if type(value) is not int or not 0 <= value < vocab_size:
            raise CompileError(f"{key} is {value!r}, wanted a token id below vocab_size {vocab_size}")
    path = str(config.data.get("_name_or_path") or "")
    return ModelInfo(
        name=path.rstrip("/").rpartition("/")[2] or file.stem,
        architecture=config.architecture,
        vocab_size=vocab_size,
        max_context=config.max_context,
        eos_token_ids=tuple(ends),
        bos_token_id=begin,
        dtype=build.options.dtype,
    )
