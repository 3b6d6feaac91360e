"""Targets as they are asked for, and a recipe as one of them takes it; what it has no kernels for is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from onnxq.errors import UsageError
from onnxq.graph import Graph, free_axes, lower_opset
from onnxq.passes.decompose import decompose, lacking
from onnxq.passes.manager import Context, Pass
from onnxq.passes.static_shapes import static_shapes
from onnxq.recipe import Recipe
from onnxq.runtime.machine import target_here
from onnxq.schemes import Scheme, scheme, scheme_names
from onnxq.targets import Target

NAMELESS = "export the model with names for them, or with fixed sizes"


def target_for(name: str, output_format: str = "auto", runtime: str | None = None) -> Target:
    """The target of a call: by name as it is here, with the operators of a format and of an onnxruntime.

    Raises UsageError for an unknown target, a format that it does not run, and a runtime that is too old for it.
    """
    found = target_here(name, runtime)
    if output_format == "qoperator" and found.format == "qdq":
        raise UsageError(f"target {name} takes QuantizeLinear and DequantizeLinear alone; leave --format out")
    if output_format == "qdq":
        found = replace(found, fused=frozenset(), portable=True)
    return found


def lower(graph: Graph, target: Target) -> None:
    """Bring a model to an opset that the target's onnxruntime takes. Raises UsageError where that takes more than a
    number."""
    why = lower_opset(graph, target.opset) if target.opset is not None else None
    if why is not None:
        raise UsageError(f"the model is of opset {graph.opset}, and {target.name} with onnxruntime {target.since} "
                         f"takes {target.opset} at most, but {why}; export it at an older opset, or name a "
                         "later --runtime")


def facts(target: Target) -> dict[str, Any]:
    """What a target states, as plain values: for JSON, a table and the documentation."""
    kernels = [{"operator": op, "result": result, "kernel": kernel}
               for (op, result), kernel in target.lowerings.items()]
    zero = "zero point 0" if target.symmetric else "any zero point"
    integer = any(result in ("int", "float", "token", "tensor") for _, result in target.lowerings)
    stated = (("linear layers", target.small, "K and N of at least {}"),
              ("constants on the left", target.small_left, "M and K of at least {}"),
              ("3-D Convs", target.least_channels_3d, "from {} channels on"),
              ("LSTMs", target.least_hidden, "from a hidden size of {} on"))
    limits = {what: words.format(least) for what, least, words in stated if least > 1}
    blocks = any(result == "blocks" for _, result in target.lowerings)
    return {
        "name": target.name, "summary": target.summary, "provider": target.provider, "format": target.format,
        "schemes": schemes_of(target), "auto": [target.scheme, target.scheme_without_data],
        "activations": f"{target.activations}, {zero}, a scale per tensor" if integer else "float",
        "weights": "int8, zero point 0, a scale per channel" if integer else "float",
        "blocks": {"bits": sorted(target.block_bits), "sizes": sorted(target.block_sizes)} if blocks else None,
        "biases": "float" if target.float_bias or not integer else "int32", "floats": target.floats,
        "saturates": target.saturates, "fixed_sizes": target.static, "since": target.since, "opset": target.opset,
        "operators": sorted(target.operators) if target.operators is not None else None,
        "session_options": dict(target.config), "provider_options": dict(target.provider_options),
        "limits": limits, "kernels": kernels}


def sized(graph: Graph, target: Target, shapes: Mapping[str, Sequence[int]]) -> Graph:
    """The graph with fixed sizes of its free axes, where the target wants them: axis -> its one size.

    Raises UsageError where an axis has none, or several, or no name.
    """
    free, unnamed = free_axes(graph)
    if not target.static or not (free or unnamed):
        return graph
    if unnamed:
        raise UsageError(f"target {target.name} wants a size for each free axis, and some of {', '.join(unnamed)} have "
                         f"no name; {NAMELESS}")
    missing = [axis for axis in free if len(shapes.get(axis, ())) != 1]
    if missing:
        raise UsageError(f"target {target.name} wants a size for each free axis; give "
                         f"{sizes_of(missing)}")
    return static_shapes(graph, {axis: sizes[0] for axis, sizes in shapes.items()}, Context(target))


def sizes_of(axes: Sequence[str]) -> str:
    """The options that give axes their sizes, as a remedy."""
    return " ".join(f"--shape {axis}=N" for axis in axes)


def spelled_out(target: Target) -> list[Pass]:
    """Passes that write what a target lacks as operators that it has."""
    return decompose(frozenset(target.operators)) if target.operators is not None else []


def foreign(graph: Graph, target: Target) -> str:
    """What is to be said of operators that a target's provider lacks, which no pass spells out; "" where it has all."""
    found = Counter(lacking(graph, frozenset(target.operators)).values()) if target.operators is not None else {}
    if not found:
        return ""
    listed = ", ".join(f"{count} {op}" for op, count in sorted(found.items()))
    return f"{target.name} has no {listed}: onnxq check tells where these run"


def coarser(chosen: Recipe) -> Recipe | None:
    """The recipe with scales per tensor that are found at run time, where it has those per token; else None."""
    return replace(chosen, scheme=scheme("w8a8-dynamic-tensor")) if chosen.scheme.name == "w8a8-dynamic" else None


def aim(recipe: Recipe, target: Target) -> Recipe:
    """The recipe with the target's type of activations. Raises UsageError for a scheme without kernels there."""
    why = misfit(recipe.scheme, target)
    if why is not None:
        raise UsageError(f"scheme {recipe.scheme.name} has no kernels on {target.name}: {why}; use one of "
                         f"{', '.join(schemes_of(target))}")
    return replace(recipe, scheme=_typed(recipe.scheme, target))


def misfit(chosen: Scheme, target: Target) -> str | None:
    """Why a target does not run a scheme; None where it does. Weights in blocks are decoded at load where there is no
    kernel for them, so that weight-only schemes run wherever that is possible."""
    if chosen.is_float or chosen.activations is None:
        return None if chosen.is_float or target.decodes else "it decodes no weights"
    if chosen.is_dynamic:
        granularity = chosen.activations.granularity
        missing = ("MatMul", granularity) not in target.lowerings
        return f"its provider finds no scales at run time, per {granularity}" if missing else None
    integer = any((op, kind) in target.lowerings for op in ("Conv", "MatMul") for kind in ("int", "float"))
    return None if integer else "its provider multiplies no integers"


def schemes_of(target: Target) -> list[str]:
    """The named schemes that a target runs, float first."""
    return ["float", *(name for name in scheme_names() if misfit(scheme(name), target) is None)]


def _typed(chosen: Scheme, target: Target) -> Scheme:
    spec = chosen.activations
    if spec is None or spec.dynamic or (spec.dtype == target.activations and spec.symmetric >= target.symmetric):
        return chosen
    return replace(chosen, activations=replace(spec, dtype=target.activations,
                                               symmetric=spec.symmetric or target.symmetric))
