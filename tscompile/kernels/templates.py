"""The templates that kernels are emitted from: templates/cpu and templates/triton."""

from __future__ import annotations

from functools import cache

import jinja2

from tscompile import resources


@cache
def environment(folder: str) -> jinja2.Environment:
    """Of one folder's templates; a name that a template does not get is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(resources.TEMPLATES / folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
