"""What ONNX's schemas say of the types that a node's inputs and outputs may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import defs

from onnxq.graph.graph import Node, Tensor
from onnxq.graph.tensors import type_number
from onnxq.graph.types import STANDARD, paired


@dataclass(frozen=True)
class Slot:
    """One input or output: the schema's type variable for it, or its one type, and whether a dtype is allowed there."""

    variable: str
    allowed: bool


def slots(node: Node, opset: int, dtype: np.dtype[Any]) -> tuple[list[Slot], list[Slot]] | None:
    """What a node's inputs and outputs, in their order, may be; None for an operator that ONNX doesn't have."""
    if node.domain not in STANDARD or not defs.has(node.op, opset, ""):
        return None
    schema = defs.get_schema(node.op, opset, "")
    name = type_string(dtype)
    allowed = {c.type_param_str: name in c.allowed_type_strs for c in schema.type_constraints}

    def given(formal: Sequence[Any], actual: Sequence[Tensor]) -> list[Slot]:
        return [Slot(p.type_str, allowed.get(p.type_str, p.type_str == name))
                for p, _ in paired(formal, actual)]

    return given(schema.inputs, node.inputs), given(schema.outputs, node.outputs)


def type_string(dtype: np.dtype[Any]) -> str:
    """The type of a tensor as schemas write it: tensor(float)."""
    return f"tensor({onnx.TensorProto.DataType.Name(type_number(dtype)).lower()})"
