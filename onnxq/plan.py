"""The Plan: what happens to every node and why, with the scales that were decided on.

Passes read it and decide nothing. It serialises to `plan.json` and `plan.npz` beside each other; the same Plan on the
same model gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq.errors import OutputError, UsageError
from onnxq.numerics.affine import QuantParams
from onnxq.numerics.blocks import Search
from onnxq.numerics.dtypes import DType, by_name
from onnxq.numerics.two_level import TwoLevel

FLOAT = "float"
STORED = "stored"  # scheme and lowering of nodes that compute in float on weights kept as int8
STATIC, TENSOR, TOKEN = "static", "tensor", "token"  # when and for what an activation's scale is found
UNTOUCHED = "untouched"  # in place of that for kernels that read floats
GIVEN = "given"  # quantized by whoever made the model
# operators that hand codes on as they are, at the scale that they came with
MOVES_CODES = frozenset({
    "Clip", "DepthToSpace", "Expand", "Flatten", "Gather", "MaxPool", "Pad", "Relu", "Reshape", "Resize", "Slice",
    "Split", "Squeeze", "Transpose", "Unsqueeze",
})
BOUNDED, FLOORED, ROW_FLOORED = "bounded mask", "floor", "floor per row"  # forms of a Masking
# prefixes of names in plan.npz
_SHIFT, _SMOOTHING, _ROUNDED, _MULTIPLES = "bias_shifts/", "smoothings/", "rounded/", "multiples/"
_NARROWED, _PRUNED = "narrowed/", "pruned/"


@dataclass(frozen=True)
class NodePlan:
    """The verdict on one node of the canonical graph.

    `scheme` is a scheme's name, `float`, `stored` or `given`; `lowering` the kernel that shall run it, or `float`.
    `int_inputs` are the input positions read as codes, `int_output` tells whether the result is stored as codes.
    `result` names the tensor that the kernel makes (behind an absorbed bias Add, Relu or Clip), `more_results` those
    that a Split makes besides; `weight` names the quantized weight, `stored` the weights that are kept as codes and
    decoded, or those of an LSTM, which has two; `activation` when the scale of what is read is known: `static`, or at
    run time per `tensor` or per `token` (row), or `untouched` where floats are read; `bias_add` the Add node whose
    constant becomes the bias; `part_of` the node whose kernel computes this one too (an absorbed Relu, a bias Add);
    `extra_channels` by how many channels of zeros what a Conv reads is widened.
    """

    node: str
    op: str
    scheme: str
    lowering: str
    reason: str
    int_inputs: tuple[int, ...] = ()
    int_output: bool = False
    result: str | None = None
    weight: str | None = None
    stored: tuple[str, ...] = ()
    activation: str = STATIC
    bias_add: str | None = None
    part_of: str | None = None
    more_results: tuple[str, ...] = ()
    extra_channels: int = 0

    @property
    def is_int(self) -> bool:
        """Whether onnxq makes this node run in integers."""
        return self.scheme not in (FLOAT, GIVEN, STORED)


@dataclass(frozen=True)
class Blocks:
    """A weight whose codes follow from its values alone: blocks of `block_size` along `axis`, which is that of a
    layer's inputs, with scales by `search` (see numerics.blocks)."""

    dtype: DType
    block_size: int
    axis: int
    search: Search

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return self.dtype.signed


@dataclass(frozen=True, eq=False)
class Multiples:
    """int8 [nb, N] by block of `block_size` inputs: by what the 4-bit levels of int8 codes are multiplied."""

    block_size: int
    values: npt.NDArray[np.int8]


@dataclass(frozen=True)
class Masking:
    """How the hidden scores of one Softmax are raised to where its exponentials stay normal numbers.

    `form` is BOUNDED (the mask is raised, to `fill` below its row's greatest), FLOORED (masked scores are, to `fill`)
    or ROW_FLOORED (they are, to `fill` below their row's greatest).
    """

    softmax: str
    form: str
    fill: float


@dataclass(frozen=True, eq=False)
class Smoothing:
    """The channels of `tensor`, which `layers` read, are divided by `factors`, float32 [C], their weights multiplied.

    `axis` is that of the channels, -1 or 1. `absorbed` tells whether constants above take the division, or a Mul does.
    With a `source`, int64 [C], the tensor's channels are repeated first: c is source[c] of those that it had, and the
    weights of n copies are an n-th each.
    """

    tensor: str
    layers: tuple[str, ...]
    factors: npt.NDArray[np.float32]
    axis: int
    absorbed: bool
    source: npt.NDArray[np.int64] | None = None

    @property
    def copies(self) -> npt.NDArray[np.int64]:
        """int64 [C]: how many channels have the same source as each; 1 without one."""
        if self.source is None:
            return np.ones(self.factors.size, np.int64)
        return np.bincount(self.source)[self.source]


@dataclass(frozen=True, eq=False)
class Narrowed:
    """Of `count` groups of channels of `tensor`, and of all that is made with it, those in `kept` stay, int64 [G'] in
    ascending order (see passes.families; `grouped` as there).

    `weights` are those of `layers`, which read the groups, in their shapes but with fewer input channels, float32;
    `shifts` what is added to their biases, float32 [N] or [0] for nothing. `heads`: the groups are heads of an
    attention.
    """

    tensor: str
    layers: tuple[str, ...]
    count: int
    kept: npt.NDArray[np.int64]
    weights: tuple[npt.NDArray[np.float32], ...]
    shifts: tuple[npt.NDArray[np.float32], ...]
    grouped: bool = False
    heads: bool = False


@dataclass
class Plan:
    """All verdicts and scales.

    `activations` maps a tensor's name to its parameters (per-tensor); `weights` a weight's name to its (per channel or
    by blocks); `blocks` that of a weight whose parameters and codes are found as they are written, one at a time;
    `bias_shifts` a node's name to what is added to its bias, float32 [C]. `added` maps the name of a Where that hides
    scores to the number that is added to them instead; `maskings` the name of a Softmax to what becomes of its mask.
    Entries of these two may be left out one by one. `smoothings` maps a tensor of the canonical graph to what scales
    its channels; all else is told of the graph that this makes. `dropped` names passes that rewrite the float graph,
    and are left out since they gain nothing. `rounded` maps a weight's name to its codes, where these are not the
    nearest ones; `multiples` one whose int8 codes are levels of 4 bits times these, and are stored as such. `ties`
    maps a table to the layer's weight that is its transpose: it has no codes but those of this one.
    `widths` maps a weight to the bits that all but a few of its int8 codes fit. `narrowed` maps a tensor of the
    canonical graph to the channels that it keeps, in the order in which they go; all else is told of the graph that
    this makes.
    `pruned` maps the name of a weight of the canonical graph to its values with zeros, float32, which everything else
    is told of. `wide` maps nodes that stay float32 where the rest of a graph computes in float16 to why they do;
    `limits` the name of a constant with numbers beyond float16's range to what these become there, apart from the sign.
    """

    scheme: str
    target: str
    nodes: dict[str, NodePlan] = field(default_factory=dict)
    activations: dict[str, QuantParams] = field(default_factory=dict)
    weights: dict[str, QuantParams] = field(default_factory=dict)
    bias_shifts: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    added: dict[str, float] = field(default_factory=dict)
    maskings: dict[str, Masking] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    smoothings: dict[str, Smoothing] = field(default_factory=dict)
    rounded: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    blocks: dict[str, Blocks] = field(default_factory=dict)
    multiples: dict[str, Multiples] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    narrowed: dict[str, Narrowed] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    pruned: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    wide: dict[str, str] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    def node(self, name: str) -> NodePlan | None:
        """The verdict on a node, None for one that came later (Q, DQ and the like)."""
        return self.nodes.get(name)

    def quantized(self) -> list[NodePlan]:
        """Nodes with a kernel of their own that computes on codes."""
        return [n for n in self.nodes.values() if n.is_int and n.part_of is None]

    def two_level(self, weight: str) -> TwoLevel | None:
        """Both levels of a weight's scales, where it has two."""
        found = self.multiples.get(weight)
        return None if found is None else TwoLevel(self.weights[weight].scale, found.values, found.block_size)

    def to_time(self) -> Plan:
        """The Plan with scales that are found quickly: what is timed does not depend on them."""
        quick = {name: dataclasses.replace(how, search="absmax") for name, how in self.blocks.items()}
        return dataclasses.replace(self, blocks=quick)

    @property
    def quantizes(self) -> bool:
        """Whether anything is quantized or stored as codes."""
        return any(n.scheme not in (FLOAT, GIVEN) for n in self.nodes.values())

    @property
    def changes(self) -> bool:
        """Whether anything is rewritten at all."""
        return self.quantizes or self.shrinks or bool(self.added) or bool(self.maskings)

    @property
    def shrinks(self) -> bool:
        """Whether weights become 0, or channels go."""
        return bool(self.pruned) or bool(self.narrowed)

    def digest(self) -> str:
        """SHA-256 over all decisions, in hexadecimal."""
        sha = hashlib.sha256(json.dumps(self._verdicts(), sort_keys=True).encode())
        for key, array in sorted(self._arrays().items()):
            sha.update(f"{key}{array.dtype}{array.shape}".encode())
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write plan.json and plan.npz into a folder, made if needed. Raises OutputError when that can't be done."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "plan.json").write_text(json.dumps(self._verdicts(), indent=1) + "\n", encoding="utf-8")
            np.savez_compressed(folder / "plan.npz", **self._arrays())  # type: ignore[arg-type]
        except OSError as e:
            raise OutputError(f"the plan can't be written ({e.strerror}); name another folder than "
                              f"{folder}") from None

    @staticmethod
    def load(folder: str | Path) -> Plan:
        """The Plan of a folder written by `save`. Raises UsageError when there is none."""
        folder = Path(folder)
        try:
            data = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            # opened here: of a file that is no archive, NumPy would leave it open
            with (folder / "plan.npz").open("rb") as file, np.load(file) as z:
                arrays = {k: z[k] for k in z.files}
            return Plan._of(data, arrays)
        except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile, UsageError) as e:
            raise UsageError(f"{folder} holds no plan ({e}); name a folder with plan.json and plan.npz") from None

    @staticmethod
    def _of(data: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]]) -> Plan:
        plan = Plan(data["scheme"], data["target"])
        for item in data["nodes"]:
            plan.nodes[item["node"]] = NodePlan(**{
                **item, **{k: tuple(item[k]) for k in ("int_inputs", "more_results", "stored")}})
        for kind, table in (("activations", plan.activations), ("weights", plan.weights)):
            for name, spec in data[kind].items():
                table[name] = QuantParams(arrays[f"{kind}/{name}/scale"], arrays[f"{kind}/{name}/zero_point"],
                                          by_name(spec["dtype"]), spec["axis"], spec["block_size"])
        plan.blocks = {name: Blocks(**{**spec, "dtype": by_name(spec["dtype"])})
                       for name, spec in data.get("blocks", {}).items()}
        plan.added = dict(data.get("added", {}))
        plan.dropped = tuple(data.get("dropped", ()))
        plan.maskings = {item["softmax"]: Masking(**item) for item in data.get("maskings", [])}
        plan.smoothings = {item["tensor"]: Smoothing(
            **{**item, "layers": tuple(item["layers"])}, factors=arrays[f"{_SMOOTHING}{item['tensor']}/factors"],
            source=arrays.get(f"{_SMOOTHING}{item['tensor']}/source"))
            for item in data.get("smoothings", [])}
        plan.multiples = {name: Multiples(size, arrays[f"{_MULTIPLES}{name}"])
                          for name, size in data.get("multiples", {}).items()}
        for item in data.get("narrowed", []):
            name = f"{_NARROWED}{item['tensor']}"
            weights, shifts = (tuple(arrays[f"{name}/{part}/{k}"] for k in range(len(item["layers"])))
                               for part in ("weights", "shifts"))
            told = {**item, "layers": tuple(item["layers"]), "kept": arrays[f"{name}/kept"]}
            plan.narrowed[item["tensor"]] = Narrowed(**told, weights=weights, shifts=shifts)
        plan.widths = dict(data.get("widths", {}))
        plan.ties = dict(data.get("ties", {}))
        plan.wide, plan.limits = dict(data.get("wide", {})), dict(data.get("limits", {}))
        plan.rounded = {k.removeprefix(_ROUNDED): v for k, v in arrays.items() if k.startswith(_ROUNDED)}
        plan.pruned = {k.removeprefix(_PRUNED): v for k, v in arrays.items() if k.startswith(_PRUNED)}
        plan.bias_shifts = {k.removeprefix(_SHIFT): v for k, v in arrays.items() if k.startswith(_SHIFT)}
        return plan

    def _verdicts(self) -> dict[str, object]:
        def specs(table: dict[str, QuantParams]) -> dict[str, object]:
            return {k: {"dtype": p.dtype.name, "axis": p.axis, "block_size": p.block_size} for k, p in table.items()}

        return {"scheme": self.scheme, "target": self.target,
                "nodes": [dataclasses.asdict(n) for n in self.nodes.values()],
                "activations": specs(self.activations), "weights": specs(self.weights),
                "blocks": {k: {**vars(b), "dtype": b.dtype.name} for k, b in self.blocks.items()},
                "multiples": {k: m.block_size for k, m in self.multiples.items()},
                "narrowed": [{"tensor": n.tensor, "layers": n.layers, "count": n.count, "grouped": n.grouped,
                              "heads": n.heads} for n in self.narrowed.values()],
                "widths": self.widths, "ties": self.ties, "dropped": list(self.dropped), "added": self.added,
                "wide": self.wide, "limits": self.limits,
                "maskings": [dataclasses.asdict(m) for m in self.maskings.values()],
                "smoothings": [{"tensor": s.tensor, "layers": s.layers, "axis": s.axis, "absorbed": s.absorbed}
                               for s in self.smoothings.values()]}

    def _arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        pairs: Iterable[tuple[str, dict[str, QuantParams]]] = (
            ("activations", self.activations), ("weights", self.weights))
        scales = {f"{kind}/{name}/{part}": np.asarray(getattr(params, part))
                  for kind, table in pairs for name, params in table.items() for part in ("scale", "zero_point")}
        return (scales | {f"{_SHIFT}{name}": shift for name, shift in self.bias_shifts.items()}
                | {f"{_ROUNDED}{name}": codes for name, codes in self.rounded.items()}
                | {f"{_MULTIPLES}{name}": found.values for name, found in self.multiples.items()}
                | {f"{_NARROWED}{name}/kept": found.kept for name, found in self.narrowed.items()}
                | {f"{_NARROWED}{name}/{part}/{k}": array for name, found in self.narrowed.items()
                   for part, arrays in (("weights", found.weights), ("shifts", found.shifts))
                   for k, array in enumerate(arrays)}
                | {f"{_PRUNED}{name}": values for name, values in self.pruned.items()}
                | {f"{_SMOOTHING}{name}/{part}": array for name, found in self.smoothings.items()
                   for part, array in (("factors", found.factors), ("source", found.source)) if array is not None})
