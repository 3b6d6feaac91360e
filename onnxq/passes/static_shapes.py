"""Free axes of the inputs get sizes, and what follows from these is computed."""

from __future__ import annotations

from collections.abc import Mapping

from onnxq.graph import Graph, Tensor, fix_axes, infer_again, shape_of
from onnxq.passes.canonicalize.fold_constants import FoldConstants
from onnxq.passes.canonicalize.fold_dims import FoldDims
from onnxq.passes.canonicalize.inline_if import InlineIf
from onnxq.passes.canonicalize.remove_identity import RemoveIdentity
from onnxq.passes.manager import Context, PassManager

_MOST = 16  # rounds; each folds at least one node that the one before didn't


def static_shapes(graph: Graph, sizes: Mapping[str, int], context: Context) -> Graph:
    """A graph of the same weights whose inputs have these sizes along the axes of these names, with what computes
    shapes from them folded to constants.

    Axes of other names stay free, and so do shapes that depend on values of inputs. Raises UsageError for names and
    sizes that can't be.
    """
    return settled(fix_axes(graph, sizes), context)


def settled(graph: Graph, context: Context) -> Graph:
    """A graph of the same weights with shapes that follow from its inputs and constants, and constants that follow
    from these shapes: the ones are found from the others until nothing changes."""
    for _ in range(_MOST):
        graph = infer_again(graph)
        if not PassManager([RemoveIdentity(), FoldDims(), FoldConstants(), InlineIf()]).run(graph, context):
            break
    return graph


def free_tensors(graph: Graph) -> list[str]:
    """Names of the tensors of the main graph whose sizes are not all known."""
    tensors = [*graph.inputs, *(t for n in graph.nodes for t in n.outputs if t.name)]
    return [t.name for t in tensors if not _known(t)]


def _known(tensor: Tensor) -> bool:
    dims = shape_of(tensor)
    return dims is not None and all(isinstance(d, int) for d in dims)
