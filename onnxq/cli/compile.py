"""onnxq compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.cli.options import (
    DATA,
    POSITIVE,
    debug_option,
    force_option,
    group_size_option,
    json_option,
    load_memory_option,
    max_drop_option,
    metric_option,
    quiet_option,
    ranges_option,
    runtime_option,
    sizes,
    symmetric_option,
    target_option,
    threads_option,
)
from onnxq.cli.output import FATE, check_folder, print_json, print_text, show, with_progress
from onnxq.recipe import OUTLIERS, ROUNDINGS
from onnxq.request import OBJECTIVES
from onnxq.sparsity import PRUNINGS


@click.command("compile", short_help="Make a model smaller and faster, and report on it.")
@click.argument("model", required=False, metavar="MODEL")
@click.option("-o", "--output", metavar="OUT", help="The file to write.  [default: MODEL.SCHEME.onnx beside the model]")
@force_option
@click.option("--scheme", metavar="NAME",
              help="A named scheme; onnxq schemes lists them.  [default: auto, which is the target's, for cpu w8a8 "
                   "with --calib; without, w8a8-dynamic or, where clearly faster, w8a8-dynamic-tensor]")
@click.option("--recipe", metavar="FILE", help="A recipe in YAML instead of a scheme; --print-recipe shows the form.")
@click.option("--calib", metavar="DATA", help=f"Calibration data: {DATA}.")
@ranges_option
@click.option("--outliers", type=click.Choice(OUTLIERS),
              help="What is done against channels much larger than others: smooth moves them into the weights.  "
                   "[default: smooth, or the recipe's]")
@click.option("--rounding", type=click.Choice(ROUNDINGS),
              help="How weights are rounded: auto is by GPTQ where that keeps a layer's results better on data that it "
                   "has not seen.  [default: auto, or the recipe's]")
@click.option("--samples", type=POSITIVE, metavar="N", help="Rows of calibration data that are used at most.")
@click.option("--batch", type=POSITIVE, metavar="N", help="Rows that are run at once.")
@click.option("--eval", metavar="DATA", help="Evaluation data, with an array `labels` for metrics that need them.")
@metric_option
@max_drop_option
@target_option
@runtime_option
@threads_option
@click.option("--format", type=click.Choice(["auto", "qdq", "qoperator"]), default="auto", show_default=True,
              help="qdq: portable QuantizeLinear and DequantizeLinear; qoperator: fused operators; auto: what is best "
                   "on the target.")
@click.option("--keep-float", metavar="GLOB", multiple=True,
              help="Leave nodes float, by the name of the node, its weight, its output or its scope; may be repeated.")
@click.option("--fallback", type=click.IntRange(min=0), metavar="N",
              help="Leave the N layers float that are the most sensitive to int8, by the range_parm of what they read "
                   "or the recipe's rank; needs --calib.  [default: 0, or the recipe's]")
@group_size_option
@symmetric_option
@click.option("--target-bits", type=float, metavar="BITS",
              help="Choose a format for each weight of a weight-only scheme: so many bits per weight on average, with "
                   "scales, more where they matter.")
@click.option("--max-size", metavar="SIZE", help="The same, for a file of at most this size, such as 40MB.")
@click.option("--pack/--no-pack", default=None,
              help="Store weights in fewer bytes, to be decoded as the model is loaded: it runs as fast as without, "
                   "and loads more slowly; see onnxq pack.  [default: no, or the recipe's]")
@load_memory_option
@click.option("--sparsity", metavar="SHARE",
              help="Prune: make this share of each layer's weights 0, e.g. 50%; saves bytes once packed, not time.")
@click.option("--prune", type=click.Choice(PRUNINGS),
              help="By which method: sparsegpt changes the other weights to make up for the zeros; magnitude needs no "
                   "data.  [default: sparsegpt, or the recipe's]")
@click.option("--pattern", metavar="N:M",
              help="Prune so that of every M inputs N stay, e.g. 2:4; instead of --sparsity.")
@click.option("--prune-channels", metavar="SHARE",
              help="Take this share of the channels between layers out, e.g. 25%: saves time, too.")
@click.option("--prune-heads", metavar="SHARE", help="The same of the heads of each attention.")
@click.option("--report", "report_folder", metavar="DIR", help="Write report.json and report.html into this folder.")
@click.option("--objective", type=click.Choice(OBJECTIVES), default="balanced", show_default=True,
              help="What 2 % of a node's time are worth: latency takes the fastest kernels; balanced leaves float what "
                   "int8 makes hardly faster; size keeps int8 that is hardly slower.")
@click.option("--shape", "shapes", metavar="AXIS=N[,N]", multiple=True, callback=sizes,
              help="The size of a free axis to time with, or several that all count; may be repeated.  [default: that "
                   "of the data]")
@click.option("--no-measure", is_flag=True,
              help="Keep the plan's choice without timing it: for reproducible builds, or a machine that is not the "
                   "target.")
@click.option("--max-memory", metavar="SIZE",
              help="Compile a model that takes more than this to run, e.g. 2GB, one weight at a time and without "
                   "running it (weight-only schemes).  [default: 80 % of the machine's]")
@click.option("--save-plan", metavar="DIR", help="Write what was decided into this folder: plan.json and plan.npz.")
@click.option("--plan", metavar="DIR", help="Replay a saved plan: the same bytes again, without data.")
@json_option
@quiet_option
@debug_option
@click.option("--print-recipe", is_flag=True,
              help="Print the recipe that these options stand for, and compile nothing.")
@click.option("--dump", metavar="DIR", help="Write the graph after each pass into this folder.")
@click.option("--dump-after", metavar="PASS", help="With --dump: after this pass only.")
def compile_model(model: str | None, scheme: str | None, recipe: str | None, report_folder: str | None,
                  threads: int | None, no_measure: bool, as_json: bool, quiet: bool, print_recipe: bool,
                  **options: Any) -> None:
    """Compile MODEL to a smaller, faster one, and report its size, latency, accuracy, and what became of each node.

    \b
    Examples:
      onnxq compile model.onnx
      onnxq compile model.onnx --calib calib.npz -o small.onnx
      onnxq compile model.onnx --calib calib.npz --eval eval.npz --metric top1 --max-drop 0.5pt
      onnxq compile model.onnx --calib calib.npz --keep-float '*lm_head*' --report report/
      onnxq compile model.onnx --calib calib.npz --fallback 3
      onnxq compile model.onnx --scheme w4a16 --group-size 64 --symmetric
      onnxq compile model.onnx --scheme w4a16 --calib calib.npz --max-size 40MB
      onnxq compile model.onnx --scheme w8a8-dynamic --pack --load-memory 500MB
      onnxq compile model.onnx --calib calib.npz --sparsity 50% --prune sparsegpt
      onnxq compile model.onnx --calib calib.npz --shape batch=1 --shape seq=64,128
      onnxq compile model.onnx --calib calib.npz --target cpu-portable --runtime 1.20
      onnxq compile large.onnx --scheme w4a16 --max-memory 2GB
      onnxq compile --scheme w8a8 --print-recipe > recipe.yaml
    """
    from onnxq import aiming, compiler, request

    if scheme is not None and recipe is not None:
        raise click.UsageError("--scheme and --recipe exclude each other; name the scheme in the recipe.")
    if options["dump_after"] is not None and options["dump"] is None:
        raise click.UsageError("--dump-after needs --dump DIR, the folder to write to.")
    options |= {"scheme": scheme or "auto", "recipe": recipe}
    if print_recipe:
        names = ("scheme", "recipe", "calib", "samples", "batch", "ranges", "outliers", "rounding", "group_size",
                 "symmetric", "target_bits", "max_size", "pack", "load_memory", "metric", "max_drop", "keep_float",
                 "fallback", "sparsity", "prune", "pattern", "prune_channels",
                 "prune_heads")
        target = aiming.target_for(options["target"], options["format"], options["runtime"])
        resolved = request.resolve(target=target, **{name: options[name] for name in names})
        print_json(resolved.to_dict()) if as_json else print_text(resolved.to_yaml())
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'; for example: onnxq compile model.onnx")
    folder = Path(report_folder) if report_folder is not None else None
    if folder is not None:
        check_folder(folder)
    context = click.get_current_context()
    context.meta[FATE] = "; nothing half-written was left"
    report = with_progress(compiler.compile, quiet, model, threads=threads or 0, measure=not no_measure, **options)
    context.meta[FATE] = f"; {report.output} was written"
    show(report, as_json, quiet, f"wrote {report.output}", folder)
