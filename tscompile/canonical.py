"""Canonical JSON: one spelling a value, so that equal plans are equal bytes. The engine refuses any other
spelling."""

from __future__ import annotations

import json
import math
from typing import Any

from tscompile.errors import CompileError, InternalError


def dumps(value: Any) -> bytes:
    """UTF-8, keys sorted, separators `,` and `:`, an int wherever it equals the float. InternalError if
    `value` holds what JSON has no word for: NaN, infinities, lone surrogates, keys that are not strings."""
    try:
        text = json.dumps(
            _plain(value), ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
        )
        return text.encode()
    except (ValueError, TypeError) as error:
        raise InternalError(f"not fit for canonical JSON: {error}") from None


def loads(data: bytes, what: str) -> Any:
    """The value of canonical JSON. CompileError, naming `what`, if `data` is anything else: also duplicate
    keys, white space, needless escapes."""
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise CompileError(f"{what} is not JSON: {error or 'nested too deep'}") from None
    try:
        canonical = dumps(value)
    except (InternalError, RecursionError):
        canonical = b""
    if canonical != data:
        raise CompileError(f"{what} is not canonical JSON: was it edited by hand?")
    return value


def _plain(value: Any) -> Any:
    """Tuples as lists; integral floats as ints."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r}")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return value
