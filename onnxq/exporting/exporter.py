"""export(): a compiled model into a folder for its device, run once there before it is said to be done."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from onnxq import verifier
from onnxq.errors import DataError, ModelError, OutputError, UsageError
from onnxq.exporting import manifest as manifests
from onnxq.exporting import sample as samples
from onnxq.exporting.checking import run_models
from onnxq.exporting.formats import FIXED, FORMATS, OPTIMIZATIONS, Job
from onnxq.exporting.manifest import Manifest
from onnxq.graph import Header, read_header, stored_bytes
from onnxq.progress import Progress, Silent
from onnxq.recipe import Preprocessing, parse
from onnxq.report.report import plain
from onnxq.runtime.machine import STAND_INS, WASM, checking, session_options, target_here
from onnxq.runtime.measure import environment
from onnxq.runtime.ort_format import PLATFORMS
from onnxq.runtime.session import CPU, Session, SessionOptions
from onnxq.targets import Target
from onnxq.version import VERSION

_KEPT = ("scheme", "size", "latency", "accuracy", "environment")  # what a manifest has of a report


def export(model: str | Path, output: str | Path | None = None, *, format: str = "bundle", sample: Any = None,
           report: str | Path | None = None, float_model: str | Path | None = None, eval: Any = None,
           metric: str | None = None, platform: str | None = None, optimization: str = FIXED,
           target: str | None = None, soc: str | None = None, threads: int = 0,
           config: Mapping[str, str] | None = None, force: bool = False,
           progress: Progress | None = None) -> dict[str, Any]:
    """Write `model` into the folder `output` (MODEL-FORMAT beside it by default) in one of FORMATS, and run it there.

    The models run on `target` (that of the format, else cpu), with `threads` and the session entries of `config`. The
    expected output is that of the model there, or on the CPU where this machine is not the target, on the first row of
    `sample` (DATA; of made input where it is None). Accuracy and speed come from the `report` of its compilation
    (report.json or its folder), or are measured against `float_model` on `eval` by `metric`. `platform` arm or amd64
    and `optimization` fixed or runtime are those of ORT format, `soc` the chip of format ascend. Returns what was
    written and how far each exported model is from the expected output; `failures` is empty where all are within what
    is allowed. Raises UsageError for a wrong call, and the other OnnxqErrors for what can't be exported.
    """
    source, folder = Path(model), _named(model, output, format)
    _check(format, platform, optimization, report, float_model, eval)
    _check_chip(format, soc, target)
    bar = progress or Silent()
    bar.stage("load")
    header = read_header(source)
    here = _target(target, format)
    _check_folder(folder, force)
    measured = _measured(source, report, float_model, eval, metric, threads, here.name, bar)
    try:
        with tempfile.TemporaryDirectory(prefix=".onnxq-", dir=folder.parent) as temporary:
            job = Job(source, Path(temporary) / folder.name, header, here, dict(config or {}), platform, optimization,
                      soc)
            job.folder.mkdir()
            bar.stage("convert")
            options = _options(job, threads)
            manifest = _written(job, format, options, sample, measured, Path(temporary), bar)
            bar.stage("run")
            rows, failures = run_models(job.folder, manifest, options.provider)
            _replace(job.folder, folder)
    except OSError as e:
        raise OutputError(f"{folder} can't be written ({e.strerror}); choose another -o or free some space") from None
    if measured is None:
        job.notices.append("the manifest tells nothing of accuracy and speed; give --report of the compilation, or "
                           "--float MODEL with --eval to measure them")
    if sample is None:
        job.notices.append("the sample is made at random; give --sample DATA for one of your own")
    sizes = {m.file: sum((folder / n).stat().st_size for n in (m.file, *m.data)) for m in manifest.models}
    found: dict[str, Any] = plain({
        "model": str(source), "output": str(folder), "format": format, "sample": manifest.sample_source,
        "models": rows, "failures": failures, "notices": job.notices, "ok": not failures,
        "size": {"model": stored_bytes(source), **sizes}})
    return found


def _target(name: str | None, format: str) -> Target:
    """The target of an export: by name, or the one that the format is for. Raises UsageError."""
    found = target_here(name or (format if format in ("ascend", "web") else "cpu"))
    if format in ("ort", "web") and found.provider not in (CPU, WASM):
        raise UsageError(f"--format {format} is for onnxruntime's CPU kernels, and {found.name} runs on "
                         f"{found.provider}; leave --target out")
    return found


def _options(job: Job, threads: int) -> SessionOptions:
    """How the models run here: as on the device, or by the CPU's kernels where this machine lacks its provider."""
    found = session_options(job.target, threads)
    if checking(job.target, threads).by_twin:
        job.notices.append(f"int8 may saturate on this processor, and does not on {job.target.name}: what is expected "
                           "is what this one gives; where onnxq verify fails on the device, export the model there")
    if job.target.provider not in (CPU, *STAND_INS, found.provider):
        job.notices.append(f"{job.target.provider} is not here: what is expected is what the CPU makes of the same "
                           "operators; run onnxq verify on the device")
    return replace(found, config=(*found.config, *job.config.items()))


def _written(job: Job, format: str, options: SessionOptions, sample: Any, measured: Mapping[str, Any] | None,
             temporary: Path, bar: Progress) -> Manifest:
    """The files of the folder, manifest.json the last one."""
    models = FORMATS[format](job)
    bar.stage("sample")
    session = Session(job.model, options)
    inputs, outputs = (tuple(map(manifests.described, ports)) for ports in (session.inputs, session.outputs))
    feed, told = samples.take(sample, session.inputs, _preprocessing(job.header))
    try:
        expected = session.run(feed)
    except ModelError as e:
        if sample is not None:
            raise
        raise DataError(f"the model does not run on made input ({e}); give --sample DATA") from None
    del session
    allowed = samples.tolerances(_beside(job, temporary), feed, expected, options, job.target.floats)
    recipe = job.header.metadata.get("onnxq.recipe")
    found = Manifest(
        job.model.stem, format, job.target.name, tuple(models), options.threads, inputs, outputs, told,
        samples.store(job.folder, feed, "input"), samples.store(job.folder, expected, "output", allowed),
        asdict(_preprocessing(job.header)) if recipe is not None else None,
        json.loads(recipe) if recipe is not None else None,
        job.header.metadata.get("onnxq.plan"), measured,
        {"onnxq": VERSION, "onnxruntime": str(environment()["onnxruntime"])})
    found.write(job.folder)
    return manifests.read(job.folder)


def _beside(job: Job, temporary: Path) -> Path:
    """A name for the model, with its external data, in a folder where variants of it can be written."""
    for name in (job.model.name, *job.header.data_files):
        path = temporary / "variants" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _link(job.model.parent / name, path)
    return temporary / "variants" / job.model.name


def _link(source: Path, path: Path) -> None:
    """A second name for a file, or a copy where the file system has none; the runtime refuses symbolic links."""
    try:
        os.link(source.resolve(), path)
    except OSError:
        shutil.copyfile(source, path)


def _preprocessing(header: Header) -> Preprocessing:
    """How the compilation's recipe read images or text, so that the sample is read likewise."""
    text = header.metadata.get("onnxq.recipe")
    return parse(text).data if text is not None else Preprocessing()


# ------------------------------------------------------------------ what was measured


def _measured(model: Path, report: str | Path | None, float_model: str | Path | None, eval: Any, metric: str | None,
              threads: int, target: str, bar: Progress) -> dict[str, Any] | None:
    """What a manifest says of accuracy and speed; None where nothing is known."""
    if report is not None:
        data, source = _report(Path(report), model), "report of the compilation"
    elif float_model is not None:
        found = verifier.verify(float_model, model, data=eval, metric=metric, threads=threads, target=target,
                                progress=bar)
        data, source = found.to_dict(), "verified as it was exported"
    else:
        return None
    return {"source": source, **{key: data.get(key) for key in _KEPT}}


def _report(path: Path, model: Path) -> dict[str, Any]:
    path = path / "report.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        told = data["size"]["compiled_bytes"]
    except OSError as e:
        raise DataError(f"{path} can't be read ({e.strerror}); name the report.json of --report DIR") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is no report of a compilation; name the report.json of --report DIR") from None
    if told != stored_bytes(model):
        raise DataError(f"{path} tells of a model of {told} bytes, and {model} has {stored_bytes(model)}; give the "
                        "report of this model, or --float MODEL to measure it")
    return dict(data)


# ------------------------------------------------------------------ the call and its folder


def _named(model: str | Path, output: str | Path | None, format: str) -> Path:
    return Path(output) if output is not None else Path(model).with_name(f"{Path(model).stem}-{format}")


def _check(format: str, platform: str | None, optimization: str, report: Any, float_model: Any, eval: Any) -> None:
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}; use {', '.join(FORMATS)}")
    if platform is not None and platform not in PLATFORMS:
        raise UsageError(f"there is no platform {platform!r}; use {' or '.join(PLATFORMS)}")
    if optimization not in OPTIMIZATIONS:
        raise UsageError(f"there is no optimization {optimization!r}; use {' or '.join(OPTIMIZATIONS)}")
    if format == "web" and platform is not None:
        raise UsageError("--platform is that of ORT format, and a page runs the same everywhere; leave it out")
    if optimization != FIXED and format != "ort" and platform is None:
        raise UsageError("--optimization is that of ORT format; give --format ort, or --platform with a bundle")
    if report is not None and float_model is not None:
        raise UsageError("--report and --float exclude each other; both say what was measured")
    if eval is not None and float_model is None:
        raise UsageError("--eval compares with the float model; give --float MODEL")


def _check_chip(format: str, soc: str | None, target: str | None) -> None:
    if soc is not None and format != "ascend":
        raise UsageError("--soc names an Ascend chip; give --format ascend")
    if format == "ascend" and target not in (None, "ascend"):
        raise UsageError(f"--format ascend is for target ascend, not for {target}; leave --target out")


def _check_folder(folder: Path, force: bool) -> None:
    """Refuse a folder that can't be written, and to replace anything but an earlier export."""
    if os.path.lexists(folder):
        if folder.is_dir() and not any(folder.iterdir()):
            return
        if not (folder / manifests.NAME).is_file():
            raise OutputError(f"{folder} exists and holds no export; choose another -o")
        if not force:
            raise OutputError(f"{folder} exists; give --force to replace it, or another -o")
    if not folder.absolute().parent.is_dir():
        raise OutputError(f"the folder of the result, {folder.parent}, does not exist; make it, or choose another -o")
    if not os.access(folder.absolute().parent, os.W_OK):
        raise OutputError(f"the folder {folder.parent} can't be written; choose another -o")


def _replace(made: Path, folder: Path) -> None:
    """Put a finished folder in the place of an earlier one."""
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(made, folder)
