"""onnxq pack and unpack."""

from __future__ import annotations

from typing import Any

import click

from onnxq.cli.options import debug_option, force_option, json_option, load_memory_option, quiet_option
from onnxq.cli.output import FATE, print_json, print_text, say, with_progress
from onnxq.report import terminal


@click.command("pack", short_help="Store the weights of a model in fewer bytes.")
@click.argument("model", metavar="MODEL")
@click.option("-o", "--output", metavar="OUT", help="The file to write.  [default: MODEL.packed.onnx beside the model]")
@force_option
@click.option("--as", "form", type=click.Choice(["functions", "sparse-initializer"]), default="functions",
              show_default=True,
              help="functions: in the fewest bytes, decoded by standard operators; sparse-initializer: ONNX's own "
                   "form, which takes 9 bytes for each int8 that is not 0, so it pays from 89 % zeros on.")
@load_memory_option
@json_option
@quiet_option
@debug_option
def pack_model(model: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Store the constants of MODEL, whoever made it, in fewer bytes: those with zeros, those whose codes need less than
    8 bits or do so with exceptions, and those of few different values.

    The result is plain ONNX: small functions of standard operators, which onnxruntime computes once, as it loads the
    model. What runs then are the same kernels on the same weights, bit for bit, so zeros save bytes and no time;
    loading takes longer and more memory. Both are checked before the command ends.

    \b
    Examples:
      onnxq pack model.w8a8.onnx
      onnxq pack model.w8a8.onnx -o packed.onnx --load-memory 500MB
      onnxq pack model.w8a8.onnx --as sparse-initializer
      onnxq unpack packed.onnx -o model.onnx
    """
    from onnxq.packing import pack

    _done(with_progress(pack, quiet, model, **options), as_json, quiet)


@click.command("unpack", short_help="Make the packed weights of a model dense again.")
@click.argument("model", metavar="MODEL")
@click.option("-o", "--output", metavar="OUT", help="The file to write.  [default: MODEL.dense.onnx beside the model]")
@force_option
@json_option
@quiet_option
@debug_option
def unpack_model(model: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Make the weights of MODEL that onnxq packed dense again, bit for bit.

    \b
    Examples:
      onnxq unpack packed.onnx
      onnxq unpack packed.onnx -o model.onnx
    """
    from onnxq.packing import unpack

    _done(with_progress(unpack, quiet, model, **options), as_json, quiet)


def _done(found: dict[str, Any], as_json: bool, quiet: bool) -> None:
    click.get_current_context().meta[FATE] = f"; {found['output']} was written"
    if as_json:
        print_json(found)
    elif not quiet:
        print_text(terminal.packed(found))
    for notice in found.get("notices", ()) if not quiet else ():
        say(f"Note: {notice}", "yellow")
    if not as_json and not quiet:
        print_text(terminal.line(f"wrote {found['output']}", "green"))
