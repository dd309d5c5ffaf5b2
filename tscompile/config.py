"""Reads config.json for model files: typed, with errors that name key, value and wish. Knows the forms of
transformers 4 and 5."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tscompile.errors import CompileError

MAX_INT = 2**31 - 1
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Config:
    """The checkpoint's config.json. A model file asks it for what it needs; each getter raises CompileError
    if the key is missing (and no default was given), or of another type, or out of range. What was read is
    remembered, to explain shapes."""

    def __init__(self, data: Mapping[str, Any], where: str = "config.json", max_context: int = 0) -> None:
        """max_context: what --max-context asked for; 0 leaves it to the checkpoint."""
        self.data = data
        self.where = where
        self.numbers: dict[str, int] = {}
        self._max_context = max_context
        if "quantization_config" in data:
            method = data["quantization_config"]
            raise CompileError(
                f"{where} has a quantization_config ({str(method)[:80]}): quantised checkpoints cannot be "
                "read; use the original one in bf16, f16 or f32"
            )

    def fail(self, key: str, wanted: str) -> CompileError:
        found = repr(self.data[key]) if key in self.data else "missing"
        return CompileError(f"{self.where}: {key} is {found[:80]}, wanted {wanted}")

    def _given(self, key: str, default: Any) -> Any:
        """A null counts as missing."""
        value = self.data.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An int of at least `minimum`."""
        value = self._given(key, default)
        if type(value) is not int or not minimum <= value <= MAX_INT:
            raise self.fail(key, f"an integer from {minimum} to {MAX_INT}")
        self.numbers[key] = value
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite float."""
        return _positive(self._given(key, default), self.fail(key, "a positive number"))

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._given(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def choice(self, key: str, known: tuple[str, ...], default: str | None = None) -> str:
        """One of `known`, e.g. the activations that a model file has."""
        value = self._given(key, default)
        if value not in known:
            raise self.fail(key, f"one of {', '.join(known)}")
        return str(value)

    def either(self, *keys: str) -> str:
        """The first of `keys` that is there, for what has had several names; else the first."""
        return next((key for key in keys if self.data.get(key) is not None), keys[0])

    def layers(self, key: str, num_layers: int) -> frozenset[int]:
        """A list of layers' numbers; missing: none."""
        value = self._given(key, [])
        if not isinstance(value, list) or not all(type(x) is int and 0 <= x < num_layers for x in value):
            raise self.fail(key, f"a list of layers from 0 to {num_layers - 1}")
        return frozenset(value)

    def num_experts(self, *keys: str) -> tuple[int, int]:
        """(experts by the first of `keys` that is there, num_experts_per_tok), the second no more than the
        first."""
        key = self.either(*keys)
        experts, chosen = self.integer(key), self.integer("num_experts_per_tok")
        if chosen > experts:
            raise self.fail("num_experts_per_tok", f"at most {key}, {experts}")
        return experts, chosen

    @property
    def architecture(self) -> str:
        """The first of "architectures"; empty if there is none."""
        names = self.data.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""

    @property
    def max_context(self) -> int:
        """Positions that the rope tables cover: --max-context if given, else max_position_embeddings."""
        limit = self.integer("max_position_embeddings")
        if self._max_context > limit:
            raise CompileError(
                f"--max-context {self._max_context} is more than {self.where} allows: "
                f"max_position_embeddings is {limit}"
            )
        return self._max_context or limit

    def head_dim(self, hidden_size: int, num_heads: int, default: int | None = None) -> int:
        """head_dim; where it is missing or null, `default`, or hidden_size / num_attention_heads."""
        if self.data.get("head_dim") is None and default is None:
            if hidden_size % num_heads:
                raise CompileError(
                    f"{self.where}: hidden_size {hidden_size} is no multiple of num_attention_heads "
                    f"{num_heads}, and head_dim is missing: one of them is wrong"
                )
            default = hidden_size // num_heads
        return self.integer("head_dim", default)

    def kv_heads(self, num_heads: int, default: int | None = None) -> int:
        """num_key_value_heads (missing: `default`, or as many as heads), which must divide the heads."""
        kv_heads = self.integer("num_key_value_heads", default or num_heads)
        if num_heads % kv_heads:
            raise CompileError(
                f"{self.where}: num_key_value_heads {kv_heads} does not divide "
                f"num_attention_heads {num_heads}"
            )
        return kv_heads

    def window(self, default: int = 0) -> int:
        """sliding_window; 0: none (null). `default` where the key is missing."""
        if "sliding_window" in self.data and self.data["sliding_window"] is None:
            return 0
        return self.integer("sliding_window", default, minimum=0)

    def layer_windows(self, num_layers: int, window: int, first: int) -> list[int]:
        """One window a layer (0: none), from layer_types; where that is missing, `window` from layer `first`
        on."""
        types = self.data.get("layer_types")
        if types is None:
            return [window if layer >= first else 0 for layer in range(num_layers)]
        known = {"full_attention": 0, "sliding_attention": window}
        if not isinstance(types, list) or len(types) != num_layers or not all(t in known for t in types):
            raise self.fail("layer_types", f"{num_layers} of {', '.join(known)}")
        if not window and "sliding_attention" in types:
            raise self.fail("layer_types", "no sliding_attention, as sliding_window is off")
        return [known[t] for t in types]

    def rope(self, rotary_dim: int, default_theta: float = 10000.0) -> tuple[tuple[float, ...], float]:
        """(inv_freq, scaling) of rotary embeddings: from rope_parameters (transformers 5), or rope_theta and
        rope_scaling (4)."""
        key = "rope_scaling" if self.data.get("rope_scaling") else "rope_parameters"
        nested = self.data.get(key) or {}
        if not isinstance(nested, dict):
            raise self.fail(key, "an object")
        if any(isinstance(value, dict) for value in nested.values()):
            raise CompileError(f"{self.where}: {key} differ by layer type, which is not supported")
        outer = {
            "rope_theta": self.data.get("rope_theta") or default_theta,
            "original_max_position_embeddings": self.data.get("max_position_embeddings"),
        }
        given = {name: value for name, value in nested.items() if value is not None}
        if self.data.get("original_max_position_embeddings"):
            given["original_max_position_embeddings"] = self.data["original_max_position_embeddings"]
        with torch.device("cpu"):  # model files are built on the meta device
            return rope_frequencies(f"{self.where}: {key}", {**outer, **given}, rotary_dim)

    def latent_scale(self, head_dim: int) -> float:
        """The scale of q.k in latent attention: head_dim ** -0.5, and with a rope_type and mscale_all_dim
        times mscale(factor, mscale_all_dim) ** 2, as transformers' modeling_deepseek_v3 has it."""
        key = "rope_scaling" if self.data.get("rope_scaling") else "rope_parameters"
        rope = self.data.get(key) or {}
        all_dims, factor = rope.get("mscale_all_dim"), rope.get("factor")
        if rope.get("rope_type", rope.get("type", "default")) == "default" or not all_dims:
            return float(head_dim**-0.5)
        wanted = CompileError(
            f"{self.where}: {key} has factor {factor!r} and mscale_all_dim {all_dims!r}, wanted positive "
            "numbers"
        )
        return float(head_dim**-0.5 * _mscale(_positive(factor, wanted), _positive(all_dims, wanted)) ** 2)

    def describe(self, size: int) -> str:
        """The keys read so far whose value is `size`, as `key=value`."""
        return ", ".join(f"{key}={value}" for key, value in self.numbers.items() if value == size)


def _positive(value: Any, error: CompileError) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise error
    return float(value)


def rope_frequencies(
    where: str, parameters: Mapping[str, Any], rotary_dim: int
) -> tuple[tuple[float, ...], float]:
    """(inv_freq, scaling) as transformers' modeling_rope_utils computes them, in f32. `where` begins the
    errors."""

    def get(key: str) -> float:
        value = parameters.get(key)
        return _positive(value, CompileError(f"{where}: {key} is {value!r}, wanted a positive number"))

    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise CompileError(f"{where}: rope_type {kind!r} is not known; known are {', '.join(ROPE_TYPES)}")
    if rotary_dim % 2 or rotary_dim <= 0:
        raise CompileError(f"{where}: rope over {rotary_dim} elements of a head: wanted an even number")
    wavelengths = _powers(get("rope_theta"), rotary_dim)
    frequencies, scaling = 1.0 / wavelengths, 1.0
    if kind == "linear":
        frequencies = frequencies / get("factor")
    elif kind == "llama3":
        low, high = get("low_freq_factor"), get("high_freq_factor")
        if high <= low:
            raise CompileError(f"{where}: high_freq_factor {high} must be more than low_freq_factor {low}")
        frequencies = _llama3(frequencies, get("factor"), low, high, get("original_max_position_embeddings"))
    elif kind == "yarn":
        original = get("original_max_position_embeddings")
        factor = get("factor")
        ramp = _yarn_ramp(get("rope_theta"), rotary_dim, original, parameters)
        frequencies = 1.0 / (factor * wavelengths) * (1 - ramp) + frequencies * ramp
        scaling = _yarn_scaling(factor, parameters)
    return tuple(frequencies.tolist()), scaling


def _powers(theta: float, rotary: int) -> Tensor:
    """theta ** (2 i / rotary) in f32, rounded from double: torch's vectorised pow differs by host in the last
    bit."""
    exponents = (torch.arange(0, rotary, 2, dtype=torch.float32) / rotary).tolist()
    try:
        rounded = [struct.unpack("<f", struct.pack("<f", theta**exponent))[0] for exponent in exponents]
    except OverflowError:
        raise CompileError(f"the rope's rope_theta {theta} is too large") from None
    return torch.tensor(rounded, dtype=torch.float32)


def _llama3(frequencies: Tensor, factor: float, low: float, high: float, original: float) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / frequencies
    stretched = torch.where(wavelength > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelength - low) / (high - low)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, (1 - smooth) * stretched / factor + smooth * stretched, stretched)


def _yarn_ramp(theta: float, rotary: int, original: float, parameters: Mapping[str, Any]) -> Tensor:
    """YaRN: 1 where a frequency is kept, 0 where it is divided by the factor."""

    def dim_of(rotations: float) -> float:
        return rotary * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(parameters.get("beta_fast") or 32), dim_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary - 1)
    width = high - low if high != low else 0.001
    return 1 - torch.clamp((torch.arange(rotary // 2, dtype=torch.float32) - low) / width, 0, 1)


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_scaling(factor: float, parameters: Mapping[str, Any]) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    one, all_dims = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return _mscale(factor, one) / _mscale(factor, all_dims) if one and all_dims else _mscale(factor)
