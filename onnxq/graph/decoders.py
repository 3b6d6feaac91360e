"""The decoders of packed weights: a model-local function for each encoding, of standard operators alone.

A function takes the parts of an encoding (onnxq.numerics.encodings) and the attribute `shape`, that of what it gives.
The runtime inlines it, and as its inputs are constants computes it once, when the model is loaded: nothing is left of
it but the dense weight. That needs a kernel of the CPU provider for each operator and type, and sizes that can be
inferred, so there is no NonZero and no Compress. The results of its nodes stay in memory until all weights are decoded:
`left_behind` of onnxq.numerics.encoding_choice counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxq.numerics import encodings

PACKED = "onnxq.packed"  # the domain of the functions
RESULT = "weight"


def decoder(name: str, opset: int) -> onnx.FunctionProto:
    """The function for the encoding of that `Encoded.name`, at a version of the ai.onnx operators.

    Cast takes 4 bits from 21 on, BitwiseAnd and BitwiseOr come with 18, all others with 13. ValueError for a name that
    there is no encoding of.
    """
    inputs = encodings.part_names(name)
    kind, numbers = encodings.split(name)
    body = _Body()
    {"Planes": _planes, "Bitmap": _bitmap, "FloatBitmap": _bitmap, "Groups": _groups, "FloatGroups": _groups,
     "Codebook": _codebook, "Exceptions": _exceptions, "Filled": _filled, "Transposed": _transposed}[kind](
         body, numbers, inputs, kind.startswith("Float"))
    return helper.make_function(PACKED, name, list(inputs), [RESULT], body.nodes, [helper.make_opsetid("", opset)],
                                ["shape", "perm"] if kind == "Transposed" else ["shape"])


class _Body:
    """The nodes of a function, in their order."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def add(self, op: str, inputs: Sequence[str], result: str, **attributes: Any) -> str:
        """A node of one result, whose name it gives back."""
        self.nodes.append(helper.make_node(op, list(inputs), [result], **attributes))
        return result

    def constant(self, name: str, values: Any) -> str:
        """A stored tensor."""
        return self.add("Constant", [], name, value=numpy_helper.from_array(np.asarray(values)))

    def from_attribute(self, name: str) -> str:
        """The numbers of an attribute of the function as an int64 tensor."""
        node = helper.make_node("Constant", [], [name])
        node.attribute.add(name="value_ints", type=onnx.AttributeProto.INTS, ref_attr_name=name)
        self.nodes.append(node)
        return name

    def cast(self, tensor: str, result: str, to: int) -> str:
        """A tensor in another type."""
        return self.add("Cast", [tensor], result, to=to)

    def shaped(self, tensor: str, result: str = RESULT) -> str:
        """A tensor in the shape that the attribute says."""
        return self.add("Reshape", [tensor, "shape"], result)


_Inputs = tuple[str, ...]
_Numbers = tuple[int, ...]


def _planes(body: _Body, numbers: _Numbers, inputs: _Inputs, is_float: bool) -> None:
    """The planes, each looked up in place in the code, ORed; the top one brings the sign along."""
    bits, done = numbers[0], 0
    widths = encodings.PLANES[bits]
    if widths != (4,):
        body.from_attribute("shape")
    found = ""
    for name, width in zip(inputs, widths, strict=True):
        alone, last = len(widths) == 1, done + width == bits
        if width == 4:
            plane = body.cast(name, RESULT if alone else f"{name}_bits", TensorProto.INT8)
        else:
            codes = np.arange(2**width) - (2**width * (np.arange(2**width) >= 2 ** (width - 1)) if last else 0)
            table = body.constant(f"{name}_table", (codes[_digits(width)] << done).astype(np.int8))
            each = body.add("Gather", [table, body.cast(name, f"{name}_index", TensorProto.INT32)], f"{name}_each")
            plane = body.shaped(each, RESULT if alone else f"{name}_bits")
        done += width
        found = body.add("BitwiseOr", [found, plane], RESULT if last else f"{name}_or") if found else plane


def _digits(width: int) -> Any:
    """[256, 8 / width]: the codes of `width` bits in each byte, low bits first."""
    return (np.arange(256)[:, None] >> (width * np.arange(8 // width))) & (2**width - 1)


def _bitmap(body: _Body, numbers: _Numbers, inputs: _Inputs, is_float: bool) -> None:
    """Element k of a byte is the value at (values of the bytes before) + (those before k in the byte), or 0."""
    body.from_attribute("shape")
    given = body.constant("given", _digits(1).astype(np.int8))  # [256, 8]
    counted = body.cast(given, "counted", TensorProto.INT32)
    first, second = body.constant("first", np.int64(0)), body.constant("second", np.array([1], np.int64))
    before = body.add("CumSum", [counted, body.constant("along", np.int64(1))], "before", exclusive=1)
    ones = body.add("ReduceSum", [counted, second], "ones", keepdims=0)
    index = body.cast("bitmap", "index", TensorProto.INT32)
    start = body.add("CumSum", [body.add("Gather", [ones, index], "count"), first], "start", exclusive=1)
    place = body.add("Add", [body.add("Gather", [before, index], "place_in_byte"),
                             body.add("Unsqueeze", [start, second], "start_column")], "place")
    values = body.add("Gather", ["values", place], "values_or_others")
    _zero_others(body, values, given, index, is_float)


def _groups(body: _Body, numbers: _Numbers, inputs: _Inputs, is_float: bool) -> None:
    """Each byte tells which of its row of values every element is."""
    body.from_attribute("shape")
    table = encodings.group_table(*numbers)
    places = body.constant("places", np.maximum(table, 0))
    given = body.constant("given", (table >= 0).astype(np.int8))
    index = body.cast("codes", "index", TensorProto.INT32)
    wide = body.cast(places, "wide", TensorProto.INT32)
    values = body.add("GatherElements", ["values", body.add("Gather", [wide, index], "place")], "values_or_others",
                      axis=1)
    _zero_others(body, values, given, index, is_float)


def _zero_others(body: _Body, values: str, given: str, index: str, is_float: bool) -> None:
    """The values where `given`, looked up by byte, is 1; 0 elsewhere."""
    if is_float:
        kept = body.add("Gather", [body.cast(given, "is_given", TensorProto.BOOL), index], "kept")
        body.shaped(body.add("Where", [kept, values, body.constant("zero", np.float32(0))], "elements"))
    else:  # Where has no kernel for int8; -1 has all bits
        kept = body.add("Gather", [body.add("Neg", [given], "mask"), index], "kept")
        body.shaped(body.add("BitwiseAnd", [values, kept], "elements"))


def _codebook(body: _Body, numbers: _Numbers, inputs: _Inputs, is_float: bool) -> None:
    """Whole bytes are looked up, in a table of all that a byte can stand for."""
    body.from_attribute("shape")
    table = "table"
    if numbers[0] < 8:
        table = body.add("Gather", ["table", body.constant("digits", _digits(numbers[0]).astype(np.int32))], "rows")
    body.shaped(body.add("Gather", [table, body.cast("codes", "index", TensorProto.INT32)], "elements"))


def _exceptions(body: _Body, numbers: _Numbers, inputs: _Inputs, is_float: bool) -> None:
    """The values go to where the steps lead."""
    body.from_attribute("shape")
    steps = body.cast("steps", "wide_steps", TensorProto.INT32)
    places = body.add("CumSum", [steps, body.constant("first", np.int64(0))], "places")
    body.shaped(body.add("ScatterElements", ["dense", places, "values"], "elements", axis=0))


def _filled(body: _Body, numbers: _Numbers, inputs: _Inputs, is_float: bool) -> None:
    body.add("Expand", ["value", body.from_attribute("shape")], RESULT)


def _transposed(body: _Body, numbers: _Numbers, inputs: _Inputs, is_float: bool) -> None:
    body.add("Transpose", ["rows"], RESULT)
    body.nodes[-1].attribute.add(name="perm", type=onnx.AttributeProto.INTS, ref_attr_name="perm")
