"""Which kernel averages over windows: the one named after it, or that of a Conv whose filters are all the same."""

from __future__ import annotations

from math import prod

import numpy as np

from onnxq.graph import Node, shape_of
from onnxq.passes.lower import pool_to_conv
from onnxq.targets import Target


def pool_kernel(node: Node, target: Target) -> str:
    """The kernel of an AveragePool on codes.

    That of Conv where windows are small and it can be told how much of each is padding: none, all of it counts, or the
    input's height and width are known.
    """
    plain, summed = target.lowerings[("AveragePool", "int")], target.lowerings.get(("AveragePool", "sum"))
    dims = shape_of(node.inputs[0]) or ()
    if summed is None or len(dims) != 4 or not isinstance(dims[1], int):
        return plain
    if prod(node.attrs["kernel_shape"]) > target.largest_sum or node.attrs.get("ceil_mode", 0):
        return plain
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return plain
    divisors = pool_to_conv.divisors(node)
    return plain if divisors is None or len(np.unique(divisors)) > target.most_divisors else summed
