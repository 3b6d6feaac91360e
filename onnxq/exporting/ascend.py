"""What ATC and AMCT take, made of a model for target ascend, and checked as far as goes without a chip.

ATC compiles `deploy.onnx` into an .om file for one chip; `qat.onnx` is for amct_onnx.convert_qat_model, which makes a
deploy graph of its own; `model.onnx` is the same model in pairs of Q and DQ, which onnxruntime runs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.aiming import sizes_of
from onnxq.errors import ModelError
from onnxq.graph import Graph, dtype_of, free_axes, full_name, load, save, shape_of
from onnxq.passes.ascend import as_standard, deploy, for_amct
from onnxq.passes.ascend.ascend_operators import DEQUANT, LAYERS, QUANT
from onnxq.passes.manager import Context, Pass, PassManager
from onnxq.targets import TARGETS

_CHOOSE = frozenset({"If", "Loop", "Scan"})  # which compiling leaves as they are
STANDARD = "standard.onnx"  # what the device computes, in operators of ONNX


def write(model: Path, folder: Path, soc: str | None) -> dict[str, Any]:
    """Write deploy.onnx, qat.onnx, their standard form and atc.sh into a folder; what was checked, for the manifest.

    Raises ModelError for a model that ATC would refuse.
    """
    graph = load(model)
    _check(graph, model)
    skips = _rewritten(graph.copy(), deploy(), folder / "deploy.onnx")
    _rewritten(graph.copy(), for_amct(), folder / "qat.onnx")
    deployed = load(folder / "deploy.onnx")  # what is checked is the file
    found = _legal(deployed)
    _rewritten(deployed, as_standard(), folder / STANDARD)
    (folder / "atc.sh").write_text(_script(graph, soc), encoding="utf-8")
    data = (f"{STANDARD}.data",) if (folder / f"{STANDARD}.data").exists() else ()
    return {"soc": soc, "int8_layers": found, "float_layers": skips, "data": data}


def _rewritten(graph: Graph, passes: list[Pass], path: Path) -> dict[str, str]:
    """Layers that stay as they are, with the reason."""
    context = Context()
    PassManager(passes).run(graph, context)
    save(graph, path)
    return {skip.node: skip.reason for skip in context.skips}


def _check(graph: Graph, model: Path) -> None:
    target = TARGETS["ascend"]
    remedy = "compile the float model with --target ascend"
    assert target.operators is not None
    assert target.opset is not None
    foreign = sorted({full_name(n) for n, _ in graph.walk()} - set(target.operators))
    if foreign:
        last = remedy if "onnxq.plan" not in graph.metadata or set(foreign) - _CHOOSE else "export it without them"
        raise ModelError(f"{model} holds {', '.join(foreign)}, which ATC does not take; {last}")
    if graph.opset > target.opset:
        raise ModelError(f"{model} is of opset {graph.opset}, and ATC reads up to {target.opset}; {remedy}")
    free, unnamed = free_axes(graph)
    if unnamed:
        raise ModelError(f"{model} has free axes at {', '.join(unnamed)}, with which ATC compiles no int8; export the "
                         "float model with fixed sizes, and compile it with --target ascend")
    if free:
        raise ModelError(f"{model} has free axes {', '.join(free)}, with which ATC compiles no int8; {remedy} and "
                         f"{sizes_of(free)}")
    codes = [n.outputs[0] for n in graph.nodes if n.op == "QuantizeLinear"]
    if any(dtype_of(t) != np.int8 for t in codes):
        raise ModelError(f"{model} has codes of other types than int8, which ATC does not take; {remedy}")
    if not codes:
        raise ModelError(f"{model} has no int8 layers; {remedy} and --calib DATA, or leave float models to --target "
                         "cann")


def _legal(graph: Graph) -> int:
    """How many layers compute on int8, each between operators of the attributes and types that ATC's parser takes.

    Raises ModelError for anything else: that is a bug.
    """
    count = 0
    for node in graph.nodes:
        if node.op == QUANT:
            taken = {"scale": float, "offset": float, "round_mode": str, "sqrt_mode": int, "dst_type": str}
            ok = all(isinstance(node.attrs.get(name), kind) for name, kind in taken.items()) and node.attrs["scale"] > 0
        elif node.op == DEQUANT:
            scales = np.asarray(graph.read(node.inputs[1]))
            ok = scales.dtype == np.uint64 and scales.ndim == 1 and not (scales >> np.uint64(32)).any()
        elif node.op in LAYERS and dtype_of(node.inputs[1]) == np.int8:
            count += 1
            maker, bias = graph.producer(node.inputs[0]), graph.optional_input(node, 2)
            ok = maker is not None and maker.op == QUANT and (bias is None or dtype_of(bias) == np.int32)
        else:
            ok = node.op not in ("QuantizeLinear", "DequantizeLinear")
        if not ok:
            raise ModelError(f"{node.op} {node.name!r} is not of the form that ATC takes; please report this")
    return count


def _script(graph: Graph, soc: str | None) -> str:
    """The command line of ATC."""
    shapes = ";".join(f"{t.name}:{','.join(str(d) for d in shape_of(t) or ())}" for t in graph.inputs)
    image = any(len(shape_of(t) or ()) == 4 for t in graph.inputs)
    if soc is not None and not re.fullmatch(r"\w+", soc):
        raise ModelError(f"{soc!r} is no name of a chip; write for example --soc Ascend310P3, "
                         "as npu-smi info tells it")
    chosen = f"${{1:-{soc}}}" if soc is not None else "${1:?name the chip, as npu-smi info tells it: Ascend310P3}"
    return f"""#!/bin/sh
# Compiles deploy.onnx for an Ascend chip: sh atc.sh [CHIP]. Source set_env.sh of the CANN toolkit first.
# Sizes are fixed, since ATC compiles no int8 with free ones; a mode of higher precision would undo it.
set -eu
cd "$(dirname "$0")"
atc --framework=5 --model=deploy.onnx --output=model --soc_version="{chosen}" \\
    --input_format={'NCHW' if image else 'ND'} --input_shape="{shapes}" \\
    --precision_mode_v2=fp16 --op_select_implmode=high_performance --log=error
"""
