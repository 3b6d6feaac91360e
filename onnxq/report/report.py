"""What a compilation or verification found, as plain data: the same in Python, report.json, terminal and HTML."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxq.errors import OutputError

Number = float  # a field named `float` hides the type below it


@dataclass
class Size:
    """Bytes of the float and the compiled model with their external data; ratio = compiled / float."""

    float_bytes: int
    compiled_bytes: int

    @property
    def ratio(self) -> float:
        """Compiled over float, below 1 when the file shrank."""
        return self.compiled_bytes / max(self.float_bytes, 1)


@dataclass
class Latency:
    """Milliseconds per run, medians over alternating blocks; speedup is the median ratio float / compiled.

    `low` and `high` are the least and greatest ratio of a round; `data` says what was fed.
    """

    float_ms: float
    compiled_ms: float
    speedup: float
    low: float
    high: float
    shapes: dict[str, list[int]]
    threads: int
    data: str


@dataclass
class OutputAccuracy:
    """One output against the float model's: sqnr_db is None when the two are identical."""

    sqnr_db: float | None
    cosine: float
    max_abs: float


@dataclass
class Accuracy:
    """The metric on `data` for both models; `drop` is positive when the compiled model is worse."""

    metric: str
    float: Number | None
    compiled: Number
    drop: Number | None
    outputs: dict[str, OutputAccuracy]
    data: str
    rows: int
    note: str = ""


@dataclass
class Semantic:
    """Whether the right graph was written: the compiled graph, unoptimized, against its QDQ twin (dB; None: identical),
    and whether the runtime computes what it says: optimized against unoptimized."""

    twin_sqnr_db: float | None
    runtime_sqnr_db: float | None
    rows: int


@dataclass
class Encoding:
    """How a tensor is stored as codes: real = (code - zero_point) * scale (ONNX DequantizeLinear-21).

    `granularity` is what shares a scale: the tensor, a channel along `axis`, a block of `block_size` elements along it,
    or a token (a row). `scales` counts them; of several, `scale` is the median, and `least_scale` and `greatest_scale`
    are the bounds. `scale` is None where it is found at run time, or by a calibration that has not taken place;
    `zero_point` is None then, and where zero points differ. `low` and `high` are the least and the greatest real number
    that a code stands for. Of a weight, `float_bytes` is its size as float32 and `code_bytes` that of its codes and
    scales.
    """

    dtype: str
    granularity: str
    scale: float | None = None
    zero_point: int | None = None
    low: float | None = None
    high: float | None = None
    axis: int | None = None
    block_size: int | None = None
    scales: int | None = None
    least_scale: float | None = None
    greatest_scale: float | None = None
    float_bytes: int | None = None
    code_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is None is left out."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclass
class NodeRow:
    """One node's verdict and what became of it.

    `inputs` are the computed tensors that it reads (stored ones are not among them), `outputs` what it makes, by their
    names in the float model; `codes_in` those of its inputs that are read as codes, `codes_out` the tensor that its
    kernel stores as codes (it may lie behind a Relu or Clip that the kernel computes along), `weights` those of its
    weights that are stored as codes; `part_of` names the node whose kernel computes this one, too. `times` are the
    milliseconds of the kernels that were timed for it, by itself or with others of its kind; `float` is among them.
    """

    name: str
    op: str
    scheme: str
    lowering: str
    ran_as: str
    provider: str
    reason: str
    ms: float | None = None
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    codes_in: list[str] = field(default_factory=list)
    codes_out: str | None = None
    weights: list[str] = field(default_factory=list)
    part_of: str | None = None
    times: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; of the fields behind `ms`, those with nothing in them are left out."""
        data = dataclasses.asdict(self)
        return {k: v for k, v in data.items() if k not in _MAY_LACK or v}


_MAY_LACK = ("inputs", "outputs", "codes_in", "codes_out", "weights", "part_of", "times")


@dataclass
class LayerRow:
    """One layer's output, compiled against float, in a run where everything before it was compiled, too."""

    name: str
    op: str
    sqnr_db: float | None
    cosine: float
    max_abs: float


@dataclass
class PrunedRow:
    """A weight of which some became 0: the layers that read it, how many numbers it has, their share of zeros, by which
    method, and the squared change of what the layers make over its squares, on calibration data (None: not observed).
    """

    weight: str
    layers: list[str]
    count: int
    zeros: float
    method: str
    error: float | None


@dataclass
class Verdict:
    """ok is False when a check failed; notices are what the user should know all the same."""

    failures: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return not self.failures


@dataclass
class Stage:
    """A stage of the compilation and the seconds it took."""

    name: str
    seconds: float


@dataclass
class Report:
    """Everything that is known of a result. What was not measured is None.

    `tensors` maps the name of a tensor that is stored as codes to how it is. `packing` is what onnxq.passes.manager's
    Packing says of weights that were packed, None where that was not asked for.
    """

    model: str
    output: str | None
    scheme: str
    size: Size | None = None
    latency: Latency | None = None
    accuracy: Accuracy | None = None
    semantic: Semantic | None = None
    nodes: list[NodeRow] = field(default_factory=list)
    tensors: dict[str, Encoding] = field(default_factory=dict)
    layers: list[LayerRow] = field(default_factory=list)
    pruned: list[PrunedRow] = field(default_factory=list)
    packing: dict[str, Any] | None = None
    verdict: Verdict = field(default_factory=Verdict)
    environment: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return self.verdict.ok

    def to_dict(self) -> dict[str, Any]:
        """Plain data, JSON's types alone; infinite figures become None."""
        data: dict[str, Any] = plain({
            **dataclasses.asdict(self), "nodes": [node.to_dict() for node in self.nodes],
            "tensors": {name: found.to_dict() for name, found in self.tensors.items()}})
        data["verdict"]["ok"] = self.ok
        if self.size is not None:
            data["size"]["ratio"] = self.size.ratio
        return data

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def save(self, folder: str | Path) -> None:
        """Write report.json and report.html into a folder, which is made if needed. Raises OutputError."""
        from onnxq.report.html import render

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "report.json").write_text(self.to_json() + "\n", encoding="utf-8")
            (folder / "report.html").write_text(render(self), encoding="utf-8")
        except OSError as e:
            raise OutputError(f"the report can't be written to {folder} ({e.strerror}); choose another --report folder"
                              ) from None


def plain(value: Any) -> Any:
    """A value in JSON's types alone: keys as text, tuples as lists, infinite figures and NaN as None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
