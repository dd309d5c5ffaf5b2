"""The two kinds of error. CompileError: the user's model, checkpoint or command line. InternalError: a bug of
ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A line of a model file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class CompileError(Exception):
    """What the user gave cannot be compiled. The message names what was found, what was wanted and what to
    do."""

    def __init__(self, message: str, source: Source | None = None) -> None:
        super().__init__(f"{source}: {message}" if source else message)
        self.source = source


class InternalError(Exception):
    """A bug in tscompile: a pass left a graph that does not verify, or an invariant broke."""
