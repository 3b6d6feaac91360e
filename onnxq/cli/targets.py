"""onnxq targets."""

from __future__ import annotations

import click

from onnxq.cli.options import debug_option, json_option
from onnxq.cli.output import print_json, print_text
from onnxq.targets import TARGETS


@click.command("targets", short_help="List what models can be compiled for.")
@click.argument("name", required=False, metavar="[NAME]", type=click.Choice(list(TARGETS)))
@json_option
@debug_option
def list_targets(name: str | None, as_json: bool) -> None:
    """List the targets and whether their models run on this machine, or print all that is known of NAME.

    \b
    Examples:
      onnxq targets
      onnxq targets tensorrt
      onnxq targets --json
    """
    from onnxq.aiming import facts
    from onnxq.report import targets
    from onnxq.runtime.machine import is_here, target_here

    if name is not None:
        found = facts(target_here(name))
        print_json(found) if as_json else print_text(targets.one(found))
        return
    rows = [(facts(target_here(known)), is_here(target_here(known))) for known in TARGETS]
    if as_json:
        print_json([{**found, "here": here} for found, here in rows])
    else:
        print_text(targets.every(rows))
