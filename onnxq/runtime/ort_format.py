"""onnxruntime's own file format: a graph that is optimized already, for runtimes that were built without ONNX."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnxruntime

from onnxq.errors import ModelError
from onnxq.runtime.session import CPU, SessionOptions, first_line, ort_options

ARM, AMD64 = "arm", "amd64"
PLATFORMS = (ARM, AMD64)
REPLAY = ("session.enable_saved_runtime_optimizations", "1")  # what a session needs for those that were saved

# blocks of channels, whose size is that of the machine which converts
_NOT_PORTABLE = ("NchwcTransformer",)
_MINIMAL_BUILD = "optimization.minimal_build_optimizations"


def convert(model: Path, destination: Path, *, platform: str | None = None, at_run_time: bool = False) -> None:
    """Write `model` in ORT format, optimized for the CPU provider.

    `platform` amd64 allows layouts that no other processor has kernels for, arm keeps int8 activations as they are,
    None does neither, so that the result runs on both. With `at_run_time` basic optimizations are made and others
    saved, for providers that take over a part of the graph first; sessions replay those with REPLAY. Raises ModelError.
    """
    extra = ((_MINIMAL_BUILD, "save"),) if at_run_time else ()
    _convert(model, destination, platform, extra)


def write_operators(models: Sequence[Path], destination: Path, *, types: bool) -> None:
    """Write which operators, and with `types` which types of each, a build of onnxruntime needs for ORT files.

    That is a configuration for its build script's --include_ops_by_config.
    """
    with _silent():
        from onnxruntime.tools.ort_format_model import create_config_from_models

        create_config_from_models(list(models), destination, types)
    lines = [line for line in destination.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    named = [f"# operators of {', '.join(sorted({model.name for model in models}))}"]  # without this machine's folders
    destination.write_text("\n".join([*named, *lines]) + "\n", encoding="utf-8")


def write_operators_of(model: Path, converted: Path, folder: Path, *, platform: str | None = None,
                       at_run_time: bool = False) -> tuple[Path, Path]:
    """Write both configurations of what `convert` made of `model` beside it, as onnxruntime names them.

    Optimizations that are saved need not be applied, so that operators before and behind them are named. Raises
    ModelError.
    """
    operators = folder / f"{converted.stem}.required_operators.config"
    with_types = folder / f"{converted.stem}.required_operators_and_types.config"
    with tempfile.TemporaryDirectory(prefix="onnxq-") as other:
        models = [converted]
        if at_run_time:
            models.append(Path(other) / converted.name)
            _convert(model, models[-1], platform, ((_MINIMAL_BUILD, "apply"),))
        write_operators(models, operators, types=False)
        write_operators(models, with_types, types=True)
    return operators, with_types


def _convert(model: Path, destination: Path, platform: str | None, extra: tuple[tuple[str, str], ...]) -> None:
    options = ort_options(SessionOptions(config=(
        ("session.save_model_format", "ORT"), ("session.qdqisint8allowed", "1" if platform == ARM else "0"), *extra)))
    options.optimized_model_filepath = str(destination)
    disabled = [] if platform == AMD64 else list(_NOT_PORTABLE)
    try:
        onnxruntime.InferenceSession(str(model), options, providers=[CPU], disabled_optimizers=disabled,
                                     enable_fallback=0)
    except Exception as error:
        raise ModelError(f"onnxruntime can't write {model} in ORT format: {first_line(error)}; export it with "
                         "--format bundle instead") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Bear with onnxruntime's tools: they set up logging as they are imported, tell of files, and leave some open."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    before = list(root.handlers)
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = before
