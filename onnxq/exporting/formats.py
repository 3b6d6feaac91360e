"""What each format puts into its folder. A format is one function from a Job to the models that it wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path, PurePosixPath

from onnxq import sizes
from onnxq.errors import ModelError
from onnxq.exporting import ascend
from onnxq.exporting.manifest import Model
from onnxq.graph import Header, packed_weights, stored_bytes
from onnxq.runtime import ort_format
from onnxq.runtime.machine import STAND_INS
from onnxq.runtime.session import CPU
from onnxq.targets import Target

FIXED, RUNTIME = "fixed", "runtime"
OPTIMIZATIONS = (FIXED, RUNTIME)

# onnxruntime's packages for JavaScript that the shipped programs name, and what these read
NPM_VERSION = "1.30.0"
WEB_OPSET, WEB_IR_VERSION = 26, 13
WEB_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
WEB_BYTES = 2_000_000_000  # a page holds a model in one buffer, and those end at 2 GB
ORT_BYTES = 2_000_000_000  # a flatbuffer ends at 2 GB, with its weights in it

_TAKEN = frozenset({"index.html", "manifest.json", "model.onnx", "model.ort", "node_modules", "package.json", "sample",
                    "smoke.cpp", "smoke.mjs", "smoke.py"})  # what a folder may hold besides weights


@dataclass
class Job:
    """One export: from `model` into `folder`, which is empty; what `notices` gets is told to the user.

    `config` are entries for a session on the device, besides those that `target` states; `soc` names an Ascend chip.
    """

    model: Path
    folder: Path
    header: Header
    target: Target
    config: Mapping[str, str] = field(default_factory=dict)
    platform: str | None = None
    optimization: str = FIXED
    soc: str | None = None
    notices: list[str] = field(default_factory=list)

    def model_in(self, file: str, format: str, data: tuple[str, ...] = (), **details: object) -> Model:
        """A model that was written, with how a session on the device runs it."""
        target = self.target
        provider = CPU if target.provider in STAND_INS else target.provider
        return Model(file, format, provider, {**dict(target.config), **self.config}, dict(target.provider_options),
                     data, details)


Format = Callable[[Job], list[Model]]


def bundle(job: Job) -> list[Model]:
    """The model as it is, its ORT form where a platform is asked for, and programs in three languages."""
    models = [_copied(job)]
    if job.platform is not None:
        models.append(_converted(job))
    _programs(job.folder, "smoke.py", "smoke.cpp", "smoke.mjs")
    _package(job.folder, "onnxruntime-node")
    return models


def ort(job: Job) -> list[Model]:
    """The model in ORT format, and the operators that a build of onnxruntime needs for it."""
    _programs(job.folder, "smoke.py", "smoke.cpp", "smoke.mjs")
    _package(job.folder, "onnxruntime-node")
    return [_converted(job)]


def web(job: Job) -> list[Model]:
    """A page that runs the model by onnxruntime-web. Raises ModelError for a model that it can't run."""
    header = job.header
    size = stored_bytes(job.model)
    if size > WEB_BYTES:
        raise ModelError(f"{job.model} takes {sizes.text(size)}, and a page can't load more than "
                         f"{sizes.text(WEB_BYTES)}; compile it to fewer bits, e.g. with --scheme w4a16")
    opset = header.opsets.get("", 0)
    if opset > WEB_OPSET or header.ir_version > WEB_IR_VERSION:
        raise ModelError(f"{job.model} is of opset {opset} and IR version {header.ir_version}, and onnxruntime-web "
                         f"{NPM_VERSION} reads up to {WEB_OPSET} and {WEB_IR_VERSION}; export the model anew at an "
                         "older opset")
    foreign = sorted(f"{domain}.{op}" for domain, op in header.operators
                     if domain not in WEB_DOMAINS and domain not in header.functions)
    if foreign:
        raise ModelError(f"onnxruntime-web has no operators {', '.join(foreign)}; export the model without them")
    model = _copied(job)
    _programs(job.folder, "smoke.mjs", "index.html")
    _package(job.folder, "onnxruntime-web")
    return [model]


def for_ascend(job: Job) -> list[Model]:
    """The model in pairs of Q and DQ, and what ATC and AMCT take; see onnxq.exporting.ascend."""
    model = _copied(job)
    told = ascend.write(job.model, job.folder, job.soc)
    _programs(job.folder, "smoke.py")
    for name, why in told["float_layers"].items():
        job.notices.append(f"{name} computes in float: {why}")
    return [model, job.model_in(ascend.STANDARD, "onnx", told.pop("data"), **told)]


FORMATS: Mapping[str, Format] = {"bundle": bundle, "ort": ort, "web": web, "ascend": for_ascend}


def _copied(job: Job) -> Model:
    """The model with the files of its external data."""
    shutil.copyfile(job.model, job.folder / "model.onnx")
    for name in job.header.data_files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.parts[0] in _TAKEN:
            raise ModelError(f"{job.model} names its external data {name!r}, which can't lie beside an exported model; "
                             "save it with its data under another name in its own folder")
        (job.folder / path).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(job.model.parent / path, job.folder / path)
        except FileNotFoundError:
            raise ModelError(f"the external data file {name!r} is missing; put it beside the model again") from None
    return job.model_in("model.onnx", "onnx", job.header.data_files)


def _converted(job: Job) -> Model:
    """The model in ORT format, with the configurations of its operators."""
    packed = packed_weights(job.model)
    stored = stored_bytes(job.model)
    dense = stored + sum(w.dense_bytes - w.packed_bytes for w in packed)
    if dense > ORT_BYTES:
        raise ModelError(f"{job.model} takes {sizes.text(dense)}, and a file in ORT format can't take more than "
                         f"{sizes.text(ORT_BYTES)}; export it with --format bundle, without --platform")
    at_run_time = job.optimization == RUNTIME
    path = job.folder / "model.ort"
    ort_format.convert(job.model, path, platform=job.platform, at_run_time=at_run_time)
    ort_format.write_operators_of(job.model, path, job.folder, platform=job.platform, at_run_time=at_run_time)
    if packed:
        job.notices.append(f"ORT format stores weights dense: {sizes.text(stored)} with "
                           f"{len(packed)} packed of them become {sizes.text(path.stat().st_size)}")
    found = job.model_in(path.name, "ort", platform=job.platform or "any", optimization=job.optimization)
    return replace(found, config={**found.config, **dict([ort_format.REPLAY])}) if at_run_time else found


def _programs(folder: Path, *names: str) -> None:
    for name in names:
        text = resources.files("onnxq.exporting").joinpath("smoke", name).read_text(encoding="utf-8")
        (folder / name).write_text(text, encoding="utf-8")


def _package(folder: Path, name: str) -> None:
    """What npm install reads."""
    data = {"private": True, "type": "module", "dependencies": {name: NPM_VERSION}}
    (folder / "package.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
