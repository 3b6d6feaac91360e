"""onnxq check."""

from __future__ import annotations

from typing import Any

import click

from onnxq.cli.options import DATA, debug_option, json_option, runtime_option, target_option, threads_option
from onnxq.cli.output import print_json, print_text, say


@click.command("check", short_help="Tell where each node of a model will run on a target.")
@click.argument("model", metavar="MODEL")
@target_option
@runtime_option
@click.option("--data", metavar="DATA", help=f"What to run on where the target is this machine: {DATA}.  "
                                             "[default: random]")
@threads_option
@json_option
@debug_option
def check_model(model: str, threads: int | None, as_json: bool, **options: Any) -> None:
    """Tell which provider and kernel will run each node of MODEL, compiled or not, how often the graph changes between
    providers, and what to change. On a machine that is the target, what ran is set beside it.

    \b
    Examples:
      onnxq check model.w8a8.onnx
      onnxq check model.onnx --target cuda
      onnxq check model.onnx --target cann --json
    """
    from onnxq.placement import check
    from onnxq.report import placement

    found = check(model, threads=threads or 0, **options)
    if as_json:
        print_json(found)
        return
    print_text(placement.summary(found))
    for notice in found["notices"]:
        say(f"Note: {notice}", "yellow")
