"""onnxq export."""

from __future__ import annotations

from typing import Any

import click

from onnxq.cli.options import (
    DATA,
    debug_option,
    force_option,
    json_option,
    metric_option,
    quiet_option,
    threads_option,
)
from onnxq.cli.output import FATE, show_export, with_progress
from onnxq.targets import TARGETS

# written out, so that --help need not import what exports
FORMATS = ("bundle", "ort", "web", "ascend")
PLATFORMS = ("arm", "amd64")
OPTIMIZATIONS = ("fixed", "runtime")


def _entries(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE texts as a mapping."""
    found: dict[str, str] = {}
    for value in values:
        key, equals, given = value.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{value!r} is no entry and value; write for example --session "
                                     "session.set_denormal_as_zero=1")
        found[key] = given
    return found


@click.command("export", short_help="Write a model and all that its device needs into a folder.")
@click.argument("model", metavar="MODEL")
@click.option("-o", "--output", metavar="DIR", help="The folder to write.  [default: MODEL-FORMAT beside the model]")
@force_option
@click.option("--format", type=click.Choice(FORMATS), default="bundle", show_default=True,
              help="bundle: the model with a manifest and smoke tests in Python, C++ and JavaScript; ort: the same in "
                   "onnxruntime's own format, with the operators that a minimal build needs; web: a page for "
                   "onnxruntime-web; ascend: what ATC and AMCT take of a model for target ascend, with ATC's command "
                   "line.")
@click.option("--soc", metavar="CHIP", help="With ascend: the chip, as npu-smi info tells it, such as Ascend310P3.")
@click.option("--sample", metavar="DATA", help=f"What the sample's first row is of: {DATA}.  [default: made at random]")
@click.option("--report", metavar="REPORT", help="The report.json of the compilation, or its folder: its accuracy and "
                                                 "speed go into the manifest.")
@click.option("--float", "float_model", metavar="MODEL", help="Or measure them now, against this float model.")
@click.option("--eval", metavar="DATA", help="With --float: evaluation data.")
@metric_option
@click.option("--platform", type=click.Choice(PLATFORMS),
              help="Optimize ORT format for one kind of processor; a bundle then holds it, too.  [default: any]")
@click.option("--optimization", type=click.Choice(OPTIMIZATIONS), default="fixed", show_default=True,
              help="Of ORT format: fixed makes all optimizations now; runtime saves some, for providers that take a "
                   "part of the graph first, such as NNAPI and CoreML.")
@click.option("--target", type=click.Choice(list(TARGETS)),
              help="Where the model will run; onnxq targets tells of each.  [default: that of the format, else cpu]")
@threads_option
@click.option("--session", "config", metavar="KEY=VALUE", multiple=True, callback=_entries,
              help="A session configuration entry of onnxruntime for the device; may be repeated.")
@json_option
@quiet_option
@debug_option
def export_model(model: str, threads: int | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write MODEL into a folder with manifest.json: checksums, inputs and outputs, preprocessing, session options, and
    a sample with the output that is expected of it. The folder can be moved; onnxq verify DIR runs it.

    \b
    Examples:
      onnxq export model.w8a8.onnx --sample eval.npz --report report/
      onnxq export model.w8a8.onnx --sample eval.npz --float model.onnx --eval eval.npz --metric top1
      onnxq export model.w8a8.onnx --format ort --platform arm --sample eval.npz
      onnxq export model.w8a8.onnx --format web --sample eval.npz -o page
      onnxq export model.w8a8.onnx --format ascend --soc Ascend310P3 --sample eval.npz
    """
    from onnxq.exporting import export

    found = with_progress(export, quiet, model, threads=threads or 0, **options)
    click.get_current_context().meta[FATE] = f"; {found['output']} was written"
    show_export(found, as_json, quiet, f"wrote {found['output']}")
