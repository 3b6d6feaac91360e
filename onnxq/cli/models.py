"""onnxq verify, bench, inspect and explain: what is asked about models that there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from onnxq.cli.options import (
    DATA,
    axes,
    debug_option,
    json_option,
    max_drop_option,
    metric_option,
    quiet_option,
    target_option,
    threads_option,
)
from onnxq.cli.output import print_json, print_text, say, show, show_export, with_progress
from onnxq.report import terminal


@click.command("verify", short_help="Compare a compiled model with its float original, or run an export.")
@click.argument("float_model", metavar="FLOAT|BUNDLE")
@click.argument("compiled", required=False, metavar="[COMPILED]")
@click.option("--data", metavar="DATA", help=f"What to compare on: {DATA}.")
@metric_option
@max_drop_option
@click.option("--min-sqnr", type=float, metavar="DB", help="The least SQNR, in dB, that every output must have.")
@target_option
@click.option("--layers", is_flag=True, help="Compare each layer's output, too.")
@json_option
@quiet_option
@debug_option
def verify_models(float_model: str, compiled: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Compare COMPILED, whoever made it, with the FLOAT model that it came from; or run a BUNDLE.

    A BUNDLE is a folder that onnxq export wrote. Its checksums are compared, and each of its models runs on the sample
    in it, on the provider and with the session options that it names.

    \b
    Examples:
      onnxq verify model.onnx model.w8a8.onnx --data eval.npz
      onnxq verify model.onnx model.w8a8.onnx --data eval.npz --metric top1 --max-drop 0.5pt
      onnxq verify model.onnx model.w8a16.onnx --data eval.npz --target cuda
      onnxq verify model.onnx other.onnx --data random --min-sqnr 25 --layers
      onnxq verify model.w8a8-bundle/
    """
    if compiled is None:
        from onnxq.exporting import verify_bundle

        context = click.get_current_context()
        if any(context.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in options):
            raise click.UsageError("A BUNDLE brings its own sample; for other checks name FLOAT and COMPILED.")
        if not Path(float_model).is_dir():
            raise click.UsageError(f"Missing argument 'COMPILED'; {float_model} is no folder that onnxq export wrote.")
        found = with_progress(verify_bundle, quiet, float_model)
        show_export(found, as_json, quiet, "as expected" if found["ok"] else "")
    from onnxq.verifier import verify

    report = with_progress(verify, quiet, float_model, str(compiled), **options)
    show(report, as_json, quiet, "no check failed" if report.ok else "")


@click.command("bench", short_help="Time a model, or two against each other.")
@click.argument("model", metavar="MODEL")
@click.argument("other", required=False, metavar="[OTHER]")
@click.option("--data", metavar="DATA", help=f"What to feed: {DATA}.  [default: random]")
@click.option("--shape", "shapes", metavar="AXIS=N", multiple=True, callback=axes,
              help="The size of a free axis of the inputs; may be repeated.")
@target_option
@threads_option
@json_option
@debug_option
def bench_models(model: str, other: str | None, shapes: dict[str, int], threads: int | None,
                 as_json: bool, **options: Any) -> None:
    """Time MODEL, or MODEL against OTHER in alternating blocks: medians, their ratio, and peak memory.

    \b
    Examples:
      onnxq bench model.onnx
      onnxq bench model.onnx model.w8a8.onnx --threads 2
      onnxq bench model.onnx model.w8a8.onnx --shape batch=8 --shape seq=64
      onnxq bench model.onnx model.w8a16.onnx --target cuda
    """
    from onnxq.bench import bench

    found = with_progress(bench, False, model, other, shapes=shapes, threads=threads or 0, **options)
    print_json(found) if as_json else print_text(terminal.bench(found))
    for notice in found["notices"] if not as_json else ():
        say(f"Note: {notice}", "yellow")


@click.command("inspect", short_help="Tell what is in a model and what can be quantized.")
@click.argument("model", metavar="MODEL")
@click.option("--scheme", metavar="NAME",
              help="The scheme whose verdicts to show.  [default: the target's, for cpu w8a8]")
@target_option
@json_option
@debug_option
def inspect_model(model: str, scheme: str | None, target: str, as_json: bool) -> None:
    """Tell what is in MODEL, which nodes a scheme would quantize, and why not the others; nothing is run.

    \b
    Examples:
      onnxq inspect model.onnx
      onnxq inspect model.onnx --scheme w8a8-dynamic --json
      onnxq inspect model.onnx --target tensorrt
    """
    from onnxq.inspection import inspect

    found = inspect(model, scheme=scheme, target=target)
    print_json(found) if as_json else print_text(terminal.inspection(found))


@click.command("explain", short_help="Tell one node's story: what became of it, and why.")
@click.argument("source", metavar="MODEL|REPORT")
@click.argument("node", metavar="NODE")
@click.option("--scheme", metavar="NAME",
              help="The scheme whose verdict to show, of a float model.  [default: the target's, for cpu w8a8]")
@target_option
@json_option
@debug_option
def explain_node(source: str, node: str, scheme: str | None, target: str, as_json: bool) -> None:
    """Tell what becomes of NODE and why: its verdict, its tensors with their scales and ranges, what ran, what is
    around it. NODE is a node's name, a tensor that it makes, a glob, or the end of a name that no other has.

    A REPORT (report.json, or the folder of --report DIR) tells what was measured. Of a float MODEL it is the plan, and
    nothing is run; of a compiled MODEL the operator as it is, and the kernel that onnxruntime takes for it.

    \b
    Examples:
      onnxq explain model.onnx '*lm_head*'
      onnxq explain model.onnx /encoder/layer.0/query/MatMul --scheme w8a8-dynamic
      onnxq compile model.onnx --calib calib.npz --report report/ && onnxq explain report/ query/MatMul
      onnxq explain model.w8a8.onnx /encoder/layer.0/query/MatMul --json
    """
    from onnxq.explanation.explain import explain

    found = explain(source, node, scheme=scheme, target=target)
    print_json(found) if as_json else print_text(terminal.explanation(found))
