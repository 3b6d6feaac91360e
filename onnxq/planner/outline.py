"""Which nodes run in integers and which tensors are stored as codes, before any range is known.

Nodes with weights (Conv, MatMul, Gemm) decide where int8 regions are. Others join where all they read can be codes and
what they make is read by an int8 node again; so no region ends in an operator that gains nothing from codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.plan import FLOAT, GIVEN, NodePlan
from onnxq.planner import composites, given
from onnxq.planner.chains import Chain, chain, weighted
from onnxq.planner.recurrent import lower_lstms
from onnxq.planner.rules import verdicts
from onnxq.planner.storing import store
from onnxq.recipe import Recipe, Scheme
from onnxq.targets import Target

WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})
SAME_SCALE = frozenset({"Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
JOINING = SAME_SCALE | {"Add", "AveragePool", "Concat", "GlobalAveragePool"}
NORMS = frozenset({
    "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LRN", "LayerNormalization",
    "LpNormalization", "MeanVarianceNormalization", "RMSNormalization", "SkipLayerNormalization",
})


@dataclass
class Outline:
    """Verdicts without scales. `ranges_of` are the tensors to calibrate; `same_as` maps a tensor to the one whose
    scale it takes (data movement keeps codes as they are)."""

    nodes: dict[str, NodePlan] = field(default_factory=dict)
    ranges_of: list[str] = field(default_factory=list)
    same_as: dict[str, str] = field(default_factory=dict)


def outline(graph: Graph, recipe: Recipe, target: Target) -> Outline:
    """Decide on every node of the graph, bodies of If/Loop included (where only LSTMs compute in integers)."""
    outliner = _Outliner(graph, recipe, target)
    found = outliner.run()
    if not recipe.scheme.is_float:
        lower_lstms(graph, found.nodes, outliner.kept, recipe.scheme, target)
        store(graph, found.nodes, outliner.kept)
    return found


class _Outliner:
    def __init__(self, graph: Graph, recipe: Recipe, target: Target) -> None:
        self.graph, self.recipe, self.target = graph, recipe, target
        self.kept = verdicts(graph, recipe)
        self.labels = composites.find(graph)
        self.barred = {*self.kept, *(n.name for _, body in graph.subgraphs() for n, _ in body.walk())}
        self.chains: dict[str, Chain] = {}
        self.reasons: dict[str, str] = {}
        self.possible: set[str] = set()  # names of tensors that could be stored as codes
        self.int_nodes: dict[str, Node] = {}
        self.given: dict[str, NodePlan] = {}  # verdicts on what the model's maker quantized

    def run(self) -> Outline:
        if self.recipe.scheme.is_dynamic:
            self._weighted_nodes()
            return self._dynamic()
        self._weighted_nodes()
        self._join()
        self._leave()
        while self._let_go():
            self._leave()
        return self._static()

    # -------------------------------------------------------------- who may

    def _allowed(self, node: Node) -> str | None:
        """Why a node must stay float whatever its neighbours are; None when it may be quantized."""
        if node.name in self.kept:
            return self.kept[node.name]
        if given.is_quantized(self.graph, node):
            return "quantized already"
        if node.domain:
            return f"operator {node.domain}.{node.op} is not known here"
        other = _other_data(node)
        if other is not None and node.op not in ("If", "Loop", "Scan"):
            return other
        if self.recipe.scheme.is_float:
            return "the scheme is float"
        if node.name in self.labels:
            return f"part of a {self.labels[node.name]}, which stays whole and float"
        if node.op in NORMS:
            return "normalisations are always float"
        if node.op == "Softmax":
            return "Softmax is always float"
        if node.op not in self.recipe.scheme.operators:
            return _no_kernel(node, self.recipe.scheme, self.target.name)
        return None

    def _weighted_nodes(self) -> None:
        for node in self.graph.nodes:
            if node.op in WEIGHTED | JOINING | self.target.pairs_with_q and not node.domain:
                found = given.between_pairs(self.graph, node, self._data_inputs(node), self.target)
                self.given.update((plan.node, plan) for plan in found)
            reason = self._allowed(node)
            if reason is None and node.op in WEIGHTED:
                link = chain(self.graph, node, self.barred)
                reason = (self._stored(node) or weighted(self.graph, node) or self._too_small(node)
                          or self._beside_given(node, link) or self._name_taken(node, link))
                if reason is None:
                    self.int_nodes[node.name], self.chains[node.name] = node, link
            if reason is not None:
                self.reasons[node.name] = reason

    def _stored(self, node: Node) -> str | None:
        stored = any(given.decodes(self.graph, t) for t in node.inputs[:2])
        return "its weights are stored as int8 already" if stored else None

    def _too_small(self, node: Node) -> str | None:
        if node.op == "Conv":
            return None
        dims = shape_of(node.inputs[1]) or ()
        for letter, size in zip("KN", dims, strict=False):
            if int(size or 0) < self.target.small:
                return f"{letter} = {size} is below {self.target.small}: converting costs more than int8 gains"
        return None

    def _beside_given(self, node: Node, link: Chain) -> str | None:
        """The model's own codes have scales of their own, which a second pair of Q and DQ would round again."""
        around = [self.graph.producer(node.inputs[0]), *self.graph.consumers(link.result)]
        beside = any(n is not None and n.op in ("DequantizeLinear", "QuantizeLinear") for n in around)
        return "beside it are codes that the model came with, which are not quantized twice" if beside else None

    def _name_taken(self, node: Node, link: Chain) -> str | None:
        """A model that was compiled once holds names such as `x.q`."""
        tensors = [link.result, *(node.inputs[:2] if node.op in WEIGHTED else self._data_inputs(node))]
        wanted = [f"{t.name}.{part}" for t in tensors for part in (
            "q", "scale", "zero_point", "dq", "raw", "colsum", "row_low", "row_high", "row_scale")]
        wanted += [f"{node.name}.{part}" for part in (
            "bias", "bias.q", "bias.scale", "bias.dq", "sums", "floats", "factor", "scaled")]
        taken = next((name for name in wanted if self.graph.has(name)), None)
        return None if taken is None else f"the model has a tensor {taken!r} already, a name that its codes would take"

    # -------------------------------------------------------------- regions

    def _join(self) -> None:
        """Forward: a node joins when all the data it reads could be codes."""
        for node in self.graph.nodes:
            if node.name in self.int_nodes:
                self.possible.add(self.chains[node.name].result.name)
                continue
            if node.name in self.reasons or node.op not in JOINING:
                continue
            data = self._data_inputs(node)
            # codes pass through data movement unchanged, so there is no rounding that could clamp
            link = (Chain(node, None, None, node.outputs[0]) if node.op in SAME_SCALE else
                    chain(self.graph, node, self.barred))
            if not data or not all(t.name in self.possible for t in data):
                reason: str | None = "not everything it reads comes from an int8 operator"
            else:
                reason = self._misfit(node) or self._name_taken(node, link)
            if reason is not None:
                self.reasons[node.name] = reason
                continue
            self.int_nodes[node.name], self.chains[node.name] = node, link
            self.possible.add(link.result.name)

    def _leave(self) -> None:
        """Backward: what joined leaves again unless an int8 node reads its result."""
        for node in reversed(self.graph.nodes):
            if node.name not in self.int_nodes or node.op in WEIGHTED:
                continue
            result = self.chains[node.name].result
            if not any(self._reads_codes(user, result) for user in self.graph.consumers(result)):
                del self.int_nodes[node.name]
                del self.chains[node.name]
                self.reasons[node.name] = "its result is read by float operators only"

    def _let_go(self) -> bool:
        """Arithmetic beside a linear layer whose result is float after all is float, too; whether there was any."""
        codes = {self.chains[n.name].result.name for n in self.int_nodes.values() if self._int_result(n)}
        gone = [n for n in self.int_nodes.values() if n.op in JOINING - SAME_SCALE
                and not all(t.name in codes for t in self._data_inputs(n))]
        for node in gone:
            del self.int_nodes[node.name]
            del self.chains[node.name]
            self.reasons[node.name] = "not everything it reads is made as int8"
        return bool(gone)

    def _reads_codes(self, user: Node, tensor: Tensor) -> bool:
        return user.name in self.int_nodes and any(t is tensor for t in self._data_inputs(user))

    def _data_inputs(self, node: Node) -> list[Tensor]:
        """Inputs that carry activations (a Reshape's shape and a Conv's weight do not)."""
        if node.op in ("Add", "Concat", "Mul"):
            return list(node.inputs)
        if node.op == "Where":
            return [t for t in node.inputs[1:] if not is_constant(t)]
        return list(node.inputs[:1])

    def _misfit(self, node: Node) -> str | None:
        """Why an integer kernel does not take this form of its operator; None when it does."""
        if node.op == "MaxPool" and any(len(t.outputs) or self.graph.is_output(t) for t in node.outputs[1:]):
            return "its indices are read, which the int8 kernel does not give"
        if node.op == "AveragePool" and any(d != 1 for d in node.attrs.get("dilations", ())):
            return "the int8 kernel knows no dilations"
        if node.op == "AveragePool" and node.attrs.get("ceil_mode", 0) and node.attrs.get("count_include_pad", 0):
            return "the int8 kernel counts other elements where a window hangs over the padding"
        if not all(dtype_of(t) in (None, np.float32) for t in self._data_inputs(node)):
            return "it does not work on float32"
        return None

    # -------------------------------------------------------------- verdicts

    def _int_result(self, node: Node) -> bool:
        """Whether a node's result is stored as codes: always for Conv, for linears where only int8 nodes read it."""
        if node.op not in ("MatMul", "Gemm"):
            return True
        link = self.chains[node.name]
        if self.graph.is_output(link.result) or link.bias_add is not None:
            return False  # the integer-output MatMul kernel has no bias
        if node.op == "Gemm" and len(node.inputs) > 2 and ("Gemm", "int") not in self.target.lowerings:
            return False
        users = self.graph.consumers(link.result)
        return bool(users) and all(self._reads_codes(u, link.result) for u in users)

    def _static(self) -> Outline:
        found = Outline()
        for node in self.graph.nodes:
            if node.name in self.int_nodes:
                self._int_verdict(node, found)
            elif node.name not in found.nodes:
                found.nodes[node.name] = self._float_verdict(node)
        self._bodies(found)
        return found

    def _int_verdict(self, node: Node, found: Outline) -> None:
        link = self.chains[node.name]
        as_int = self._int_result(node)
        lowering = self.target.lowerings[(node.op, "int" if as_int else "float")]
        data = self._data_inputs(node)
        for tensor in data:
            self._want(found, tensor)
        if as_int:
            if node.op in SAME_SCALE:
                found.same_as[link.result.name] = data[0].name
            else:
                self._want(found, link.result)
        found.nodes[node.name] = NodePlan(
            node.name, node.op, self.recipe.scheme.name, lowering, _why(node, as_int),
            int_inputs=tuple(range(len(data))), int_output=as_int,
            result=(link.result if as_int else link.unclamped).name,
            weight=node.inputs[1].name if node.op in WEIGHTED else None,
            bias_add=link.bias_add.name if link.bias_add is not None else None)
        absorbed = [link.bias_add, link.clamp if as_int else None]
        for member in absorbed:
            if member is not None:
                found.nodes[member.name] = NodePlan(
                    member.name, member.op, self.recipe.scheme.name, lowering,
                    f"computed by the kernel of {node.name}", part_of=node.name)

    def _dynamic(self) -> Outline:
        found = Outline()
        spec = self.recipe.scheme.activations
        assert spec is not None
        for node in self.graph.nodes:
            if node.name in self.int_nodes:
                add = self.chains[node.name].bias_add
                scheme, lowering = self.recipe.scheme.name, self.target.lowerings[(node.op, spec.granularity)]
                found.nodes[node.name] = NodePlan(
                    node.name, node.op, scheme, lowering,
                    f"constant weights; a scale per {spec.granularity} of the activation at run time", int_inputs=(0,),
                    result=self.chains[node.name].unclamped.name, weight=node.inputs[1].name,
                    activation=spec.granularity, bias_add=add.name if add is not None else None)
                if add is not None:
                    found.nodes[add.name] = NodePlan(add.name, add.op, scheme, lowering,
                                                     f"computed by the kernel of {node.name}", part_of=node.name)
            elif node.name not in found.nodes:
                found.nodes[node.name] = self._float_verdict(node)
        self._bodies(found)
        return found

    def _want(self, found: Outline, tensor: Tensor) -> None:
        """Note that a tensor needs a range of its own, unless its scale is another's."""
        if tensor.name not in found.same_as and tensor.name not in found.ranges_of:
            found.ranges_of.append(tensor.name)

    def _float_verdict(self, node: Node) -> NodePlan:
        if node.name in self.given:
            return self.given[node.name]
        quantized = given.is_quantized(self.graph, node)
        reason = self.reasons.get(node.name) or (
            "no int8 kernel in front of it can absorb it" if node.op in ("Clip", "Relu") else
            "its neighbours are float")
        return NodePlan(node.name, node.op, GIVEN if quantized else FLOAT,
                        GIVEN if quantized else FLOAT, reason)

    def _bodies(self, found: Outline) -> None:
        for owner, body in self.graph.subgraphs():
            for node, holder in body.walk():
                scheme = GIVEN if given.is_quantized(holder, node) else FLOAT
                reason = _other_data(node) or f"in a body of {owner.op} {owner.name}, whose ranges are not calibrated"
                found.nodes[node.name] = NodePlan(node.name, node.op, scheme, scheme,
                                                  "quantized already" if scheme == GIVEN else reason)
        for name, verdict in list(found.nodes.items()):
            if verdict.op in ("If", "Loop", "Scan") and verdict.scheme == FLOAT:
                found.nodes[name] = replace(verdict, reason="control flow is float")


def _why(node: Node, as_int: bool) -> str:
    if node.op in WEIGHTED:
        return "constant weights" if as_int else "constant weights; its result is wanted in float"
    return "between int8 operators"


def _no_kernel(node: Node, scheme: Scheme, target: str) -> str:
    if node.op in ("If", "Loop", "Scan"):
        return "control flow is float"
    if node.op == "Gather":
        return "a look-up, which copies floats"
    if scheme.is_dynamic:
        return f"scheme {scheme.name} quantizes {', '.join(scheme.operators)} only"
    return f"no int8 kernel for {node.op} on {target}"


def _other_data(node: Node) -> str | None:
    """Why a node that does not make float32 is left alone; None when it does, or when its type is unknown."""
    made = {str(dtype_of(t)) for t in node.outputs if t.name and dtype_of(t) is not None}
    if made and "float32" not in made:
        return f"makes {', '.join(sorted(made))}: there is nothing to quantize"
    return None
