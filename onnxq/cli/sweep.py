"""onnxq sweep."""

from __future__ import annotations

import sys
from typing import Any

import click

from onnxq.cli.options import (
    DATA,
    POSITIVE,
    debug_option,
    metric_option,
    quiet_option,
    sizes,
    target_option,
    threads_option,
)
from onnxq.cli.output import STDOUT, check_files, show_figures, with_progress
from onnxq.report import sweep_plot, terminal


def _varied(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, list[str]]:
    """NAME=V,V texts as a mapping."""
    found: dict[str, list[str]] = {}
    for value in values:
        name, given = value.partition("=")[::2]
        parts = [part.strip() for part in given.split(",")]
        if not name or not all(parts):
            raise click.BadParameter(f"{value!r} is no name and values; write for example --vary group_size=32,128")
        if name in found:
            raise click.BadParameter(f"{name!r} is given twice; separate its values by commas")
        found[name] = parts
    return found


@click.command("sweep", short_help="Tell what other blocks and bits of a scheme take and cost.")
@click.argument("model", metavar="MODEL")
@click.option("--scheme", metavar="NAME", default="w4a16", show_default=True, help="A weight-only scheme.")
@click.option("--vary", metavar="NAME=V[,V]", multiple=True, callback=_varied,
              help="What to vary, of group_size, bits, symmetric and search; may be repeated: every combination.  "
                   "[default: group_size=16,32,64,128,256]")
@click.option("--calib", metavar="DATA", help=f"Calibration data: {DATA}.")
@click.option("--samples", type=POSITIVE, metavar="N", help="Rows of calibration data that are used at most.")
@click.option("--batch", type=POSITIVE, metavar="N", help="Rows that are run at once.")
@click.option("--eval", metavar="DATA", help="Evaluation data, with an array `labels` for metrics that need them.")
@metric_option
@click.option("--shape", "shapes", metavar="AXIS=N[,N]", multiple=True, callback=sizes,
              help="The size of a free axis to time with, or several, each by itself; may be repeated.  [default: that "
                   "of the data]")
@click.option("--json", "json_file", metavar="[FILE]", is_flag=False, flag_value=STDOUT,
              help="Write everything as JSON into FILE; without one, print that and nothing else.")
@click.option("--plot", "plot_file", metavar="FILE", help="Draw the figures into FILE.html or FILE.svg.")
@target_option
@threads_option
@quiet_option
@debug_option
def sweep_model(model: str, vary: dict[str, list[str]], json_file: str | None, plot_file: str | None,
                threads: int | None, quiet: bool, **options: Any) -> None:
    """Compile MODEL once for each combination of what varies, and tell of each the size of the file, the error of its
    weights, the SQNR of its output, the metric, and its speed beside the float model in the same process.

    Kernels are those of the target's table; nothing is kept of the compiled models.

    \b
    Examples:
      onnxq sweep model.onnx --calib calib.npz --eval eval.npz --metric perplexity
      onnxq sweep model.onnx --vary group_size=32,64,128 --vary bits=4,8 --plot sweep.html
      onnxq sweep model.onnx --vary search=absmax,mse --shape sequence=1,128 --json sweep.json
    """
    from onnxq.sweep import read, sweep

    check_files(json_file, plot_file)
    seen = not quiet and json_file != STDOUT and sys.stderr.isatty()
    found = with_progress(sweep, quiet, model, vary=read(vary) or None, threads=threads or 0,
                          heard=(lambda row: print(terminal.combination(row))) if seen else None, **options)
    show_figures(found, lambda: terminal.sweep(found), sweep_plot.save, json_file, plot_file, quiet)
