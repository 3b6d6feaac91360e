"""Schemes: the number formats of weights and activations, and which operators take them.

The named ones are YAML files in `onnxq/recipes/`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import yaml

from onnxq.errors import RecipeError, UsageError
from onnxq.numerics.outliers import BITS, FRACTION
from onnxq.plain import build


@dataclass(frozen=True)
class TensorSpec:
    """How a kind of tensor is quantized: dtype by name, symmetric or not, one scale per `tensor`, `channel`, `token`
    (row of a dynamic activation) or `block` of `block_size` weights of the same output that follow one another.

    search: how the scales of blocks are found; auto (by what is left of the error, on calibration data where there are
    some), absmax (from the extremes) or mse (the least squared error over scale and minimum, as llama.cpp's k-quants).
    bits: how many all int8 codes of a weight fit but for a few, which are larger: `fraction` of them, or with a
    `sigma_factor` those of weights beyond so many times the root mean square of their channel. None: all that int8 has.
    """

    dtype: str = "int8"
    symmetric: bool = True
    granularity: str = "tensor"
    dynamic: bool = False
    block_size: int | None = None
    search: str = "auto"
    bits: int | None = None
    fraction: float = FRACTION
    sigma_factor: float | None = None

    def __post_init__(self) -> None:
        """Raises RecipeError for a share that is none."""
        if not 0 <= self.fraction <= _MOST_PROTECTED:
            raise RecipeError(f"fraction: {self.fraction} of a weight can't be protected; use 0 to {_MOST_PROTECTED}, "
                              "as with more of them wider codes are smaller")
        if self.sigma_factor is not None and not _SIGMAS[0] <= self.sigma_factor <= _SIGMAS[1]:
            raise RecipeError(f"sigma_factor: {self.sigma_factor} standard deviations hold too few or all weights; use "
                              f"{_SIGMAS[0]} to {_SIGMAS[1]}")


_MOST_PROTECTED, _SIGMAS = 0.1, (1.5, 8.0)
SEARCHES = ("auto", "absmax", "mse")
BLOCK_SIZES = (16, 32, 64, 128, 256)  # that MatMulNBits has kernels for

_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "dtype": ("int8",), "symmetric": (True,), "granularity": ("tensor", "channel"), "dynamic": (False,),
    "block_size": (None,), "bits": (None, *BITS)}
_BLOCKS: dict[str, tuple[Any, ...]] = {
    "dtype": ("int2", "int4", "int8", "uint2", "uint4", "uint8"), "granularity": ("block",), "dynamic": (False,),
    "block_size": BLOCK_SIZES, "search": SEARCHES, "bits": (None,)}
# levels of 4 bits whose scales are multiples of a channel's: integer kernels read int8 (see numerics.two_level)
_TWO_LEVELS: dict[str, tuple[Any, ...]] = {**_BLOCKS, "dtype": ("int4",), "symmetric": (True,)}
_ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    "dtype": ("uint8", "int8"), "granularity": ("tensor", "token"), "bits": (None,)}


@dataclass(frozen=True)
class Scheme:
    """Numeric formats of activations and weights and the operators that take them; float when both are None.

    stored: the format of weights that are decoded and read as floats, beside quantized activations: of tables that are
    looked up in, and of layers whose integer kernel does not pay; None for int8 with a scale per channel.
    """

    name: str
    summary: str = ""
    activations: TensorSpec | None = None
    weights: TensorSpec | None = None
    operators: tuple[str, ...] = ()
    stored: TensorSpec | None = None

    def __post_init__(self) -> None:
        """Refuse what no kernel computes, rather than compute something else. Raises RecipeError naming the key."""
        weights = _BLOCKS if self.is_weight_only else _TWO_LEVELS if self.has_two_levels else _WEIGHTS
        specs = (("weights", self.weights, weights), ("activations", self.activations, _ACTIVATIONS),
                 ("stored", self.stored, _BLOCKS))
        for path, spec, choices in specs:
            for key, allowed in choices.items() if spec is not None else ():
                given = getattr(spec, key)
                if given not in allowed:
                    words = ", ".join(str(a).lower() for a in allowed)
                    raise RecipeError(f"scheme.{path}.{key}: {str(given).lower()} has no kernel here; use {words}")
        for path, spec in (("weights", self.weights if self.is_weight_only else None), ("stored", self.stored)):
            if spec is not None and spec.symmetric is not (spec.dtype[0] == "i"):
                kind, other = ("symmetric", "asymmetric") if spec.dtype[0] == "i" else ("asymmetric", "symmetric")
                raise RecipeError(f"scheme.{path}.symmetric: {spec.dtype} is the type of {kind} codes; use that of "
                                  f"{other} ones, or the other value")
        if self.has_two_levels and not self.is_dynamic:
            raise RecipeError("scheme.weights.granularity: blocks beside uint8 activations have kernels where these "
                              "find their scales at run time; add dynamic: true to the activations")
        if self.stored is not None and not self.has_two_levels:
            raise RecipeError("scheme.stored: only weights in blocks beside uint8 activations take it; leave it out")
        if self.activations is not None and self.activations.granularity == "token" and not self.activations.dynamic:
            raise RecipeError("scheme.activations.granularity: a scale per token is found at run time; add dynamic: "
                              "true")

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized under this scheme."""
        return self.weights is None

    @property
    def is_weight_only(self) -> bool:
        """Whether weights alone are quantized, in blocks, and activations stay float."""
        return self.weights is not None and self.activations is None

    @property
    def has_blocks(self) -> bool:
        """Whether weights have scales per block, whatever activations are."""
        return self.weights is not None and self.weights.granularity == "block"

    @property
    def has_two_levels(self) -> bool:
        """Whether weights have scales per block beside quantized activations, as multiples of a channel's."""
        return self.has_blocks and self.activations is not None

    @property
    def for_stored(self) -> Scheme | None:
        """The weight-only scheme of weights that are decoded beside quantized activations, where they have one."""
        return replace(self, activations=None, weights=self.stored, stored=None) if self.stored is not None else None

    @property
    def is_dynamic(self) -> bool:
        """Whether activation scales are computed at run time, so that no calibration is needed."""
        return self.activations is not None and self.activations.dynamic


FLOAT = Scheme("float", "nothing is quantized")


def in_blocks(given: Scheme, block_size: int | None = None, symmetric: bool | None = None) -> Scheme:
    """A scheme with other blocks of weights, or a weight-only one with codes of the other sort: uint4 for int4 etc.

    What is None stays. Raises UsageError for a scheme of another kind, RecipeError for a size without a kernel.
    """
    if block_size is None and symmetric is None:
        return given
    if given.has_two_levels and given.weights is not None and symmetric is not False:
        return replace(given, weights=replace(given.weights, block_size=block_size or given.weights.block_size))
    if not given.is_weight_only or given.weights is None:
        asked = "--group-size" if block_size is not None else "--symmetric" if symmetric else "--asymmetric"
        raise UsageError(f"{asked} is for weights in blocks beside float activations, which scheme {given.name} does "
                         f"not have; choose {', '.join(weight_only_names())}, or leave it out")
    weights = given.weights
    symmetric = weights.symmetric if symmetric is None else symmetric
    dtype = weights.dtype.removeprefix("u")
    return replace(given, weights=replace(weights, block_size=block_size or weights.block_size, symmetric=symmetric,
                                          dtype=dtype if symmetric else f"u{dtype}"))


def scheme_names() -> list[str]:
    """Names of the schemes that ship with onnxq."""
    folder = resources.files("onnxq").joinpath("recipes")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def scheme_text(name: str) -> str:
    """The YAML of a named scheme. Raises UsageError with near matches for an unknown name."""
    if name not in scheme_names():
        near = difflib.get_close_matches(name, scheme_names(), 3, 0.4) or scheme_names()
        raise UsageError(f"there is no scheme {name!r}; known: {', '.join(near)} (onnxq schemes lists them)")
    return resources.files("onnxq").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")


def scheme(name: str) -> Scheme:
    """A named scheme; `float` is one too. Raises UsageError for an unknown name."""
    if name == FLOAT.name:
        return FLOAT
    built: Scheme = build(Scheme, yaml.safe_load(scheme_text(name)), "scheme")
    return built


def weight_only_names() -> list[str]:
    """Named schemes that keep activations float and weights in blocks."""
    return [name for name in scheme_names() if scheme(name).is_weight_only]
