"""Decoders in onnxruntime against numpy: exact at every level of optimization, and gone once the model is loaded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import random
from onnx import inliner, numpy_helper
from packing_support import SHAPE, Example, examples, packed

from onnxq.graph.decoders import PACKED, decoder
from onnxq.numerics.encoding_choice import left_behind

EXAMPLES = examples()
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
TABLES = 256 * 8 * 12  # bytes of tables, and of what is computed of them, that each weight shares
each_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())


def optimized(path: Path, level: str, saved: Path) -> tuple[onnxruntime.InferenceSession, onnx.ModelProto]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(saved)
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session, onnx.load(saved)


def operators(model: onnx.ModelProto) -> Counter[tuple[str, str]]:
    return Counter((n.domain, n.op_type) for n in model.graph.node)


@each_example
@pytest.mark.parametrize("level", LEVELS)
def test_runs_as_the_dense_weight_does(example: Example, level: str, tmp_path: Path) -> None:
    """The same bits come out, whether the runtime folds or not; where it does, the very weight is left."""
    dense, small, _ = packed(example, tmp_path)
    feed = {"x": random(3, SHAPE[0])}
    wanted, there = optimized(dense, level, tmp_path / "a.onnx")
    found, here = optimized(small, level, tmp_path / "b.onnx")
    assert np.array_equal(found.run(None, feed)[0], wanted.run(None, feed)[0], equal_nan=True)
    if level == "ORT_DISABLE_ALL":
        assert len(here.graph.node) > len(there.graph.node), "the decoder runs with the model"
        return
    assert operators(here) == operators(there)
    stored = {t.name: numpy_helper.to_array(t) for t in here.graph.initializer}
    assert set(stored) == {t.name for t in there.graph.initializer}, "no array of the encoding is left"
    assert stored["w"].tobytes() == example.weight.tobytes()


@each_example
def test_is_valid_onnx(example: Example, tmp_path: Path) -> None:
    _, small, _ = packed(example, tmp_path)
    onnx.checker.check_model(str(small), full_check=True)
    model = onnx.load(small)
    assert {f.name for f in model.functions} == set(example.names)
    assert sorted(n.op_type for n in model.graph.node if n.domain == PACKED) == sorted(example.names)


@each_example
def test_what_is_left_behind(example: Example, tmp_path: Path) -> None:
    """The estimate is the size of all results of a decoder, as onnx infers it, but for tables."""
    _, small, _ = packed(example, tmp_path)
    flat = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(onnx.load(small)), data_prop=True)
    shapes = {v.name: v.type.tensor_type for v in flat.graph.value_info}
    total = 0
    for item in flat.graph.node:
        if item.op_type in ("Constant", "DynamicQuantizeMatMul", "MatMul"):
            continue
        kind = shapes[item.output[0]]
        dims = [d.dim_value for d in kind.shape.dim]
        assert all(dims), f"{item.op_type} has a size that can't be inferred"
        width = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
        total += int(np.prod(dims)) * width
    estimate = left_behind(example.form.encode(example.weight).outline())
    assert estimate <= total <= estimate + TABLES


def test_a_function_says_what_it_takes_and_keeps_its_opset() -> None:
    for name in ("Planes_6", "Groups_2_4_3", "Exceptions"):
        function = decoder(name, 23)
        assert (function.domain, function.name) == (PACKED, name)
        assert [(o.domain, o.version) for o in function.opset_import] == [("", 23)]
    assert list(decoder("Planes_6", 21).input) == ["low", "high"]
    with pytest.raises(ValueError, match="no encoding"):
        decoder("Planes_8", 21)
