"""Recipes: what to do with a model, as frozen dataclasses that read from and print to YAML.

A key that is not known is refused with its path, as is a value of the wrong kind. The named schemes are YAML files of
the same form in `onnxq/recipes/`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from onnxq import sizes
from onnxq.bits import ALIKE, Bits, check_size
from onnxq.errors import RecipeError, UsageError
from onnxq.plain import StrictLoader, build, plain
from onnxq.schemes import FLOAT, Scheme, scheme, scheme_names, weight_only_names
from onnxq.sparsity import DENSE, Sparsity

VERSION = 1
SQNR = "sqnr"
RANKS = ("range_parm", "kurtosis", SQNR)  # what layers are ranked by


@dataclass(frozen=True)
class Layers:
    """Some of the repeated layers of a network: the `first` ones by their share of all, rounded down to whole layers,
    the `last` ones by theirs, rounded up, and `every` n-th of those between (0: none).

    A layer's number stands in the names of its nodes; how many there are, those tell that the rest of a match fits.
    Source: use_more_bits of llama.cpp.
    """

    first: float = 0.0
    last: float = 0.0
    every: int = 0

    def __post_init__(self) -> None:
        """Raises RecipeError naming the key that can't be used."""
        for key in ("first", "last"):
            if not 0 <= getattr(self, key) <= 1:
                raise RecipeError(f"layers.{key}: {getattr(self, key)} is no share of the layers; give 0 to 1")
        if self.every < 0:
            raise RecipeError(f"layers.every: {self.every} counts nothing; give 1 or more, or 0 for none")

    def holds(self, number: int, count: int) -> bool:
        """Whether layer `number` of `count`, counted from 0, is one of them."""
        begin, end = int(self.first * count), int((1 - self.last) * count)
        return number < begin or number >= end or (self.every > 0 and (number - begin + 1) % self.every == 0)


@dataclass(frozen=True)
class Match:
    """Which nodes a rule is for: an operator type, a glob over names, layers by number, or several of these."""

    op: str | None = None
    name: str | None = None
    layers: Layers | None = None


@dataclass(frozen=True)
class Rule:
    """Nodes that match get `scheme` (a name; `float` keeps them as they are), for `reason`. A name that matches nothing
    is refused unless the rule is `optional`."""

    match: Match
    scheme: str
    reason: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Calibration:
    """How the ranges of activations are found.

    samples: rows used at most (None: all); batch: rows run at once. ranges: auto (minmax, or another one that promises
    less error at a layer's result and causes clearly less at the model's outputs), minmax, moving-average (of the
    minima and maxima of the batches), percentile (`percentile` percent of the values lie inside), mse (the least
    squared error) or entropy (the least loss of information).
    """

    samples: int | None = 128
    batch: int | None = None
    ranges: str = "auto"
    percentile: float = 99.999


@dataclass(frozen=True)
class Preprocessing:
    """How images and text become rows of the model's inputs; what is None is as the model's inputs suggest.

    Images, in this order: `color` rgb, bgr, gray, or y (of YCbCr); `resize` to a [shorter side] or [H, W] by
    `interpolation` bilinear, bicubic or nearest (None: to the input's fixed H and W, if it has them); `crop` [H, W] of
    the centre; (pixel * scale - mean) / std with pixels from 0 to 255, one value for all channels or one for each;
    `layout` nchw or nhwc. Text: `tokenizer` is the path of a tokenizer.json, from the working directory (None: the one
    beside the text); `mode` is lines (each line or record a row) or stream (all of the text, cut into rows; None:
    stream for a model that has a key/value cache); `length` is the tokens of a row (None: as many as the model fixes,
    or 128).
    """

    resize: tuple[int, ...] | None = None
    crop: tuple[int, ...] | None = None
    color: str | None = None
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str | None = None
    interpolation: str = "bilinear"
    tokenizer: str | None = None
    length: int | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        """Raises RecipeError naming the key that can't be used."""
        known = {"color": ("rgb", "bgr", "gray", "y"), "layout": ("nchw", "nhwc"), "mode": ("lines", "stream"),
                 "interpolation": ("bilinear", "bicubic", "nearest")}
        for key, values in known.items():
            value = getattr(self, key)
            if value is not None and value not in values:
                raise RecipeError(f"data.{key}: {value!r} is not known; use {', '.join(values)}")
        if self.resize is not None and not (len(self.resize) in (1, 2) and min(self.resize) > 0):
            raise RecipeError(f"data.resize: {list(self.resize)} is no size; give [shorter side] or [H, W]")
        if self.crop is not None and not (len(self.crop) == 2 and min(self.crop) > 0):
            raise RecipeError(f"data.crop: {list(self.crop)} is no size; give [H, W]")
        if self.length is not None and self.length < 1:
            raise RecipeError(f"data.length: {self.length} tokens make no row; give at least 1")
        for key, numbers in (("scale", (self.scale,)), ("mean", self.mean), ("std", self.std)):
            if not numbers or not all(map(math.isfinite, numbers)) or (key == "std" and 0 in numbers):
                wanted = "numbers other than 0" if key == "std" else "numbers"
                raise RecipeError(f"data.{key}: {list(numbers)} can't be used; give finite {wanted}")


OUTLIERS = ("smooth", "none")
ROUNDINGS = ("auto", "nearest")
ATTENTIONS = ("float", "int8")


@dataclass(frozen=True)
class Outliers:
    """What is done against channels of activations that are much larger than others.

    method: smooth (they are divided by factors that the weights are multiplied by) or none. alpha and beta are the
    exponents of the factors max|x|^alpha / max|w|^beta (None: searched for each tensor; a fixed alpha alone means beta
    = 1 - alpha). at_run_time: whether a Mul may divide where no constants above can take the factors. split: whether
    the largest channels may be repeated, each copy with its share, where columns of the layer above can be.
    """

    method: str = "smooth"
    alpha: float | None = None
    beta: float | None = None
    at_run_time: bool = True
    split: bool = True

    def __post_init__(self) -> None:
        """Raises RecipeError naming the key that can't be used."""
        if self.method not in OUTLIERS:
            raise RecipeError(f"outliers.method: {self.method!r} is not known; use {' or '.join(OUTLIERS)}")
        for key in ("alpha", "beta"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= 1:
                raise RecipeError(f"outliers.{key}: {value} is no exponent; give a number from 0 to 1")
        if self.beta is not None and self.alpha is None:
            raise RecipeError("outliers.beta: given without alpha; give both, or neither to search them")


@dataclass(frozen=True)
class Escape:
    """Layers of a static scheme for which one scale for all rows costs too much.

    below: dB of signal to noise at a layer's result, on calibration rows that its range was not searched on; a layer
    below gets a scale for each row at run time where that has a kernel and is at least `gain` dB better. None: none
    does.
    """

    below: float | None = 20.0
    gain: float = 3.0


@dataclass(frozen=True)
class Fallback:
    """Nodes that stay float.

    keep_float: globs of their names. level: how many layers stay float besides, those that are the most sensitive by
    `rank`: range_parm (the greatest magnitude of what a layer reads / its standard deviation), kurtosis (of the same)
    or sqnr (the least of what a layer makes when it alone is quantized). Read, but never printed: `disable_names` for
    keep_float and `disable_level: L10` for level 10.
    """

    keep_float: tuple[str, ...] = ()
    level: int = 0
    rank: str = RANKS[0]

    def __post_init__(self) -> None:
        """Raises RecipeError naming the key that can't be used."""
        if self.level < 0:
            raise RecipeError(f"fallback.level: {self.level} layers can't stay float; give 0 or more")
        if self.rank not in RANKS:
            raise RecipeError(f"fallback.rank: {self.rank!r} is not known; use {', '.join(RANKS)}")


@dataclass(frozen=True)
class BudgetSpec:
    """The metric and how much of it may be lost: '0.5%' relative, '0.5pt' points, '0.005' the metric's unit."""

    metric: str | None = None
    max_drop: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a compilation, apart from the model, the data and the target.

    attention: float, or int8 for its products of computed tensors (Q K^T and P V), where it measures faster; Softmax
    stays float. rounding: of weights; auto (GPTQ where it keeps a layer's results better on data that it has not seen)
    or nearest. pack: whether weights are stored in fewer bytes, to be decoded as the runtime loads the model;
    load_memory: what that may take, such as 500MB, by estimate (None: see --load-memory).
    """

    scheme: Scheme
    version: int = VERSION
    rules: tuple[Rule, ...] = ()
    calibration: Calibration = Calibration()
    outliers: Outliers = Outliers()
    escape: Escape = Escape()
    attention: str = "float"
    rounding: str = "auto"
    bias_correction: bool = True
    data: Preprocessing = Preprocessing()
    fallback: Fallback = Fallback()
    budget: BudgetSpec = BudgetSpec()
    bits: Bits = ALIKE
    sparsity: Sparsity = DENSE
    pack: bool = False
    load_memory: str | None = None

    def __post_init__(self) -> None:
        """Raises RecipeError for what is not known, and for bits to choose or zeros that the scheme has no use for."""
        narrow = self.scheme.weights is not None and self.scheme.weights.bits is not None
        if self.bits.are_chosen and not self.scheme.is_weight_only and not narrow:
            raise RecipeError(f"bits: formats are chosen for weights in blocks; scheme {self.scheme.name} has none: "
                              f"use {', '.join(weight_only_names())}, or leave --target-bits and --max-size out")
        if self.bits.are_chosen and narrow and not self.pack:
            raise RecipeError("bits: few of them save nothing before weights are packed; give --pack, or `pack: true`")
        if self.sparsity.wanted is not None and self.scheme.has_blocks:
            raise RecipeError(f"sparsity: scheme {self.scheme.name} stores weights in blocks, where zeros save "
                              "nothing; use w8a8, w8a8-dynamic or float, or leave --sparsity and --pattern out")
        check_size("load_memory", self.load_memory)
        if self.load_memory is not None and not self.pack:
            raise RecipeError("load_memory: nothing is packed; give --pack, or `pack: true` beside it")
        if self.attention not in ATTENTIONS:
            raise RecipeError(f"attention: {self.attention!r} is not known; use {' or '.join(ATTENTIONS)}")
        if self.rounding not in ROUNDINGS:
            raise RecipeError(f"rounding: {self.rounding!r} is not known; use {' or '.join(ROUNDINGS)}")

    @property
    def load_bytes(self) -> int | None:
        """What decoding may take as a packed model is loaded; without a limit where one on the file goes before."""
        if self.load_memory is None and self.bits.are_chosen:
            return sys.maxsize
        return sizes.parse(self.load_memory) if self.load_memory is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML and JSON, defaults included."""
        return {"version": self.version, **plain(self)}

    def to_yaml(self) -> str:
        """The recipe as YAML that `read` turns into an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=110)


def read(path: str | Path) -> Recipe:
    """A recipe from a YAML file. Raises RecipeError naming the key, or UsageError when the file can't be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"the recipe {path} can't be read ({e}); check the path") from None
    return parse(text)


def parse(text: str) -> Recipe:
    """A recipe from YAML text. Raises RecipeError naming the key by its path."""
    try:
        data = yaml.load(text, StrictLoader)
    except yaml.YAMLError as e:
        raise RecipeError(f"the recipe is not valid YAML ({str(e).splitlines()[0]}); correct it") from None
    if not isinstance(data, dict):
        raise RecipeError("the recipe must be a mapping with at least `scheme:`; see onnxq compile --print-recipe")
    data = dict(data)
    if data.get("version", VERSION) != VERSION:
        raise RecipeError(f"version: {data['version']!r} is not known; this onnxq reads version {VERSION}")
    chosen = data.get("scheme")
    if chosen is None:
        raise RecipeError(f"scheme: missing; name one of {', '.join([*scheme_names(), FLOAT.name])}")
    if isinstance(chosen, str):
        try:
            data["scheme"] = scheme(chosen)
        except UsageError as e:
            raise RecipeError(f"scheme: {e}") from None
    if isinstance(data.get("fallback"), dict):
        data["fallback"] = _fallback(data["fallback"])
    recipe: Recipe = build(Recipe, data, "")
    for k, rule in enumerate(recipe.rules):
        mixed = recipe.scheme.is_weight_only and rule.scheme in scheme_names() and scheme(rule.scheme).is_weight_only
        if rule.scheme not in (FLOAT.name, recipe.scheme.name) and not mixed:
            raise RecipeError(f"rules[{k}].scheme: {rule.scheme!r} can't be mixed into {recipe.scheme.name}; "
                              f"use float or {recipe.scheme.name}")
    return recipe


def _fallback(given: dict[Any, Any]) -> dict[Any, Any]:
    """`fallback:` with other tools' names of its keys replaced by ours. Raises RecipeError for a key given twice."""
    found = dict(given)
    for other, key in (("disable_names", "keep_float"), ("disable_level", "level")):
        if other not in found:
            continue
        if key in found:
            raise RecipeError(f"fallback.{other}: another name of {key}, which is given, too; keep one")
        found[key] = found.pop(other)
        if key == "level" and isinstance(found[key], str):
            if not re.fullmatch(r"L?[0-9]+", found[key]):
                raise RecipeError(f"fallback.{other}: {found[key]!r} is no level; write L10 or 10 for ten layers")
            found[key] = int(found[key].removeprefix("L"))
    return found


def matches(glob: str, names: Iterable[str]) -> bool:
    """Whether any name fits the glob; '.' and '/' are alike, `{a,b}` offers alternatives, case counts.

    A name fits itself, whatever brackets are in it.
    """
    patterns = [p.replace(".", "/") for p in expand_braces(glob)]
    return any(name == glob or any(fnmatchcase(name.replace(".", "/"), pattern) for pattern in patterns)
               for name in names)


def expand_braces(glob: str) -> list[str]:
    """'a{b,c}d' -> ['abd', 'acd']; nested braces too; an unclosed brace stands for itself."""
    start = glob.find("{")
    if start < 0:
        return [glob]
    depth, pieces, last = 0, [], start + 1
    for k in range(start, len(glob)):
        if glob[k] == "{":
            depth += 1
        elif glob[k] == "," and depth == 1:
            pieces.append(glob[last:k])
            last = k + 1
        elif glob[k] == "}":
            depth -= 1
            if depth == 0:
                pieces.append(glob[last:k])
                return [glob[:start] + inner + tail for piece in pieces for inner in expand_braces(piece)
                        for tail in expand_braces(glob[k + 1:])]
    return [glob]
