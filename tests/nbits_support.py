"""Runs of onnxruntime's weight-only kernels: what packed weights mean is what these make of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import TensorProto, helper

Array = npt.NDArray[Any]


def run_kernel(op: str, x: Array, constants: list[Array | None], at: int = 0, **attributes: Any) -> Array:
    """The output of one com.microsoft operator whose input number `at` is x; None leaves an optional input out."""
    kept = {f"c{i}": values for i, values in enumerate(constants) if values is not None}
    inputs = [f"c{i}" if f"c{i}" in kept else "" for i in range(len(constants))]
    inputs.insert(at, "x")
    node = helper.make_node(op, inputs, ["y"], domain="com.microsoft", **attributes)
    tensors = [helper.make_tensor(name, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape, values.tobytes(),
                                  raw=True) for name, values in kept.items()]
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])
