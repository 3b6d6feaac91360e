"""verify_bundle(): does an exported folder still give what it gave?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxq.exporting.manifest import Described, Manifest, Model, check_files, described, read
from onnxq.exporting.sample import difference, fetch
from onnxq.progress import Progress, Silent
from onnxq.report.report import plain
from onnxq.runtime.measure import environment
from onnxq.runtime.session import Session, SessionOptions
from onnxq.version import VERSION


def verify_bundle(folder: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Check an exported folder: its checksums, and of each model in it inputs, outputs, and the sample's result.

    Each model runs on the manifest's provider with its session options. The result has a row for each output of each
    model, and `failures`, empty where all is well. Raises ModelError for files that are missing or were altered, and
    RuntimeUnavailable where this machine lacks the provider.
    """
    path, bar = Path(folder), progress or Silent()
    bar.stage("checksums")
    manifest = read(path)
    check_files(path, manifest)
    bar.stage("run")
    rows, failures = run_models(path, manifest)
    notices = [] if manifest.models else [f"{manifest.kind} has no model that onnxruntime runs: checksums alone were "
                                          "compared"]
    found: dict[str, Any] = plain({
        "bundle": str(path), "name": manifest.name, "format": manifest.kind, "sample": manifest.sample_source,
        "models": rows, "failures": failures, "notices": notices, "ok": not failures,
        "measured": manifest.measured, "made_with": dict(manifest.made_with),
        "environment": {"onnxq": VERSION, **environment()}})
    return found


def run_models(folder: Path, manifest: Manifest, provider: str | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """(a row for each output of each model, what is wrong); the sample is run on one model after the other.

    `provider` takes the place of the manifest's, with no options, where it is another one.
    """
    feed = {t.name: fetch(folder, t) for t in manifest.sample_inputs}
    rows, failures = [], []
    for model in manifest.models:
        by = provider or model.provider
        session = Session(folder / model.file, SessionOptions(
            by, manifest.threads, config=tuple(model.config.items()),
            provider_options=tuple(model.provider_options.items()) if by == model.provider else ()))
        for kind, wanted, ports in (("inputs", manifest.inputs, session.inputs),
                                    ("outputs", manifest.outputs, session.outputs)):
            found = tuple(map(described, ports))
            if found != wanted:
                failures.append(f"{model.file} has the {kind} {_listed(found)}, and its manifest says "
                                f"{_listed(wanted)}")
        if failures:
            continue
        outputs = session.run(feed)
        for tensor in manifest.sample_outputs:
            error = difference(outputs[tensor.name], fetch(folder, tensor))
            ok = error <= tensor.tolerance
            rows.append({**_row(model), "output": tensor.name, "error": error, "tolerance": tensor.tolerance,
                         "ok": ok})
            if not ok:
                failures.append(f"{model.file} gives {tensor.name} with an error of {error:.3g} on the sample, above "
                                f"the {tensor.tolerance:g} allowed")
    return rows, failures


def _row(model: Model) -> dict[str, Any]:
    return {"file": model.file, "format": model.format, "provider": model.provider}


def _listed(ports: tuple[Described, ...]) -> str:
    return ", ".join(f"{p.name} {p.dtype} [{', '.join('?' if d is None else str(d) for d in p.shape)}]" for p in ports)
