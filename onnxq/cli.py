"""The command line: parses, calls, prints. Results go to stdout; errors, notices and progress to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
import yaml

from onnxq import recipe as recipes
from onnxq.errors import OnnxqError, OutputError
from onnxq.report import terminal
from onnxq.report.report import Report
from onnxq.targets import TARGETS

T = TypeVar("T")

INTERNAL, INTERRUPTED, PIPE_CLOSED = 70, 130, 141  # 141: what a shell reports for a program that SIGPIPE ended
_DEBUG, _FATE = "onnxq.debug", "onnxq.fate"  # keys of click's context: is --debug on; what became of the output
_NAMES = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_DATA = ("an .npz, a folder of .npz, .npy or image files, a .txt or .jsonl text, MODULE:FUNCTION giving dicts, or the "
         "word random")
POSITIVE = click.IntRange(min=1)


def main() -> None:
    """The command `onnxq`; ends the process with its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal can't show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    cli(prog_name="onnxq")


class Commands(click.Group):
    """A group that turns every exception into one line on stderr and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands in the order in which they are used, not the alphabet's."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except OnnxqError as e:
            _end(ctx, f"Error: {e}", e.exit_code)
        except KeyboardInterrupt:
            _end(ctx, f"interrupted{ctx.meta.get(_FATE, '')}", INTERRUPTED)
        except BrokenPipeError:
            _forget_output()
            ctx.exit(PIPE_CLOSED)
        except Exception as e:
            _end(ctx, f"Error: onnxq itself failed ({type(e).__name__}: {e}); please report this with what the same "
                      "command prints with --debug", INTERNAL)


def _end(ctx: click.Context, message: str, status: int) -> NoReturn:
    if ctx.meta.get(_DEBUG):
        click.echo(traceback.format_exc(), err=True, nl=False)
    _say(" ".join(message.split()), "red")
    ctx.exit(status)


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[_DEBUG] = value


def _axes(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    """AXIS=N texts as a mapping."""
    sizes: dict[str, int] = {}
    for value in values:
        axis, size = value.rpartition("=")[::2]
        if not axis or not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise click.BadParameter(f"{value!r} is not an axis and a size above 0; write for example --shape batch=8")
        if axis in sizes:
            raise click.BadParameter(f"{axis!r} is given twice; give each axis one size")
        sizes[axis] = int(size)
    return sizes


json_option = click.option("--json", "as_json", is_flag=True,
                           help="Print one JSON document, and nothing else, on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True,
                            help="No progress, no summary; errors and failed checks only.")
debug_option = click.option("--debug", is_flag=True, is_eager=True, expose_value=False, callback=_remember_debug,
                            help="Show the traceback of an error.")
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


@click.group(cls=Commands, context_settings=_NAMES)
@click.version_option(package_name="onnxq", message="%(prog)s %(version)s")
def cli() -> None:
    """Quantize ONNX models, and measure what came of it.

    \b
    Examples:
      onnxq compile model.onnx --calib calib.npz
      onnxq verify model.onnx model.w8a8.onnx --data eval.npz --metric top1
      onnxq bench model.onnx model.w8a8.onnx --threads 2
      onnxq schemes

    \b
    Exit status:
      0    done, and every check held
      1    a check failed; the result is written all the same
      2    wrong usage
      3    a model, data or output that can't be used
      70   an error in onnxq itself
      130  interrupted
    """


@cli.command("compile", short_help="Make a model smaller and faster, and report on it.")
@click.argument("model", required=False, metavar="MODEL")
@click.option("-o", "--output", metavar="OUT", help="The file to write.  [default: MODEL.SCHEME.onnx beside the model]")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--scheme", metavar="NAME",
              help="A named scheme; onnxq schemes lists them.  [default: auto, which is w8a8 with --calib; "
                   "without, w8a8-dynamic or, where clearly faster, w8a8-dynamic-tensor]")
@click.option("--recipe", metavar="FILE", help="A recipe in YAML instead of a scheme; --print-recipe shows the form.")
@click.option("--calib", metavar="DATA", help=f"Calibration data: {_DATA}.")
@click.option("--ranges", type=click.Choice(["minmax", "moving-average", "percentile", "entropy", "mse"]),
              help="How the ranges of activations are found.  [default: minmax, or the recipe's]")
@click.option("--samples", type=POSITIVE, metavar="N", help="Rows of calibration data that are used at most.")
@click.option("--batch", type=POSITIVE, metavar="N", help="Rows that are run at once.")
@click.option("--eval", metavar="DATA", help="Evaluation data, with an array `labels` for metrics that need them.")
@metric_option
@max_drop_option
@click.option("--target", type=click.Choice(sorted(TARGETS)), default="cpu", show_default=True,
              help="Where the model will run.")
@threads_option
@click.option("--format", type=click.Choice(["auto", "qdq", "qoperator"]), default="auto", show_default=True,
              help="qdq: portable QuantizeLinear and DequantizeLinear; qoperator: fused operators; auto: what is best "
                   "on the target.")
@click.option("--keep-float", metavar="GLOB", multiple=True,
              help="Leave nodes float, by the name of the node, its weight, its output or its scope; may be repeated.")
@click.option("--report", "report_folder", metavar="DIR", help="Write report.json and report.html into this folder.")
@click.option("--no-measure", is_flag=True,
              help="Keep the plan's choice without timing it: for reproducible builds, or a machine that is not the "
                   "target.")
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
      onnxq compile --scheme w8a8 --print-recipe > recipe.yaml
    """
    from onnxq import compiler, request

    if scheme is not None and recipe is not None:
        raise click.UsageError("--scheme and --recipe exclude each other; name the scheme in the recipe.")
    if options["dump_after"] is not None and options["dump"] is None:
        raise click.UsageError("--dump-after needs --dump DIR, the folder to write to.")
    options |= {"scheme": scheme or "auto", "recipe": recipe}
    if print_recipe:
        names = ("scheme", "recipe", "calib", "samples", "batch", "ranges", "metric", "max_drop", "keep_float")
        resolved = request.resolve(**{name: options[name] for name in names})
        _print_json(resolved.to_dict()) if as_json else _print(resolved.to_yaml())
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'; for example: onnxq compile model.onnx")
    folder = Path(report_folder) if report_folder is not None else None
    if folder is not None:
        _check_folder(folder)
    context = click.get_current_context()
    context.meta[_FATE] = "; nothing half-written was left"
    report = _with_progress(compiler.compile, quiet, model, threads=threads or 0, measure=not no_measure, **options)
    context.meta[_FATE] = f"; {report.output} was written"
    _show(report, as_json, quiet, f"wrote {report.output}", folder)


@cli.command("verify", short_help="Compare a compiled model with its float original.")
@click.argument("float_model", metavar="FLOAT")
@click.argument("compiled", metavar="COMPILED")
@click.option("--data", metavar="DATA", help=f"What to compare on: {_DATA}.")
@metric_option
@max_drop_option
@click.option("--min-sqnr", type=float, metavar="DB", help="The least SQNR, in dB, that every output must have.")
@click.option("--layers", is_flag=True, help="Compare each layer's output, too.")
@json_option
@quiet_option
@debug_option
def verify_models(float_model: str, compiled: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Compare COMPILED, whoever made it, with the FLOAT model that it came from.

    \b
    Examples:
      onnxq verify model.onnx model.w8a8.onnx --data eval.npz
      onnxq verify model.onnx model.w8a8.onnx --data eval.npz --metric top1 --max-drop 0.5pt
      onnxq verify model.onnx other.onnx --data random --min-sqnr 25 --layers
    """
    from onnxq.verifier import verify

    report = _with_progress(verify, quiet, float_model, compiled, **options)
    _show(report, as_json, quiet, "no check failed" if report.ok else "")


@cli.command("bench", short_help="Time a model, or two against each other.")
@click.argument("model", metavar="MODEL")
@click.argument("other", required=False, metavar="[OTHER]")
@click.option("--data", metavar="DATA", help=f"What to feed: {_DATA}.  [default: random]")
@click.option("--shape", "shapes", metavar="AXIS=N", multiple=True, callback=_axes,
              help="The size of a free axis of the inputs; may be repeated.")
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
    """
    from onnxq.bench import bench

    found = _with_progress(bench, False, model, other, shapes=shapes, threads=threads or 0, **options)
    _print_json(found) if as_json else _print(terminal.bench(found))


@cli.command("inspect", short_help="Tell what is in a model and what can be quantized.")
@click.argument("model", metavar="MODEL")
@click.option("--scheme", metavar="NAME", default="w8a8", show_default=True, help="The scheme whose verdicts to show.")
@json_option
@debug_option
def inspect_model(model: str, scheme: str, as_json: bool) -> None:
    """Tell what is in MODEL, which nodes a scheme would quantize, and why not the others; nothing is run.

    \b
    Examples:
      onnxq inspect model.onnx
      onnxq inspect model.onnx --scheme w8a8-dynamic --json
    """
    from onnxq.inspection import inspect

    found = inspect(model, scheme=scheme)
    _print_json(found) if as_json else _print(terminal.inspection(found))


@cli.command("explain", short_help="Tell one node's story: what became of it, and why.")
@click.argument("source", metavar="MODEL|REPORT")
@click.argument("node", metavar="NODE")
@click.option("--scheme", metavar="NAME", help="The scheme whose verdict to show, of a float model.  [default: w8a8]")
@json_option
@debug_option
def explain_node(source: str, node: str, scheme: str | None, as_json: bool) -> None:
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

    found = explain(source, node, scheme=scheme)
    _print_json(found) if as_json else _print(terminal.explanation(found))


@cli.command("schemes", short_help="List the named schemes.")
@click.argument("name", required=False, metavar="[NAME]")
@json_option
@debug_option
def list_schemes(name: str | None, as_json: bool) -> None:
    """List the named schemes, or print the YAML of the scheme NAME.

    \b
    Examples:
      onnxq schemes
      onnxq schemes w8a8
    """
    if name is not None:
        text = recipes.scheme_text(name)
        _print_json(yaml.safe_load(text)) if as_json else _print(text)
        return
    rows = [(known, recipes.scheme(known).summary) for known in recipes.scheme_names()]
    if as_json:
        _print_json([{"name": known, "summary": text} for known, text in rows])
    else:
        _print(terminal.schemes(rows))


# ------------------------------------------------------------------ calling and printing


def _with_progress(function: Callable[..., T], quiet: bool, *args: Any, **options: Any) -> T:
    """Call into the library; what code of the user's prints meanwhile goes to stderr: stdout is for the result."""
    with contextlib.redirect_stdout(sys.stderr), terminal.progress(quiet) as progress:
        return function(*args, **options, progress=progress)


def _show(report: Report, as_json: bool, quiet: bool, last: str, folder: Path | None = None) -> None:
    """Print a report and save it to `folder`; `last` is the last line. Exits with 1 when a check failed."""
    for_people = not (as_json or quiet)
    if for_people:
        _print(terminal.summary(report, details=str(folder / "report.json") if folder else "--json") + "\n\n")
    if folder is not None:
        report.save(folder)
    if as_json:
        _print_json(report.to_dict())
    for notice in report.verdict.notices if not quiet else ():
        _say(f"Note: {notice}", "yellow")
    for failure in report.verdict.failures:
        _say(f"Failed: {failure}", "red")
    if for_people:
        if folder is not None:
            _print(terminal.line(f"report in {folder / 'report.html'}"))
        if last:
            _print(terminal.line(last, "green"))
    elif last and not report.ok:
        _say(f"{last} all the same")
    click.get_current_context().exit(0 if report.ok else 1)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that can't be made or written before minutes of work go into what belongs there."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"the report can't be written to {folder}; choose another --report folder")


def _print_json(data: Any) -> None:
    _print(json.dumps(data, indent=1))


def _print(text: str) -> None:
    """Text on stdout, its line end added if it has none."""
    try:
        click.echo(text.removesuffix("\n"), color=True)  # rich has decided on colours
    except BrokenPipeError:
        raise
    except OSError as e:
        _forget_output()
        raise OutputError(f"standard output can't be written ({e.strerror}); free some space or send it elsewhere"
                          ) from None


def _say(text: str, style: str = "") -> None:
    click.echo(terminal.line(text, style, err=True), err=True, color=True)


def _forget_output() -> None:
    """Drop what stdout still holds: Python would try again, and complain, when it ends."""
    with contextlib.suppress(OSError, ValueError):  # a stream of a test has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
