"""What onnxruntime really executed: which kernels, on which provider, and which of the planned nodes they stand for.

A compiled file says what was asked for. onnxruntime then fuses, splits, renames and converts nodes as it loads the
model, so whether a planned int8 node runs as an integer kernel is read back from the optimized graph and the profile.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from onnxq.errors import DataError, ModelError
from onnxq.runtime.session import Session, SessionOptions

# (name, op_type, domain, inputs, outputs) of a node.
NodeRow = tuple[str, str, str, tuple[str, ...], tuple[str, ...]]

_KERNEL_SUFFIX = "_kernel_time"
# The NHWC layout transformation appends this to a node's name.
_RENAMED = re.compile(r"_token_\d+$")
# The NCHWc one names a node by the tensor that it used to produce, and this.
_NCHWC = "_nchwc"
_HELPERS = frozenset({"QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput"})


@dataclass(frozen=True)
class Executed:
    """A node as it ran.

    `op` has the domain before it ("com.microsoft.QLinearAdd") unless that is ai.onnx. `provider` is "" for a node of
    the optimized graph that no run executed. `ms` is the time in milliseconds per run of the model, by the median of
    the node's executions, all of those in a run added up. Nodes inside If, Loop and Scan bodies, and the kernels of a
    provider that compiles whole subgraphs, are known from the profile only: they have no inputs and outputs, and a bare
    `op`.
    """

    name: str
    op: str
    provider: str
    ms: float
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Planned:
    """A node to look for, in the names of the compiled file.

    `weights` are initializers that it alone reads. Where it is fused with the nodes behind it, an activation say, only
    the last one's output survives: give that among the `outputs`, too.
    """

    name: str
    outputs: tuple[str, ...]
    weights: tuple[str, ...]


@dataclass
class _Kernel:
    """One node of the profile; `microseconds` of each of its executions."""

    name: str
    op: str
    index: str
    provider: str
    microseconds: list[int] = field(default_factory=list)


def executed(
    model_path: str | os.PathLike[str],
    feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]],
    options: SessionOptions,
    read_nodes: Callable[[str], Iterable[NodeRow]],
) -> list[Executed]:
    """Run the model once on each feed and return its nodes as onnxruntime executed them.

    The nodes of the top graph come first, in the order in which they ran, then those in nested graphs.
    `read_nodes(path)` yields the top graph's nodes of a saved model in the file's order; the model's external data
    needn't be read. The temporary folder that it lies in, which takes about the model's size, is removed.

    A node without a name takes the one that onnxruntime makes for it, `<op>_<index>`, or stays without one when another
    node has that name.

    Raises DataError for no feeds or feeds that don't fit, and what Session raises.
    """
    if not feeds:
        raise DataError("there are no feeds to observe the model on; give at least one")
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        session, saved = _recording(model_path, options, folder)
        try:
            nodes = [] if saved is None else list(read_nodes(saved))
            for feed in feeds:
                session.run(feed)
        finally:
            profile = session.end_profiling()
        top, nested = _kernels(profile)
    return _joined(nodes, top, nested, len(feeds))


def optimized(model_path: str | os.PathLike[str], options: SessionOptions,
              read_nodes: Callable[[str], Iterable[NodeRow]]) -> list[Executed]:
    """The nodes of the top graph as onnxruntime rewrote it, without a run: no provider is known, and no time.

    `read_nodes` as for `executed`. Raises what Session raises.
    """
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        saved = os.path.join(folder, "optimized.onnx")
        Session(model_path, options, optimized_path=saved)
        return [Executed(name, _qualified(op, domain), "", 0.0, inputs, outputs)
                for name, op, domain, inputs, outputs in read_nodes(saved)]


def match(planned: Sequence[Planned], ran: Sequence[Executed]) -> dict[str, Executed | None]:
    """For the name of each planned node the executed node that does its work, or None.

    In this order: the node of that name; the node of that name plus `_token_N`, as onnxruntime's NHWC transformation
    renames; the node that produces one of the planned outputs, as a fusion keeps its last node's output; the node that
    reads one of the planned weights. Quantize, dequantize, transpose and reorder nodes are put between the kernels and
    take over their outputs and weights: they count by name, and by output or weight only when no other node does.
    Several planned nodes may share one executed node.
    """
    names: dict[str, Executed] = {}
    renamed: dict[str, Executed] = {}
    for node in ran:
        names.setdefault(node.name, node)
        if _RENAMED.search(node.name) and not _is_helper(node):
            renamed.setdefault(_RENAMED.sub("", node.name), node)
    kernels = _tensors([node for node in ran if not _is_helper(node)])
    helpers = _tensors([node for node in ran if _is_helper(node)])
    return {
        wanted.name: names.get(wanted.name)
        or renamed.get(wanted.name)
        or _by_tensor(wanted, *kernels)
        or _by_tensor(wanted, *helpers)
        for wanted in planned
    }


def _recording(model_path: str | os.PathLike[str], options: SessionOptions, folder: str) -> tuple[Session, str | None]:
    """A session that profiles into `folder`, and the path there of the optimized graph."""
    saved = os.path.join(folder, "optimized.onnx")
    prefix = os.path.join(folder, "profile")
    try:
        return Session(model_path, options, profile_prefix=prefix, optimized_path=saved), saved
    except ModelError as error:
        # Providers that compile subgraphs (TensorRT, CANN) can't save the graph; the profile still tells.
        if "contains compiled nodes" not in str(error):
            raise
        return Session(model_path, options, profile_prefix=prefix), None


def _tensors(nodes: Sequence[Executed]) -> tuple[dict[str, Executed], dict[str, Executed]]:
    """The producer and the first reader of each tensor."""
    producers = {node.name.removesuffix(_NCHWC): node for node in nodes if node.name.endswith(_NCHWC)}
    producers.update({tensor: node for node in nodes for tensor in node.outputs if tensor})
    readers = {tensor: node for node in reversed(nodes) for tensor in node.inputs if tensor}
    return producers, readers


def _by_tensor(wanted: Planned, producers: Mapping[str, Executed], readers: Mapping[str, Executed]) -> Executed | None:
    found = [producers.get(output) for output in wanted.outputs] + [readers.get(weight) for weight in wanted.weights]
    return next((node for node in found if node is not None), None)


def _is_helper(node: Executed) -> bool:
    return node.op.rsplit(".", 1)[-1] in _HELPERS


def _kernels(profile: str) -> tuple[list[_Kernel], list[_Kernel]]:
    """The nodes of the top graph and of nested graphs, each in the order in which they first ran.

    Events are written as they end, so those of a nested graph stand right before its `SequentialExecutor::Execute`,
    no earlier than it began, and the top graph's stand before the Execute that `model_run` follows. The intervals
    decide, since the profile doesn't name graphs and two graphs may share node names and indices.
    """
    with open(profile, encoding="utf-8") as file:
        try:
            events: list[dict[str, Any]] = json.load(file)
        except ValueError as error:
            raise ModelError(
                "onnxruntime wrote a profile that is not valid JSON, as older versions do for node names with quotes "
                "or control characters; update onnxruntime or rename the nodes"
            ) from error
    top: list[dict[str, Any]] = []
    nested: list[dict[str, Any]] = []
    pending: list[dict[str, Any]] = []
    last_graph: list[dict[str, Any]] = []
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL_SUFFIX):
            pending.append(event)
        elif event.get("name") == "SequentialExecutor::Execute":
            start = len(pending)
            while start and pending[start - 1]["ts"] >= event["ts"]:
                start -= 1
            nested += last_graph
            last_graph = pending[start:]
            del pending[start:]
        elif event.get("name") == "model_run":
            top += last_graph + pending
            last_graph, pending = [], []
    return _totals(top), _totals(nested)


def _totals(events: Iterable[dict[str, Any]]) -> list[_Kernel]:
    kernels: dict[tuple[str, str, str], _Kernel] = {}
    for event in events:
        name = event["name"][: -len(_KERNEL_SUFFIX)]
        arguments = event["args"]
        op, index = str(arguments.get("op_name", "")), str(arguments.get("node_index", ""))
        kernel = kernels.setdefault((name, op, index), _Kernel(name, op, index, str(arguments.get("provider", ""))))
        kernel.microseconds.append(int(event["dur"]))
    return list(kernels.values())


def _joined(nodes: list[NodeRow], top: list[_Kernel], nested: list[_Kernel], runs: int) -> list[Executed]:
    by_node = _assigned(nodes, top)
    given = {node[0] for node in nodes}
    rows: list[Executed] = []
    for position, (name, op, domain, inputs, outputs) in enumerate(nodes):
        kernel = by_node.get(position)
        qualified = _qualified(op, domain)
        if kernel is None:
            rows.append(Executed(name, qualified, "", 0.0, inputs, outputs))
            continue
        if not name and kernel.name not in given:
            name = kernel.name
        rows.append(Executed(name, qualified, kernel.provider, _ms(kernel, runs), inputs, outputs))
    taken = {id(kernel) for kernel in by_node.values()}
    alone = [kernel for kernel in top if id(kernel) not in taken] + nested
    return rows + [Executed(kernel.name, kernel.op, kernel.provider, _ms(kernel, runs), (), ()) for kernel in alone]


def _qualified(op: str, domain: str) -> str:
    return op if domain in ("", "ai.onnx") else f"{domain}.{op}"


def _assigned(nodes: list[NodeRow], top: list[_Kernel]) -> dict[int, _Kernel]:
    """The kernel of each node, by the node's position in the saved graph.

    The profile calls a node without a name `<op>_<index>`, with an index that the saved file doesn't hold. But the file
    lists the nodes in the order in which they run, so within an op the unnamed ones pair off in order. A node that was
    really named `Conv_4` may meet an unnamed one that is called so; the unnamed one is that with index 4.
    """
    same_name: dict[str, list[_Kernel]] = defaultdict(list)
    for kernel in top:
        same_name[kernel.name].append(kernel)
    found: dict[int, _Kernel] = {}
    unnamed_nodes: dict[str, list[int]] = defaultdict(list)
    for position, (name, op, *_) in enumerate(nodes):
        if not name:
            unnamed_nodes[op].append(position)
        elif name in same_name:
            found[position] = min(same_name[name], key=_is_generated)
    taken = {id(kernel) for kernel in found.values()}
    for op, positions in unnamed_nodes.items():
        kernels = [k for k in top if k.op == op and _is_generated(k) and id(k) not in taken]
        if len(kernels) == len(positions):
            found.update(zip(positions, kernels, strict=True))
    return found


def _is_generated(kernel: _Kernel) -> bool:
    return kernel.name == f"{kernel.op}_{kernel.index}"


def _ms(kernel: _Kernel, runs: int) -> float:
    """The median is what runs take; the mean would count the first one, which allocates."""
    return median(kernel.microseconds) / 1000.0 * len(kernel.microseconds) / runs
