"""What a call of compile() asks for: options into a recipe, and what can't be done refused before any work."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onnxq import presets
from onnxq.aiming import aim, spelled_out
from onnxq.calibration import observer
from onnxq.errors import OutputError, UsageError
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.lower import written
from onnxq.passes.pack import pack as pack_passes
from onnxq.passes.pack.codes import takes
from onnxq.passes.pack.weights import OPSET
from onnxq.passes.quantize import quantize
from onnxq.passes.transform import transform
from onnxq.passes.transform.prune import Prune
from onnxq.passes.transform.remove_channels import RemoveChannels
from onnxq.passes.transform.smooth import Smooth
from onnxq.plan import Plan
from onnxq.recipe import BudgetSpec, Recipe, read
from onnxq.runtime.session import SessionOptions
from onnxq.schemes import in_blocks, scheme_names
from onnxq.sparsity import Sparsity
from onnxq.targets import TARGETS, Target
from onnxq.verification import Goal

AUTO = "auto"
OBJECTIVES = ("balanced", "latency", "size")
FORMATS = (AUTO, "qdq", "qoperator")


@dataclass(frozen=True)
class Request:
    """One call of compile(), checked: what is to be made of which model, and how.

    `alternative` is a second recipe to try, which is taken when its result is clearly faster. `plan` is replayed as it
    is, and what was decided is saved into the folder `save_plan`. `objective` is what equally fast choices go by;
    `shapes` gives free axes the sizes to time with (several: all of them, each alike). `max_memory` is the bytes that
    may be used; a model that does not run within them is compiled weight by weight.
    """

    model: Path
    output: Path
    recipe: Recipe
    target: Target
    options: SessionOptions
    goal: Goal
    calib: Any
    evaluation: Any
    format: str
    measure: bool
    dump: Path | None
    dump_after: str | None
    alternative: Recipe | None = None
    plan: Plan | None = None
    save_plan: Path | None = None
    objective: str = "balanced"
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    max_memory: int | None = None


def resolve(*, target: Target = TARGETS["cpu"], scheme: str = AUTO, recipe: Recipe | str | Path | None = None,
            calib: Any = None, samples: int | None = None, batch: int | None = None, ranges: str | None = None,
            metric: str | None = None, max_drop: str | None = None, keep_float: Sequence[str] = (),
            fallback: int | None = None, outliers: str | None = None, rounding: str | None = None,
            group_size: int | None = None, symmetric: bool | None = None, target_bits: float | None = None,
            max_size: str | None = None, sparsity: str | None = None, prune: str | None = None,
            pattern: str | None = None, prune_channels: str | None = None, prune_heads: str | None = None,
            pack: bool | None = None, load_memory: str | None = None) -> Recipe:
    """The recipe that a call stands for: a file or object, or a named scheme, with the options put in.

    Scheme `auto` is the target's for a call with calibration data or without, such as w8a8 and w8a8-dynamic; types of
    activations are the target's. `group_size` and `symmetric` replace those of
    a weight-only scheme; schemes that rules name stay as they are. With `target_bits` or `max_size` formats are chosen
    for each weight, with blocks of `group_size` alone where that is given. `sparsity` is the share of zeros, `prune`
    the method. Raises UsageError and RecipeError.
    """
    if recipe is not None and scheme != AUTO:
        raise UsageError("a scheme and a recipe exclude one another; write the scheme into the recipe")
    if isinstance(recipe, Recipe):
        chosen = recipe
    elif recipe is not None:
        chosen = read(recipe)
    else:
        auto = target.scheme if calib is not None else target.scheme_without_data
        chosen = presets.named(auto if scheme == AUTO else scheme)
    calibration = replace(chosen.calibration,
                          samples=chosen.calibration.samples if samples is None else samples,
                          batch=chosen.calibration.batch if batch is None else batch,
                          ranges=chosen.calibration.ranges if ranges is None else ranges)
    observer.check(calibration)
    scheme_in_blocks = in_blocks(chosen.scheme, group_size, symmetric)
    bits = replace(chosen.bits, target=chosen.bits.target if target_bits is None else target_bits,
                   max_size=max_size or chosen.bits.max_size,
                   block_sizes=chosen.bits.block_sizes if group_size is None else (group_size,))
    chosen = replace(chosen, scheme=scheme_in_blocks, calibration=calibration,
                   rounding=rounding or chosen.rounding, bits=bits,
                   sparsity=_pruned(chosen.sparsity, sparsity, prune, pattern, prune_channels, prune_heads),
                   pack=chosen.pack if pack is None else pack, load_memory=load_memory or chosen.load_memory,
                   outliers=replace(chosen.outliers, method=outliers or chosen.outliers.method),
                   fallback=replace(chosen.fallback, keep_float=(*chosen.fallback.keep_float, *keep_float),
                                    level=chosen.fallback.level if fallback is None else fallback),
                   budget=BudgetSpec(metric or chosen.budget.metric, max_drop or chosen.budget.max_drop))
    return aim(chosen, target)


def _pruned(given: Sparsity, share: str | None, method: str | None, pattern: str | None,
            channels: str | None, heads: str | None) -> Sparsity:
    """The recipe's section with the options put in: a share asked for alone goes before the recipe's pattern, and the
    other way round."""
    if share is not None or pattern is not None:
        given = replace(given, share=share, pattern=pattern)
    if method is not None and given.wanted is None:
        raise UsageError(f"--prune {method} says how, but not how much; give --sparsity, such as 50%, or --pattern 2:4")
    return replace(given, method=method or given.method, channels=channels or given.channels,
                   heads=heads or given.heads)


def default_output(model: str | Path, recipe: Recipe) -> Path:
    """Where the result goes unless a place is named: beside the model."""
    return Path(model).with_name(f"{Path(model).stem}.{recipe.scheme.name}.onnx")


def several(shapes: Mapping[str, int | Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Free axis -> its sizes."""
    return {axis: (n,) if isinstance(n, int) else tuple(n) for axis, n in shapes.items()}


def check(request: Request, output_format: str, force: bool) -> None:
    """Refuse what can't be asked for; `output_format` is the format by the name that it was asked by."""
    for what, value, known in (("format", output_format, FORMATS), ("objective", request.objective, OBJECTIVES)):
        if value not in known:
            raise UsageError(f"there is no {what} {value!r}; use one of {', '.join(known)}")
    request.goal.check()
    if request.calib is None and request.evaluation is None:
        for name, asked in (("--max-drop", request.goal.max_drop), ("--metric", request.goal.metric)):
            if asked is not None:
                raise UsageError(f"{name} needs data to measure on; give --eval DATA")
    chosen = request.recipe.scheme
    if request.plan is not None and (request.plan.scheme, request.plan.target) != (chosen.name, request.target.name):
        raise UsageError(f"the plan is for scheme {request.plan.scheme} on {request.plan.target}, not for "
                         f"{chosen.name} on {request.target.name}; leave the scheme out, or make a plan for it with "
                         "--save-plan DIR")
    static = chosen.activations is not None and not chosen.is_dynamic
    if static and request.calib is None and request.plan is None:
        dynamic = ", ".join(n for n in scheme_names() if "dynamic" in n)
        raise UsageError(f"scheme {chosen.name} needs data to find ranges; give --calib DATA, or choose {dynamic}")
    pruned = request.recipe.sparsity
    if pruned.needs_data and request.calib is None and request.plan is None:
        raise UsageError(f"pruning by {pruned.method} looks at what layers read; give --calib DATA, or take the "
                         "smallest weights with --prune magnitude")
    if (pruned.channels_share or pruned.heads_share) and request.calib is None and request.plan is None:
        raise UsageError("channels and heads are taken out by what layers read, for which others make up; give --calib "
                         "DATA")
    if request.recipe.pack and not request.target.decodes:
        raise UsageError(f"packed weights are decoded as a model is loaded, and {request.target.name} decodes none; "
                         "leave --pack out")
    if request.recipe.pack and not takes(request.target, 4):
        remedy = "leave --pack out" + ("" if 4 in request.target.code_bits else ", or name a later --runtime")
        raise UsageError("packed weights are decoded by operators that onnxruntime has from 1.23 on, and ONNX from "
                         f"opset {OPSET} on, which {request.target.name} does not take; {remedy}")
    level = request.recipe.fallback.level
    if level and not chosen.is_float and request.calib is None and request.plan is None:
        raise UsageError(f"--fallback {level} ranks layers by what calibration data make of them; give --calib DATA")
    if request.dump_after is not None and request.dump is None:
        raise UsageError("--dump-after names a pass, but no folder to write its graph to; give --dump DIR")
    if request.dump_after is not None and request.dump_after not in _pass_names(request):
        raise UsageError(f"there is no pass {request.dump_after!r}; known: {', '.join(_pass_names(request))}")
    if request.model.exists():  # loading says what is wrong with a model that does not
        check_output(request.model, request.output, force)


def check_output(model: Path, output: Path, force: bool) -> None:
    """Refuse a file that can't be written or may not be replaced. Raises OutputError and UsageError."""
    folder = output.parent
    if output.is_dir():
        raise OutputError(f"{output} is a folder; name the file to write, e.g. -o {output / 'model.onnx'}")
    if output.exists() and output.samefile(model):
        raise UsageError("the result would replace the model itself; choose another -o")
    if output.exists() and not force:
        raise OutputError(f"{output} exists; give --force to replace it, or another -o")
    if not folder.is_dir():
        missing = "is not a folder" if folder.exists() else "does not exist; make it"
        raise OutputError(f"the folder of the result, {folder}, {missing}, or choose another -o")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder {folder} can't be written; choose another -o")


def _pass_names(request: Request) -> list[str]:
    return [p.name for p in (*canonicalize(), *spelled_out(request.target), RemoveChannels(), Prune(), Smooth(),
                             *transform(), *quantize(), *written(request.format, request.target), *pack_passes())]
