"""Options that several commands have, and what they turn texts into."""

from __future__ import annotations

import click

from onnxq.schemes import BLOCK_SIZES
from onnxq.targets import TARGETS

DEBUG = "onnxq.debug"  # key of click's context: is --debug on
DATA = ("an .npz, a folder of .npz, .npy or image files, a .txt or .jsonl text, an .npy of token ids, MODULE:FUNCTION "
        "giving dicts, or the word random")
POSITIVE = click.IntRange(min=1)


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[DEBUG] = value


def sizes(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """AXIS=N and AXIS=N,N texts as a mapping."""
    found: dict[str, tuple[int, ...]] = {}
    for value in values:
        axis, given = value.rpartition("=")[::2]
        parts = given.split(",")
        if not axis or not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
            raise click.BadParameter(f"{value!r} is not an axis and sizes above 0; write for example --shape batch=8")
        if axis in found:
            raise click.BadParameter(f"{axis!r} is given twice; separate its sizes by commas")
        found[axis] = tuple(int(p) for p in parts)
    return found


def axes(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    """AXIS=N texts as a mapping."""
    found = sizes(context, parameter, values)
    for axis, given in found.items():
        if len(given) > 1:
            raise click.BadParameter(f"{axis!r} has several sizes; give each axis one size")
    return {axis: given[0] for axis, given in found.items()}


json_option = click.option("--json", "as_json", is_flag=True,
                           help="Print one JSON document, and nothing else, on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True,
                            help="No progress, no summary; errors and failed checks only.")
debug_option = click.option("--debug", is_flag=True, is_eager=True, expose_value=False, callback=_remember_debug,
                            help="Show the traceback of an error.")
ranges_option = click.option(
    "--ranges", type=click.Choice(["auto", "minmax", "moving-average", "percentile", "entropy", "mse"]),
    help="How the ranges of activations are found; auto chooses by the error that they cause.  [default: auto, or "
         "the recipe's]")
group_size_option = click.option(
    "--group-size", type=POSITIVE, metavar="N",
    help=f"Weights that share a scale, for weight-only schemes: {', '.join(str(n) for n in BLOCK_SIZES)}.  [default: "
         "the scheme's]")
symmetric_option = click.option(
    "--symmetric/--asymmetric", default=None,
    help="Blocks without or with a zero point, for weight-only schemes.  [default: the scheme's]")
force_option = click.option("--force", is_flag=True, help="Replace an existing file.")
load_memory_option = click.option(
    "--load-memory", metavar="SIZE",
    help="What loading the packed model may take, such as 500MB, by estimate: the more, the smaller the file.  "
         "[default: over an empty process 2.5 times what the dense model takes, or 16 MB]")
target_option = click.option("--target", type=click.Choice(list(TARGETS)), default="cpu", show_default=True,
                             help="Where the model will run; onnxq targets tells of each.")
runtime_option = click.option(
    "--runtime", metavar="VERSION",
    help="The oldest onnxruntime that has to run it, such as 1.20: what came later is left out.")
threads_option = click.option("--threads", type=POSITIVE, metavar="N",
                              help="Threads of the runtime.  [default: the runtime's own choice]")
metric_option = click.option(
    "--metric", metavar="NAME|MODULE:FUNCTION",
    help="top1, topk, f1, psnr, spearman, perplexity, cosine or sqnr, or a function f(outputs, labels, inputs) -> "
         "float with an attribute higher_is_better.")
max_drop_option = click.option(
    "--max-drop", metavar="VALUE",
    help="How much worse the metric may be: 0.5% of the float model's value, 0.5pt (points of a percentage), or 0.005 "
         "in the metric's own unit.")
