"""onnxq analyze."""

from __future__ import annotations

from typing import Any

import click

from onnxq.cli.options import DATA, POSITIVE, debug_option, quiet_option, ranges_option, target_option, threads_option
from onnxq.cli.output import STDOUT, check_files, show_figures, with_progress
from onnxq.report import analysis, plot, terminal


@click.command("analyze", short_help="Tell which layers int8 hurts most, and why.")
@click.argument("model", metavar="MODEL")
@click.option("--calib", metavar="DATA", required=True, help=f"Calibration data: {DATA}.")
@click.option("--scheme", metavar="NAME", help="The scheme to analyze.  [default: w8a8]")
@click.option("--recipe", metavar="FILE", help="A recipe in YAML instead of a scheme.")
@ranges_option
@click.option("--samples", type=POSITIVE, metavar="N", help="Rows that are used at most.  [default: 128]")
@click.option("--batch", type=POSITIVE, metavar="N", help="Rows that are run at once.")
@click.option("--sort", type=click.Choice(list(analysis.SORTS)), default="sqnr", show_default=True,
              help="What the worst layers are the first by.")
@click.option("--top", type=POSITIVE, metavar="N", default=20, show_default=True, help="Layers that are shown.")
@click.option("--json", "json_file", metavar="[FILE]", is_flag=False, flag_value=STDOUT,
              help="Write all layers, in execution order, as JSON into FILE; without one, print that and nothing else.")
@click.option("--plot", "plot_file", metavar="FILE", help="Draw the layers into FILE.html or FILE.svg.")
@target_option
@threads_option
@quiet_option
@debug_option
def analyze_model(model: str, scheme: str | None, recipe: str | None, sort: str, top: int, json_file: str | None,
                  plot_file: str | None, threads: int | None, quiet: bool, **options: Any) -> None:
    """Tell what int8 costs each layer of MODEL that a scheme quantizes, the worst first: the SQNR of its result with it
    alone quantized and with the whole model quantized (accumulated); of what it reads range_parm (the greatest
    magnitude / the standard deviation), kurtosis, the share of values clipped, and the range and scale of its codes.

    onnxq compile --fallback N leaves the N worst by range_parm float, --keep-float those that are named.

    \b
    Examples:
      onnxq analyze model.onnx --calib calib.npz
      onnxq analyze model.onnx --calib calib.npz --sort range_parm --top 5
      onnxq analyze model.onnx --calib calib.npz --scheme w8a8-dynamic --plot layers.html
      onnxq analyze model.onnx --calib calib.npz --ranges percentile --json layers.json
    """
    from onnxq.analysis import analyze

    if scheme is not None and recipe is not None:
        raise click.UsageError("--scheme and --recipe exclude each other; name the scheme in the recipe.")
    check_files(json_file, plot_file)
    found = with_progress(analyze, quiet, model, scheme=scheme or "auto", recipe=recipe, threads=threads or 0,
                          **options)
    show_figures(found, lambda: terminal.layers(found, sort, top), plot.save, json_file, plot_file, quiet)
