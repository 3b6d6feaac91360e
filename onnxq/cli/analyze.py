"""onnxq analyze."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from onnxq.cli.options import DATA, POSITIVE, debug_option, quiet_option, ranges_option, threads_option
from onnxq.cli.output import check_file, print_json, print_text, say, with_progress
from onnxq.errors import OutputError
from onnxq.report import analysis, plot, terminal
from onnxq.targets import TARGETS

_STDOUT = "-"


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
@click.option("--json", "json_file", metavar="[FILE]", is_flag=False, flag_value=_STDOUT,
              help="Write all layers, in execution order, as JSON into FILE; without one, print that and nothing else.")
@click.option("--plot", "plot_file", metavar="FILE", help="Draw the layers into FILE.html or FILE.svg.")
@click.option("--target", type=click.Choice(sorted(TARGETS)), default="cpu", show_default=True,
              help="Where the model would run.")
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
    if plot_file is not None:
        plot.check(Path(plot_file))
    for name, file in (("--plot", plot_file), ("--json", json_file)):
        if file not in (None, _STDOUT):
            check_file(name, Path(str(file)))
    found = with_progress(analyze, quiet, model, scheme=scheme or "auto", recipe=recipe, threads=threads or 0,
                          **options)
    if json_file == _STDOUT:
        print_json(found)
    elif not quiet:
        print_text(terminal.layers(found, sort, top))
    for notice in found["notices"] if not quiet else ():
        say(f"Note: {notice}", "yellow")
    written = _write(found, json_file, plot_file)
    if written and json_file != _STDOUT and not quiet:
        print_text(terminal.line(f"wrote {' and '.join(written)}", "green"))


def _write(found: dict[str, Any], json_file: str | None, plot_file: str | None) -> list[str]:
    written = []
    if json_file not in (None, _STDOUT):
        try:
            Path(str(json_file)).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        except OSError as e:
            raise OutputError(f"{json_file} can't be written ({e.strerror}); name another file for --json") from None
        written.append(str(json_file))
    if plot_file is not None:
        plot.save(found, plot_file)
        written.append(plot_file)
    return written
