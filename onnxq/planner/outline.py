"""Which nodes run in integers and which tensors are stored as codes, before any range is known.

Nodes with weights (Conv, MatMul, Gemm) decide where int8 regions are; which others join them, `joining` says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from onnxq.graph import Graph, Node, Tensor, dtype_of, is_constant, shape_of
from onnxq.passes.lower.pool_to_conv import KERNEL as POOLED_BY_CONV
from onnxq.plan import FLOAT, GIVEN, MOVES_CODES, NodePlan
from onnxq.planner import at_run_time, composites, few_channels, given, weight_only
from onnxq.planner.chains import Chain, chain, weighted
from onnxq.planner.joining import JOINING, RANGES, WEIGHTED, Regions, data_inputs, name_taken, results
from onnxq.planner.left import lower_left
from onnxq.planner.pools import pool_kernel
from onnxq.planner.products import Product, lower_products
from onnxq.planner.recurrent import lower_lstms
from onnxq.planner.rules import named, schemes, verdicts
from onnxq.planner.storing import store
from onnxq.recipe import Recipe
from onnxq.schemes import Scheme, TensorSpec
from onnxq.targets import Target

NORMS = frozenset({
    "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LRN", "LayerNormalization",
    "LpNormalization", "MeanVarianceNormalization", "RMSNormalization", "SkipLayerNormalization",
})


@dataclass(frozen=True)
class Measured:
    """What timing and calibration decided against the tables: `refused` maps a node that stays float to the reason,
    `at_run_time` are those of them whose kernel finds its scale at run time; `per_token` maps a node whose kernel finds
    one for each row to the reason."""

    refused: Mapping[str, str] = field(default_factory=dict)
    at_run_time: frozenset[str] = frozenset()
    per_token: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """A scheme that one node was given by a budget, and why."""

    scheme: Scheme
    reason: str


@dataclass
class Outline:
    """Verdicts without scales.

    `ranges_of` are the tensors to calibrate, `known` the ranges that need no data (of constants, of what lies between 0
    and 1 by its operator); `same_as` maps a tensor to the one whose scale it takes (data movement keeps codes as they
    are); `concats` maps the result of a Concat to what it joins; `halved` are int8 factors whose codes have to stay
    within -64 and 64, since the target adds up two products in 16 bits; `formats` those of weights in blocks; `ties`
    maps a table to the layer's weight whose codes it takes.
    """

    nodes: dict[str, NodePlan] = field(default_factory=dict)
    ranges_of: list[str] = field(default_factory=list)
    known: dict[str, tuple[float, float]] = field(default_factory=dict)
    same_as: dict[str, str] = field(default_factory=dict)
    concats: dict[str, list[str]] = field(default_factory=dict)
    halved: set[str] = field(default_factory=set)
    formats: dict[str, TensorSpec] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)

    def want(self, graph: Graph, tensor: Tensor) -> None:
        """Note that a tensor needs a range of its own, unless its scale is another's or it is known."""
        if tensor.name in self.same_as or tensor.name in self.known or tensor.name in self.ranges_of:
            return
        if is_constant(tensor):
            values = graph.read(tensor)
            self.known[tensor.name] = float(values.min()), float(values.max())
        else:
            self.ranges_of.append(tensor.name)

    def want_product(self, graph: Graph, product: Product, saturates: bool) -> None:
        """Note the ranges of both factors; that of a Softmax needs no data."""
        maker = graph.producer(product.first)
        if maker is not None and maker.op == "Softmax" and product.first.name not in self.ranges_of:
            self.known.setdefault(product.first.name, (0.0, 1.0))
        self.want(graph, product.first)
        self.want(graph, product.second)
        if saturates:
            self.halved.add(product.second.name)


_BESIDE_CODES = "codes of the target have their zero in the middle and clamp nothing; it fuses this with what is around"
_NOTHING = Measured()


def outline(graph: Graph, recipe: Recipe, target: Target, measured: Measured = _NOTHING,
            sensitive: Mapping[str, str] = MappingProxyType({}),
            chosen: Mapping[str, Chosen] = MappingProxyType({}),
            tied: Mapping[str, str] = MappingProxyType({})) -> Outline:
    """Decide on every node of the graph, bodies of If/Loop included (where only LSTMs compute in integers).

    `measured` names nodes that don't run as the tables say, because timing said otherwise; `sensitive` maps a node that
    stays float, weights included, since int8 would cost too much accuracy there, to the reason; `chosen` one whose
    weights have another format than the recipe says to that; `tied` a table to the layer's weight that is its
    transpose.
    """
    outliner = _Outliner(graph, recipe, target, measured, sensitive)
    found = outliner.run()
    if recipe.scheme.is_weight_only:
        free = {name: scheme for name, scheme in schemes(graph, recipe).items() if name not in outliner.kept}
        free |= {name: one.scheme for name, one in chosen.items() if name in free}
        found.formats = weight_only.choose(graph, found.nodes, free, measured.refused, target)
        reasons = {name: rule.reason for name, rule in named(graph, recipe).items() if rule.reason}
        for name, verdict in found.nodes.items():
            if verdict.weight in found.formats and name in reasons:
                found.nodes[name] = replace(verdict, reason=f"{verdict.reason}; {reasons[name]}")
        for name, one in chosen.items():
            found.nodes[name] = replace(found.nodes[name], reason=f"{found.nodes[name].reason}; {one.reason}")
        found.ties = weight_only.tie(graph, found.nodes, found.formats, tied, target)
        store(graph, found.nodes, outliner.kept)
        return found
    decided = {*outliner.kept, *measured.refused, *measured.per_token}
    if not recipe.scheme.is_float and not recipe.scheme.is_dynamic:
        for tensor in lower_left(graph, found.nodes, decided, recipe.scheme, target):
            found.want(graph, tensor)
        if recipe.attention == "int8":
            for product in lower_products(graph, found.nodes, decided, recipe.scheme, target):
                found.want_product(graph, product, target.saturates)
    if recipe.scheme.for_stored is not None:
        _store_in_blocks(graph, found, recipe.scheme.for_stored, outliner.kept, measured.refused, target)
    if not recipe.scheme.is_float:
        lower_lstms(graph, found.nodes, decided, recipe.scheme, target)
        at_run_time.per_tensor(graph, found.nodes, measured.at_run_time, outliner.barred, recipe.scheme, target)
        at_run_time.per_token(graph, found.nodes, measured.per_token, outliner.barred, recipe.scheme, target)
        if target.decodes:
            store(graph, found.nodes, outliner.kept)
    return found


def _store_in_blocks(graph: Graph, found: Outline, scheme: Scheme, kept: Collection[str], refused: Mapping[str, str],
                     target: Target) -> None:
    """Give blocks to what computes in float beside integer layers: look-ups by kernel, layers decoded at load."""
    free = {n.name: found.nodes[n.name] for n, _ in graph.walk() if n.name in found.nodes and n.name not in kept}
    refused = {**refused, **{name: v.reason for name, v in free.items() if v.op in weight_only.LINEAR}}
    takers = {name: scheme for name, verdict in free.items() if verdict.scheme == FLOAT}
    found.formats = weight_only.choose(graph, found.nodes, takers, refused, target)


class _Outliner:
    def __init__(self, graph: Graph, recipe: Recipe, target: Target, measured: Measured,
                 sensitive: Mapping[str, str]) -> None:
        self.graph, self.recipe, self.target, self.measured = graph, recipe, target, measured
        self.kept = {**sensitive, **verdicts(graph, recipe)}
        self.labels = composites.find(graph)
        self.barred = {*self.kept, *(n.name for _, body in graph.subgraphs() for n, _ in body.walk())}
        self.chains: dict[str, Chain] = {}
        self.reasons: dict[str, str] = {}
        self.int_nodes: dict[str, Node] = {}
        self.given: dict[str, NodePlan] = {}  # verdicts on what the model's maker quantized
        self.regions = Regions(graph, target, self.int_nodes, self.chains, self.reasons, self.barred)

    def run(self) -> Outline:
        if self.recipe.scheme.is_weight_only:
            return self._all_float()
        self._weighted_nodes()
        if self.recipe.scheme.is_dynamic:
            return self._dynamic()
        self.regions.grow()
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
            return f"part of {_article(self.labels[node.name])} in small operators, which stays whole and float"
        if node.op in NORMS:
            return "normalisations stay float: 8 bits are too coarse for their mean and variance"
        if node.op == "Softmax":
            return "Softmax stays float: 8 bits are too coarse for its exponentials"
        if node.op not in self.recipe.scheme.operators:
            return _no_kernel(node, self.recipe.scheme, self.target.name)
        if not self._has_kernel(node):
            return f"{self.target.name} has no integer kernel for {node.op}"
        return self.measured.refused.get(node.name) or self.measured.per_token.get(node.name)

    def _has_kernel(self, node: Node) -> bool:
        spec = self.recipe.scheme.activations
        kinds = ("int", "float") if spec is None or not spec.dynamic else (spec.granularity,)
        return (self.recipe.scheme.is_weight_only or node.op == "LSTM"
                or any((node.op, kind) in self.target.lowerings for kind in kinds))

    def _note_given(self, node: Node) -> None:
        if node.op in WEIGHTED | JOINING | self.target.pairs_with_q and not node.domain:
            found = given.between_pairs(self.graph, node, data_inputs(node), self.target)
            self.given.update((plan.node, plan) for plan in found)

    def _weighted_nodes(self) -> None:
        for node in self.graph.nodes:
            self._note_given(node)
            reason = self._allowed(node)
            if reason is None and node.op in WEIGHTED:
                link = chain(self.graph, node, self.barred)
                reason = (self._stored(node) or weighted(self.graph, node) or self._too_small(node)
                          or self._beside_given(node, link)
                          or name_taken(self.graph, node, [link.result, *node.inputs[:2]]))
                if reason is None:
                    self.int_nodes[node.name], self.chains[node.name] = node, link
            if reason is not None:
                self.reasons[node.name] = reason

    def _stored(self, node: Node) -> str | None:
        stored = any(given.decodes(self.graph, t) for t in node.inputs[:2])
        return "its weights are stored as int8 already" if stored else None

    def _too_small(self, node: Node) -> str | None:
        dims = shape_of(node.inputs[1]) or ()
        if node.op == "Conv":
            least, channels = self.target.least_channels_3d, int(dims[1] or 0)
            if len(dims) < 5 or channels >= least:
                return None
            return f"a 3-D Conv whose filters read {channels} channels, below {least}, is faster in float"
        for letter, size in zip("KN", dims, strict=False):
            if int(size or 0) < self.target.small:
                what = "reads" if letter == "K" else "makes"
                return (f"it {what} {size} columns ({letter}), below {self.target.small}: converting costs more than "
                        "int8 gains")
        return None

    def _beside_given(self, node: Node, link: Chain) -> str | None:
        """The model's own codes have scales of their own, which a second pair of Q and DQ would round again."""
        around = [self.graph.producer(node.inputs[0]), *self.graph.consumers(link.result)]
        beside = any(n is not None and n.op in ("DequantizeLinear", "QuantizeLinear") for n in around)
        return "beside it are codes that the model came with, which are not quantized twice" if beside else None

    # -------------------------------------------------------------- verdicts

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
        as_int = self.regions.int_result(node)
        lowering = (pool_kernel(node, self.target) if node.op == "AveragePool"
                    else self.target.lowerings[(node.op, "int" if as_int else "float")])
        data, made = data_inputs(node), [t.name for t in results(self.graph, node, link)]
        for tensor in data:
            found.want(self.graph, tensor)
        if as_int:
            self._made_as_codes(found, node, data, made)
        found.nodes[node.name] = NodePlan(
            node.name, node.op, self.recipe.scheme.name, lowering, _why(node, as_int, lowering),
            int_inputs=tuple(range(len(data))), int_output=as_int,
            result=made[0] if as_int else link.unclamped.name, more_results=tuple(made[1:]),
            weight=node.inputs[1].name if node.op in WEIGHTED else None,
            bias_add=link.bias_add.name if link.bias_add is not None else None,
            extra_channels=self._extra_channels(node))
        clamps = link.clamp is not None and as_int and not self.target.symmetric
        if link.clamp is not None and as_int and not clamps:
            self.reasons[link.clamp.name] = _BESIDE_CODES
        for member in [link.bias_add, link.clamp if clamps else None]:
            if member is not None:
                found.nodes[member.name] = NodePlan(
                    member.name, member.op, self.recipe.scheme.name, lowering,
                    f"computed by the kernel of {node.name}", part_of=node.name)

    def _extra_channels(self, node: Node) -> int:
        if node.op != "Conv" or node.attrs.get("group", 1) != 1:
            return 0
        return few_channels.missing([int(d or 0) for d in shape_of(node.inputs[1]) or ()], self.target)

    @staticmethod
    def _made_as_codes(found: Outline, node: Node, data: list[Tensor], made: list[str]) -> None:
        if node.op in MOVES_CODES:
            found.same_as.update(dict.fromkeys(made, data[0].name))
        elif node.op in RANGES:
            found.known[made[0]] = RANGES[node.op]
        else:
            found.ranges_of.append(made[0])
        if node.op == "Concat":
            found.concats[made[0]] = [t.name for t in data]

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
                    f"{self._weights_said()}; what it reads is quantized at run time, a scale per {spec.granularity}",
                    int_inputs=(0,),
                    result=self.chains[node.name].unclamped.name, weight=node.inputs[1].name,
                    activation=spec.granularity, bias_add=add.name if add is not None else None)
                if add is not None:
                    found.nodes[add.name] = NodePlan(add.name, add.op, scheme, lowering,
                                                     f"computed by the kernel of {node.name}", part_of=node.name)
            elif node.name not in found.nodes:
                found.nodes[node.name] = self._float_verdict(node)
        self._bodies(found)
        return found

    def _weights_said(self) -> str:
        spec = self.recipe.scheme.weights
        assert spec is not None
        if not self.recipe.scheme.has_two_levels:
            return "int8 weights"
        return f"{spec.dtype} weights in blocks of {spec.block_size}, which the kernel reads as int8"

    def _all_float(self) -> Outline:
        """What a weight-only scheme begins with."""
        found = Outline()
        for node in self.graph.nodes:
            self._note_given(node)
            reason = self._allowed(node)
            if reason is None and node.op in weight_only.LINEAR:
                reason = weighted(self.graph, node)
            self.reasons[node.name] = reason or weight_only.left(self.graph, node)
            found.nodes[node.name] = self._float_verdict(node)
        self._bodies(found)
        return found

    def _float_verdict(self, node: Node) -> NodePlan:
        if node.name in self.given:
            return self.given[node.name]
        quantized = given.is_quantized(self.graph, node)
        reason = self.reasons.get(node.name, "its neighbours are float")
        return NodePlan(node.name, node.op, GIVEN if quantized else FLOAT,
                        GIVEN if quantized else FLOAT, reason)

    def _bodies(self, found: Outline) -> None:
        for owner, body in self.graph.subgraphs():
            for node, holder in body.walk():
                scheme = GIVEN if given.is_quantized(holder, node) else FLOAT
                reason = _other_data(node) or f"in a body of {owner.op} {owner.name}, where calibration does not look"
                found.nodes[node.name] = NodePlan(node.name, node.op, scheme, scheme,
                                                  "quantized already" if scheme == GIVEN else reason)
        for name, verdict in list(found.nodes.items()):
            if verdict.op in ("If", "Loop", "Scan") and verdict.scheme == FLOAT:
                found.nodes[name] = replace(verdict, reason="it only chooses what runs; see the nodes inside")


def _why(node: Node, as_int: bool, lowering: str) -> str:
    if node.op in WEIGHTED:
        made = "int8" if as_int else "float"
        return f"its weights are stored in the model, so that they and what it reads are int8; its result is {made}"
    if node.op == "AveragePool" and lowering == POOLED_BY_CONV:
        return "between int8 operators; over so few elements a Conv of ones is the faster kernel"
    return "between int8 operators"


def _no_kernel(node: Node, scheme: Scheme, target: str) -> str:
    if node.op in ("If", "Loop", "Scan"):
        return "it only chooses what runs; see the nodes inside"
    if node.op == "Gather" and not scheme.is_weight_only and scheme.stored is None:
        return "a look-up in a table that is too small to gain from int8"
    if node.op == "PRelu" and not scheme.is_dynamic:
        return "a slope per channel has no int8 kernel"
    if node.op == "SpaceToDepth" and not scheme.is_dynamic:
        return "its kernel takes codes from a later onnxruntime than 1.25 on"
    if scheme.is_dynamic or scheme.is_weight_only:
        return f"scheme {scheme.name} quantizes {', '.join(scheme.operators)} alone"
    return f"onnxq has no int8 form of {node.op} on {target}"


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOR' else 'a'} {name}"  # an RMSNorm: it is spoken letter by letter


def _other_data(node: Node) -> str | None:
    """Why a node that does not make float32 is left alone; None when it does, or when its type is unknown."""
    made = {str(dtype_of(t)) for t in node.outputs if t.name and dtype_of(t) is not None}
    if made and "float32" not in made:
        kind = "true or false" if made == {"bool"} else ", ".join(sorted(made))
        return f"it makes {kind}, and only float32 is quantized"
    return None
