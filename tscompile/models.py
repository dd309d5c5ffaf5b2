"""Model files: where they lie, which architectures they know, and how one is loaded. The only place that
looks for them."""

from __future__ import annotations

import ast
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tscompile.checkpoint import read_json
from tscompile.errors import CompileError, InternalError, Source
from tscompile.resources import MODELS

PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class ModelFile:
    """A model file, loaded. docs/writing-a-model.md says what one holds."""

    path: Path
    model: Callable[[Any], torch.nn.Module]  # Model(config)
    checkpoint_name: Callable[[str], str]
    ignored: tuple[str, ...]

    @property
    def stem(self) -> str:
        return self.path.stem

    def make(self, config: Any) -> torch.nn.Module:
        """Model(config) on the meta device: shapes without numbers. CompileError if the model file raises."""
        with user_code(self.path), torch.device("meta"), _Unfilled():
            return self.model(config)


class _Unfilled(TorchFunctionMode):
    """Parameters are not initialised: on the meta device that does nothing, after seconds of imports."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def known_architectures() -> dict[str, Path]:
    """architecture -> the model file of ours that says it knows it. Files are parsed, not run."""
    known = {}
    for path in sorted(MODELS.glob("*.py")):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "ARCHITECTURES":
                known.update(dict.fromkeys(ast.literal_eval(statement.value), path))
    return known


def find_for(folder: Path) -> Path:
    """The model file for a checkpoint, by config.json's "architectures". CompileError with what is known."""
    where = folder / "config.json"
    architectures = read_json(where).get("architectures")
    known = known_architectures()
    names = architectures if isinstance(architectures, list) else []
    for name in names:
        if isinstance(name, str) and name in known:
            return known[name]
    raise CompileError(
        f"{where}: architectures is {architectures!r}; known are {', '.join(sorted(known))}. "
        "For another model write a model file and give it first: tscompile build my_model.py --weights DIR"
    )


def load(path: Path) -> ModelFile:
    """Runs a model file (the user's own code, named on the command line) and checks what it defines."""
    if not path.is_file():
        raise CompileError(f"{path} is not a file: give a model file, or the folder of a checkpoint")
    spec = importlib.util.spec_from_file_location(f"tscompile_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise CompileError(f"{path} is not a Python file: a model file ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with user_code(path):
        spec.loader.exec_module(module)
    if not isinstance(getattr(module, "Model", None), type):
        raise CompileError(
            f"{shown(path)} defines no class Model: wanted a torch.nn.Module that takes a Config"
        )
    name_of = getattr(module, "checkpoint_name", lambda parameter: parameter)
    return ModelFile(path, module.Model, name_of, tuple(getattr(module, "IGNORED", ())))


def shown(path: Path) -> str:
    """How a model file is called in messages and plans: the same wherever the file lies."""
    return f"models/{path.name}" if path.resolve().parent == MODELS else path.name


@contextmanager
def user_code(path: Path) -> Iterator[None]:
    """Turns an exception out of a model file into a CompileError that names the file's line; one out of our
    own code beneath it, into an InternalError."""
    try:
        yield
    except CompileError as error:
        if error.source is not None:
            raise
        raise CompileError(str(error), _line(error.__traceback__, path)) from None
    except SyntaxError as error:
        where = Source(shown(path), error.lineno or 1) if error.filename == str(path) else None
        raise CompileError(f"the model file does not parse: {error.msg}", where) from None
    except InternalError:
        raise
    except (Exception, SystemExit) as error:
        source = _line(error.__traceback__, path)
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        last = max((i for i, file in enumerate(frames) if file == str(path)), default=-1)
        ours = any(Path(file).is_relative_to(PACKAGE) for file in frames[last + 1 :])
        if source is None or ours:
            raise InternalError(f"{source or shown(path)}: {type(error).__name__}: {error}") from error
        raise CompileError(f"the model file raised {type(error).__name__}: {error}", source) from None


def _line(trace: TracebackType | None, path: Path) -> Source | None:
    lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == str(path)]
    return Source(shown(path), lines[-1] or 0) if lines else None


def calling_line(path: Path) -> Source | None:
    """The line that is running now: of the model file, or of a file of the user's that it calls. None outside
    the model's code."""
    library = (str(PACKAGE), str(Path(torch.__file__).parent), "<")
    found: Source | None = None
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if found is None and (file == str(path) or not file.startswith(library)):
            found = Source(shown(Path(file)), frame.f_lineno)
        if file == str(path):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None
