"""Codes below 8 bits in as many bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, Tensor, is_constant, shape_of
from onnxq.numerics.dtypes import DType
from onnxq.passes.blocks import code_type, layout
from onnxq.passes.manager import Context, Pass
from onnxq.plan import UNTOUCHED, Plan
from onnxq.targets import Target

OPSETS = {4: 21, 2: 25}  # the first in which Cast takes a type of so many bits
_PARTS = ("q", "zero_points")


@dataclass(frozen=True)
class PackCodes(Pass):
    """Cast(q int8) -> Cast(q int4), and the same of uint4, int2 and uint2, for weights that are decoded at load.

    Source: ONNX Cast-21 (4 bits) and Cast-25 (2 bits); several codes share a byte in the file.
    """

    name: ClassVar[str] = "pack-codes"

    def visit(self, node: Node, graph: Graph, context: Context) -> bool:
        """Narrow what one Cast reads."""
        if node.op != "Cast" or node.domain or not is_constant(node.inputs[0]):
            return False
        codes = node.inputs[0]
        name, _, part = str(codes.name).rpartition(".")
        form = layout(context.plan, name) if part in _PARTS else None
        if form is None or form.dtype.bits == 8:
            return False
        if not takes(context.target, form.dtype.bits):
            return context.skip(node, f"the target does not decode {form.dtype.name}")
        if graph.opset < OPSETS[form.dtype.bits]:
            return context.skip(node, f"Cast takes {form.dtype.name} from opset {OPSETS[form.dtype.bits]} on")
        graph.replace_input(node, 0, _narrow(graph, codes, form.dtype))
        return True


def _narrow(graph: Graph, codes: Tensor, dtype: DType) -> Tensor:
    """The codes in their own type, computed as they are saved."""
    narrow = code_type(dtype)
    shape = [int(d or 0) for d in shape_of(codes) or ()]
    return graph.computed(f"{codes.name}.packed", narrow, shape, lambda: graph.read(codes).astype(narrow))


def takes(target: Target | None, bits: int) -> bool:
    """Whether a target decodes codes of so many bits as it loads them, by its runtime and by the opset that it ends
    at."""
    return target is None or (bits in target.code_bits and OPSETS[bits] <= (target.opset or OPSETS[bits]))


def opset_for_codes(plan: Plan, target: Target) -> int:
    """The opset that the weights which are decoded at load need to take no more bits than they have; 0 for any, and
    where the target does not decode such."""
    weights = {v.weight for v in plan.nodes.values() if v.activation == UNTOUCHED and not v.is_int and v.weight}
    four = {4} if plan.multiples else set()
    bits = four | {form.dtype.bits for form in (layout(plan, w) for w in weights) if form is not None}
    return max((OPSETS[b] for b in bits & OPSETS.keys() if takes(target, b)), default=0)
