"""onnxq schemes."""

from __future__ import annotations

import click
import yaml

from onnxq import presets
from onnxq.cli.options import debug_option, json_option
from onnxq.cli.output import print_json, print_text
from onnxq.report import terminal


@click.command("schemes", short_help="List the named schemes.")
@click.argument("name", required=False, metavar="[NAME]")
@json_option
@debug_option
def list_schemes(name: str | None, as_json: bool) -> None:
    """List the named schemes and presets, or print the YAML of NAME: of a preset a whole recipe.

    \b
    Examples:
      onnxq schemes
      onnxq schemes w8a8
      onnxq schemes q4_k_m-like > recipe.yaml
    """
    if name is not None:
        text = presets.text(name)
        print_json(yaml.safe_load(text)) if as_json else print_text(text)
        return
    rows = [(known, presets.named(known).scheme.summary) for known in presets.names()]
    if as_json:
        print_json([{"name": known, "summary": text} for known, text in rows])
    else:
        print_text(terminal.schemes(rows))
